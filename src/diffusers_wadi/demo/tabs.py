"""The tabs of the page: fields, and which request each button makes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_wadi._optional import require
from diffusers_wadi.demo import texts
from diffusers_wadi.demo.requests import ALL_LAYERS, AS_IT_IS, LARGEST_SEED, Requests
from diffusers_wadi.demo.wiring import computes, draws, draws_together

gr = require("gradio", "demo")

ROLL = "() => Math.floor(Math.random() * 4294967296)"
QUIETLY = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
BUTTONS = ["download", "download_all", "fullscreen"]


@dataclass
class Fields:
    """What every tab that draws begins with."""

    prompt: Any
    seed: Any
    dice: Any
    button: Any

    def wire(self, call: dict[str, Any], inputs: list, outputs: list, examples: Any, api_name: str) -> None:
        """Draw on Enter in the prompt or the seed, on the button, after a throw of the dice, and on an example."""
        where = {"inputs": [self.prompt, self.seed, *inputs], "outputs": outputs}
        gr.on([self.prompt.submit, self.seed.submit, self.button.click], **call, **where, api_name=api_name)
        again = call | {"api_visibility": "private"}
        self.dice.click(None, None, self.seed, js=ROLL, api_visibility="private").then(**again, **where)
        examples.load_input_event.then(**again, **where)


def fields(start: str, button: str) -> Fields:
    """Prompt, seed with dice and a button, in a column that is open."""
    prompt = gr.Textbox(start, label="Prompt", lines=1, max_lines=3, placeholder="What to draw; Enter draws it")
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(
            texts.START_SEED, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=90, scale=3
        )
        dice = gr.Button("🎲 New seed", size="lg", min_width=130, scale=2)
        go = gr.Button(button, variant="primary", size="lg", min_width=120, scale=3)
    return Fields(prompt, seed, dice, go)


def gallery(label: str, columns: int = 2, look: str = "") -> Any:
    return gr.Gallery(
        label=label,
        show_label=False,
        elem_classes=look,
        columns=columns,
        object_fit="contain",
        height="auto",
        buttons=BUTTONS,
        interactive=False,
        format="png",
    )


def examples(prompts: list[str], prompt: Any) -> Any:
    rows = [[text] for text in prompts]
    return gr.Examples(rows, [prompt], label="Examples", examples_per_page=12)


def generate_tab(requests: Requests) -> Any:
    """Images in one step. Returns the event that fills the page when it opens, as (call, inputs, outputs)."""
    prompts = texts.examples(requests.engine)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            top = fields(prompts[0], "Draw")
            count = gr.Slider(
                1, requests.settings.max_images, min(4, requests.settings.max_images), step=1, label="How many"
            )
            live = gr.Checkbox(False, label="Live: draw again while I type")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            images = gallery("Images")
    shown = examples(prompts, top.prompt)
    call, outputs = draws_together(requests.generate, requests.settings.at_once), [images, said]
    top.wire(call, [count], outputs, shown, "generate")

    def redraw(prompt: str, seed: float, number: float, on: bool) -> Any:
        return call["fn"](prompt, seed, number) if on and prompt.strip() else (gr.skip(), gr.skip())

    gr.on(
        [top.prompt.change, live.input, count.input],  # change: input misses what is pasted
        **call | QUIETLY | {"fn": redraw},  # not of `draws`, which would ask for a GPU at each key with Live off too
        inputs=[top.prompt, top.seed, count, live],
        outputs=outputs,
    )
    return call, [top.prompt, top.seed, count], outputs


def strength_tab(requests: Requests) -> None:
    """The angle slider."""
    if not requests.engine.has_adapter:
        gr.Markdown(texts.NO_ADAPTER)
        return
    prompts = texts.examples(requests.engine)
    gr.Markdown(texts.STRENGTH)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            top = fields(prompts[0], "Draw")
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength: factor on every angle")
            path = gr.Button("Images along the path, 0 to 1.5")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            image = gallery("At this strength", columns=1, look="single")
            along = gallery("Along the path", columns=4)
    shown = examples(prompts, top.prompt)
    top.wire(draws(requests.at_strength), [strength], [image, said], shown, "strength")
    values = {"inputs": [top.prompt, top.seed, strength], "outputs": [image, said]}
    strength.input(**draws(requests.at_strength), **QUIETLY, **values)
    path.click(**draws(requests.strength_path), inputs=[top.prompt, top.seed], outputs=along, api_name="strength_path")


def control_tab(requests: Requests) -> None:
    """A condition by hand or from a picture, and what is drawn after it."""
    engine, detectors = requests.engine, requests.detectors()
    gr.Markdown(texts.control(engine, len(detectors)))
    if not engine.has_unet:
        return
    prompts = texts.examples(engine)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            top = fields(prompts[0], "Draw") if engine.has_controlnet else None
            board = _board()
            detector = gr.Dropdown(detectors, value=AS_IT_IS, label="Detector")
            if top:
                scale = gr.Slider(0, 2, 0.5, step=0.05, label="Scale: strength of the control")
            look = gr.Button("Show the condition")
        with gr.Column(scale=1, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            condition = gr.Image(
                label="Condition", buttons=["download", "fullscreen"], interactive=False, elem_classes="condition"
            )
            images = gallery("Without and with the control") if top else None
    shown = _board_examples(requests, board, top and top.prompt)
    look.click(**computes(requests.condition), inputs=[board, detector], outputs=condition, api_name="condition")
    if top:
        inputs, outputs = [board, detector, scale], [condition, images, said]
        top.wire(draws(requests.control), inputs, outputs, shown, "control")


def _board() -> Any:
    black = Image.new("RGB", (512, 512), "black")
    return gr.ImageEditor(
        {"background": black, "layers": [], "composite": black},
        type="pil",
        label="Picture",
        sources=("upload", "clipboard"),
        canvas_size=(512, 512),
        brush=gr.Brush(default_size=24, colors=["#ffffff", "#000000"], default_color="#ffffff"),
        layers=False,
        transforms=(),
        height=420,
    )


def _board_examples(requests: Requests, board: Any, prompt: Any) -> Any:
    """Masks of rendered captions for Shapes World; for other models prompts alone."""
    prompts = texts.examples(requests.engine)
    if not requests.engine.is_bundled:
        return examples(prompts, prompt) if prompt is not None else None
    from diffusers_wadi.shapes import parse_caption, render_scenes
    from diffusers_wadi.shapes.conditions import condition_of

    folder = Path(tempfile.mkdtemp(dir=requests.outputs.folder))
    rows = []
    for number, scene in enumerate(render_scenes([parse_caption(text) for text in prompts[:4]])):
        path = folder / f"mask-{number}.png"
        Image.fromarray(condition_of(scene)).resize((512, 512), Image.Resampling.NEAREST).save(path)
        rows.append([str(path), prompts[number]])
    inputs = [board] if prompt is None else [board, prompt]
    return gr.Examples([row[: len(inputs)] for row in rows], inputs, label="Examples")


def high_resolution_tab(requests: Requests) -> None:
    """Larger than trained on, without and with ScaleCrafter."""
    engine = requests.engine
    if not engine.has_unet:
        gr.Markdown(texts.NO_UNET)
        return
    prompts = texts.examples(engine)
    most = requests.largest / engine.side
    gr.Markdown(texts.LARGER)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            top = fields(prompts[0], "Draw both")
            times = gr.Slider(1, most, min(2, most), step=0.25, label=f"Size: times {engine.side} pixels")
            strength = gr.Slider(0, 2, 1, step=0.05, label="ScaleCrafter's strength")
            finest = gr.Slider(
                1,
                4,
                2.5 if engine.is_bundled else 1,
                step=0.25,
                label="Finest level, how many times wider; 1: as the preset",
            )
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            images = gallery("Plain and with ScaleCrafter")
    shown = examples(prompts, top.prompt)
    inputs = [times, strength, finest]
    top.wire(draws(requests.high_resolution, 30), inputs, [images, said], shown, "high_resolution")


def compare_tab(requests: Requests) -> None:
    """Teacher beside student."""
    engine, most = requests.engine, requests.settings.max_steps
    if not engine.has_adapter:
        gr.Markdown(texts.NO_ADAPTER)
        return
    prompts = texts.examples(engine)
    gr.Markdown(texts.COMPARE)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            top = fields(prompts[0], "Compare")
            steps = gr.Slider(1, most, min(25, most), step=1, label="Steps of the teacher")
            guidance = gr.Slider(1, 20, engine.usual_guidance, step=0.5, label="Guidance of the teacher")
        with gr.Column(scale=3, min_width=300):
            said = gr.Markdown("", elem_classes="said")
            images = gallery("Teacher and student")
    shown = examples(prompts, top.prompt)
    top.wire(draws(requests.compare, 60), [steps, guidance], [images, said], shown, "compare")


def inspect_tab(requests: Requests) -> None:
    """Norm and direction change per layer."""
    from diffusers_wadi.analysis.report import GROUPS

    gr.Markdown(texts.INSPECT)
    if not requests.engine.can_inspect:
        gr.Markdown(texts.NO_SOURCES)
        return
    with gr.Row(equal_height=True):
        group = gr.Dropdown([ALL_LAYERS, *GROUPS], value=GROUPS[0], label="Layers", scale=3, min_width=160)
        go = gr.Button("Measure", variant="primary", scale=1, min_width=100)
    summary = gr.Markdown("", elem_classes="said")
    figure = gr.Image(
        label="Change of norm and direction", show_label=False, buttons=["download", "fullscreen"], interactive=False
    )
    with gr.Accordion("The layers whose direction changed most", open=False):
        table = gr.Markdown("")
    call = computes(requests.inspect) | {"inputs": [group], "outputs": [figure, summary, table]}
    go.click(**call, api_name="inspect")
    group.input(**call, api_visibility="private")
