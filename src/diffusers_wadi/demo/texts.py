"""What the page says."""

from __future__ import annotations

from diffusers_wadi.demo.engine import Engine

START_SEED = 7
SHAPES_EXAMPLES = [
    "a large red heart on a white background",
    "a small blue ring above a yellow star on a gray background",
    "a yellow circle on a black background",
    "a green circle right of a red square on a gray background",
    "a purple star left of a cyan circle on a white background",
    "a yellow square below a purple ring on a black background",
]
USUAL_EXAMPLES = [
    "a cabin by a lake at dawn, oil painting",
    "a red fox in fresh snow, photograph",
    "a bowl of ramen on a wooden table, top view",
    "an astronaut in a greenhouse, watercolour",
    "a street in the rain at night, neon lights",
]
SHAPES_GRAMMAR = (
    "It knows Shapes World: `a [small|large] COLOUR SHAPE on a BACKGROUND background`, or `a COLOUR SHAPE left of a COLOUR "
    "SHAPE on a BACKGROUND background`. Colours: red, green, blue, yellow, purple, cyan; shapes: circle, square, triangle, "
    "star, heart, ring; backgrounds: white, black, gray; relations: left of, right of, above, below. The two colours of a "
    "pair differ."
)
STRENGTH = (
    "One factor on all angles that the adapter turns the teacher's weights by: 0 is the teacher, asked for one step; 1 the "
    "one-step student; beyond 1 the same turn continues."
)
CONTROL = "Draw in white on black, or upload a picture. What the detector sees in it is the condition that the image keeps to."
LARGER = "Plain, a model repeats its objects at sizes that it was not trained on; ScaleCrafter widens its convolutions instead."
COMPARE = "The same noise and prompt. The teacher is the same network with the adapter off."
INSPECT = (
    "What distillation changed in the weights: the norm and the direction of each vector, layer by layer (paper, Eq. 13-17). "
    "LoRaD turns vectors and leaves their norms."
)
NO_ADAPTER = (
    "**Not with this model:** it has no adapter, its rotations are merged into the weights. Start with the adapter and its "
    "base; `wadi extract BASE MODEL -o ADAPTER` finds one."
)
NO_UNET = "**Not with this model:** ScaleCrafter widens the convolutions of a UNet, and this model has none."
NO_CONTROLNET = (
    "**No ControlNet is loaded,** so this tab shows the condition alone. Start with `wadi demo --controlnet "
    "FOLDER_OR_HUB_NAME` (or set `WADI_CONTROLNET`) to draw with one of the model's family."
)
NO_CONTROLNET_FOR_SHAPES = " For the bundled checkpoint `training/train_shapes_controlnet.py` trains one in minutes."
NO_TRANSFORMER_CONTROLNET = "**Not with this model:** there is no ControlNet for PixArt-alpha in diffusers."
NO_DETECTORS = 'More detectors (Canny, depth, pose, ...): `pip install "diffusers-wadi[controlnet]"`.'
NO_SOURCES = (
    "**Not with this model:** it is one whole model, and nothing says what it was made of. `wadi analyze BASE MODEL` compares "
    "any two."
)


def heading(engine: Engine) -> str:
    """Name and model."""
    device, dtype = engine.denoiser.device, str(engine.denoiser.dtype).removeprefix("torch.")
    millions = sum(p.numel() for p in engine.denoiser.parameters()) / 1e6
    kind = "UNet" if engine.has_unet else "transformer"
    model = f"Model: {engine.name}, {engine.side}x{engine.side}, {kind} of {millions:,.0f} M parameters ({dtype} on {device})."
    return f"# WaDi: images in one step\n\n{model}"


def examples(engine: Engine) -> list[str]:
    """Prompts to click, the first of which each tab begins with."""
    return SHAPES_EXAMPLES if engine.is_bundled else USUAL_EXAMPLES


def control(engine: Engine, detectors: int) -> str:
    """What the tab Control needs and what is missing of it."""
    if not engine.has_unet:
        return NO_TRANSFORMER_CONTROLNET
    parts = [CONTROL]
    if not engine.has_controlnet:
        parts.append(NO_CONTROLNET + NO_CONTROLNET_FOR_SHAPES * engine.is_bundled)
    if detectors < 2:
        parts.append(NO_DETECTORS)
    return "\n\n".join(parts)
