"""Condition images: sizes, modes, names, missing packages and weights; conditions of Shapes World; a toy that obeys."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.utils import logging
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from diffusers_wadi import WaDiControlNetPipeline, bundled_checkpoint
from diffusers_wadi.downstream import controlnet
from diffusers_wadi.downstream.controlnet import condition_image, detector_names, load_detector
from diffusers_wadi.shapes import conditions, judge_image, render_scenes
from diffusers_wadi.shapes.scenes import heldout_captions, parse_caption

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 75, 3), dtype=np.uint8))


class Lines:
    """As controlnet_aux's Canny: works at multiples of 64 of its own choice, and swallows unknown options."""

    def __call__(
        self, input_image=None, threshold=100, detect_resolution=512, image_resolution=512, output_type=None, **kw
    ):
        self.seen, self.sides = input_image, (detect_resolution, image_resolution)
        bright = np.asarray(input_image.resize((image_resolution, 64)).convert("L")) > threshold
        found = Image.fromarray(bright.astype(np.uint8) * 255)
        return found if output_type == "pil" else np.asarray(found)


class Soft:
    """As its learned detectors: with weights, one resolution, and settings by which two names differ."""

    loads = []

    @classmethod
    def from_pretrained(cls, source, filename="soft.pth"):
        if source == "lllyasviel/Annotators":
            raise LocalEntryNotFoundError("cannot find soft.pth on the disk,\nand the Hub is not to be asked")
        cls.loads.append(source)
        return cls()

    def to(self, device):
        self.device = device

    def __call__(self, input_image, scribble=False, detect_resolution=512, pair=False):
        grey = Image.new("L", (detect_resolution, detect_resolution), 255 if scribble else 100)
        return (grey, grey) if pair else grey


@pytest.fixture
def aux(monkeypatch):
    """A stand-in for controlnet_aux with the layout of its `processor`."""
    package, processor = ModuleType("controlnet_aux"), ModuleType("controlnet_aux.processor")
    package.processor, package.LineartStandardDetector = processor, Lines
    processor.MODELS = {
        "lines": {"class": Lines, "checkpoint": False},
        "soft": {"class": Soft, "checkpoint": True},
        "soft_scribble": {"class": Soft, "checkpoint": True},
        "dwpose": {"class": Lines, "checkpoint": True},
    }
    processor.MODEL_PARAMS = {"lines": {}, "soft": {"scribble": False}, "soft_scribble": {"scribble": True}}
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", processor)
    monkeypatch.setattr(Soft, "loads", [])
    controlnet._loaded.cache_clear()
    yield package
    controlnet._loaded.cache_clear()


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    monkeypatch.delitem(sys.modules, "controlnet_aux.processor", raising=False)
    with pytest.raises(ImportError, match=r'pip install "diffusers-wadi\[controlnet\]"'):
        condition_image(PHOTO, "canny")
    assert condition_image(PHOTO, None).size == (72, 48)  # needs no detector


def test_names_come_from_the_package_and_unknown_ones_are_listed(aux):
    assert detector_names() == ["dwpose", "lineart_standard", "lines", "soft", "soft_scribble"]
    with pytest.raises(ValueError, match="'cany' is not known; expected one of dwpose, lineart_standard, lines"):
        condition_image(PHOTO, "cany")


def test_size_is_that_of_the_image_cut_to_latents_or_the_one_asked_for(aux):
    found = condition_image(PHOTO, "lines")
    assert found.size == (72, 48) and found.mode == "RGB" and set(np.unique(found)) == {0, 255}
    assert load_detector("lines")[0].seen.size == (72, 48) and load_detector("lines")[0].sides == (48, 48)
    assert condition_image(Image.new("RGB", (77, 47)), None).size == (72, 40)
    assert condition_image(PHOTO, "lines", size=(96, 64)).size == (96, 64)
    assert condition_image(PHOTO, "soft", weights="here", size=(16, 24)).size == (16, 24)
    for size in ((60, 64), (0, 8)):
        with pytest.raises(ValueError, match=f"size={size[0]}x{size[1]} will not do.*multiples of 8"):
            condition_image(PHOTO, "lines", size=size)
    with pytest.raises(ValueError, match="image of 5x9"):
        condition_image(Image.new("RGB", (5, 9)), "lines")


def test_modes(aux, tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.unique(condition_image(clear, None)).tolist() == [255]
    grey = np.full((16, 8), 7, np.uint8)
    assert np.unique(condition_image(grey, None)).tolist() == [7]
    for image, message in (
        (Image.new("I;16", (8, 8)), "mode 'I;16', more than 8 bits"),
        (Image.new("F", (8, 8)), "mode 'F'"),
        (np.zeros((8, 8, 3)), "float64; expected uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            condition_image(image, "lines")
    with pytest.raises(TypeError, match="expected a PIL image"):
        condition_image(torch.zeros(3, 8, 8), "lines")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (16, 8), "red").save(tmp_path / "turned.jpg", exif=exif)
    for image in (tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")):
        assert condition_image(image, None).size == (8, 16)


def test_options_reach_the_detector_and_misspelt_ones_do_not_vanish(aux):
    assert np.asarray(condition_image(PHOTO, "lines", threshold=0, detect_resolution=16)).mean() > 250
    assert load_detector("lines")[0].sides == (16, 48)
    with pytest.raises(TypeError, match="'lines' has no option 'treshold'; it has detect_resolution.*threshold"):
        condition_image(PHOTO, "lines", treshold=0)
    with pytest.raises(TypeError, match="detector is None"):
        condition_image(PHOTO, None, threshold=0)
    with pytest.raises(TypeError, match="gives tuple; expected one image"):
        condition_image(PHOTO, "soft", weights="here", pair=True)


def test_an_empty_condition_is_warned_of(aux, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("diffusers_wadi.downstream.controlnet"), "warning", said.append)
    condition_image(PHOTO, "lines", threshold=255)
    assert len(said) == 1 and "'lines' found nothing" in said[0]


def test_weights_come_on_demand_once_and_offline_it_says_what_to_do(aux):
    with pytest.raises(OSError, match=r"weights of detector 'soft'.*lllyasviel/Annotators.*weights=FOLDER.*\(.*lines"):
        condition_image(PHOTO, "soft")
    plain = condition_image(PHOTO, "soft", weights="here")
    scribble = condition_image(PHOTO, "soft_scribble", weights="here", device="cpu")
    assert Soft.loads == ["here"] and load_detector("soft", "here")[0].device == "cpu"
    assert np.unique(plain).tolist() == [100] and np.unique(scribble).tolist() == [255]
    with pytest.raises(ValueError, match="'lines' has no weights"):
        condition_image(PHOTO, "lines", weights="here")


def test_a_detector_that_needs_more_packages_says_which(aux):
    with pytest.raises(
        ImportError, match="'dwpose' needs mmcv and mmpose and mmdet too: pip install mmcv mmpose mmdet"
    ):
        condition_image(PHOTO, "dwpose")


def test_the_real_package():
    pytest.importorskip("controlnet_aux")
    names = detector_names()
    assert {"canny", "softedge_hed", "openpose_full", "depth_leres++", "lineart_standard", "teed", "sam"} <= set(names)
    circle = render_scenes([parse_caption("a large red circle on a white background")])[0]
    edges = np.asarray(condition_image(circle, "canny"))[..., 0] > 127
    outline = conditions.condition_of(circle, "edge")[..., 0] > 127
    near = np.pad(outline, 2)
    near = np.any([near[i : i + 64, j : j + 64] for i in range(5) for j in range(5)], axis=0)
    assert edges.sum() > 80 and (edges & near).sum() == edges.sum()
    assert condition_image(circle, "shuffle", size=(128, 64)).size == (128, 64)
    with pytest.raises(OSError, match="'softedge_hed' could not be had"):
        condition_image(circle, "softedge_hed")


# -------------------------------------------------------------------------------------------------------- Shapes World


def test_conditions_of_renders():
    captions = heldout_captions(20, seed=0)
    renders = render_scenes([parse_caption(caption) for caption in captions], seed=0)
    for image in renders:
        mask, edge = conditions.condition_of(image), conditions.condition_of(image, "edge")
        assert conditions.mask_iou(image, mask) == 1.0
        assert mask.shape == (64, 64, 3) and set(np.unique(mask)) == {0, 255}
        assert (edge <= mask).all() and 0.1 < edge.mean() / mask.mean() < 0.8
    others = np.roll(renders, 1, axis=0)
    overlap = np.mean([conditions.mask_iou(a, conditions.condition_of(b)) for a, b in zip(renders, others)])
    assert overlap < 0.35
    empty = np.full((64, 64, 3), 250, np.uint8)
    assert conditions.mask_iou(empty, conditions.condition_of(renders[0])) == 0.0
    assert conditions.mask_iou(empty, np.zeros_like(empty)) == 0.0
    with pytest.raises(ValueError, match="'depth' is not known; expected one of mask, edge"):
        conditions.condition_of(renders[0], "depth")


def test_the_mask_is_the_judges():
    caption = "a large red heart on a white background"
    image = render_scenes([parse_caption(caption)])[0]
    assert all(judge_image(image, caption).values())
    area = (conditions.condition_of(image)[..., 0] > 0).sum()
    exact = (np.abs(image.astype(int) - 250).sum(-1) > 0).sum()
    assert 0.9 * exact < area <= exact


def save_controlnet(folder):
    """One for Shapes World that does something, though nothing good."""
    unet = UNet2DConditionModel.from_pretrained(bundled_checkpoint() / "teacher", subfolder="unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    torch.nn.init.normal_(net.controlnet_mid_block.weight, std=0.1)
    net.save_pretrained(folder)


def load(folder, name, monkeypatch):
    """A script of the repository as a module; it may import its siblings."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / folder)
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_measures_every_cell(tmp_path, monkeypatch):
    benchmark = load("benchmarks", "downstream_controlnet", monkeypatch)
    save_controlnet(tmp_path / "mask" / "controlnet")
    rows = benchmark.measure(images=2, steps=2, work_dir=tmp_path, picture=tmp_path / "picture.png")
    cells = {(row["generator"], row["setting"]) for row in rows}
    control = ["mask, scale 1", "mask, scale 0.5"]
    expected = {("teacher, 2 steps", setting) for setting in ("without control", control[0])}
    assert cells == expected | {("student, 1 step", setting) for setting in ("without control", *control)}
    values = {row["metric"]: set() for row in rows}
    for row in rows:
        assert 0 <= row["value"] <= 1 and row["images"] == 2 and row["seconds_per_image"] > 0
        values[row["metric"]].add(row["value"])
    assert list(values) == ["mask IoU", "attributes right", "captions wholly right"] and len(values["mask IoU"]) > 2
    assert Image.open(tmp_path / "picture.png").size == (2 * 64, 6 * 64)
    assert benchmark.markdown(rows).count("\n") == 6


def test_the_example_draws_a_row_of_strengths(tmp_path, monkeypatch):
    example = load("examples", "controlnet", monkeypatch)
    save_controlnet(tmp_path / "net")
    caption = "a large red heart on a white background"
    mask = conditions.condition_of(render_scenes([parse_caption(caption)])[0])
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "mask.png"), "--controlnet", str(tmp_path / "net")]
    files += ["--output", str(tmp_path / "row.png")]
    flags = ["--prompt", caption, "--model", "bundled", "--detector", "none", "--scales", "0", "2", "--device", "cpu"]
    example.main(example.parse_args([*flags, *files]))
    row = np.asarray(Image.open(tmp_path / "row.png"))
    assert row.shape == (64, 192, 3) and np.array_equal(row[:, :64], mask)
    assert not np.array_equal(row[:, 64:128], row[:, 128:])


# --------------------------------------------------------------------------------------------------------- toy control


def squares(n, generator):
    """Latents (n, 4, 8, 8) with one bright 3x3 square each, and conditions (n, 3, 64, 64) that show it."""
    corners = torch.randint(0, 6, (n, 2), generator=generator)
    masks = torch.zeros(n, 1, 8, 8)
    for mask, (row, column) in zip(masks, corners):
        mask[0, row : row + 3, column : column + 3] = 1
    return (3 * masks - 0.5).expand(-1, 4, -1, -1), masks.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(
        -1, 3, -1, -1
    )


def fit(parameters, predict, scheduler, steps, generator):
    """Epsilon loss on squares, late timesteps oftener, weighted as x0 errors are."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    text = torch.zeros(32, 4, 16)
    for _ in range(steps):
        x0, shown = squares(32, generator)
        noise = torch.randn(x0.shape, generator=generator)
        t = ((1 - torch.rand(32, generator=generator) ** 3) * 1000).long().clamp(max=999)
        error = (predict(scheduler.add_noise(x0, noise, t), t, text, shown) - noise).square().mean(dim=(1, 2, 3))
        loss = (error * scheduler.alphas_cumprod[t] ** -0.75).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_a_toy_puts_its_square_where_the_condition_says_in_one_step(components):
    """A UNet learns squares, a ControlNet on the frozen UNet learns where, and one step obeys."""
    torch.manual_seed(0)
    generator, scheduler = torch.Generator().manual_seed(0), components["scheduler"]
    unet = tiny_unet(width=16).train()
    fit(unet.parameters(), lambda x, t, text, _: unet(x, t, text).sample, scheduler, 150, generator)
    unet.requires_grad_(False).eval()
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 16, 16)).train()

    def controlled(x, t, text, shown):
        down, middle = net(x, t, text, controlnet_cond=shown, return_dict=False)
        return unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample

    fit(net.parameters(), controlled, scheduler, 400, generator)
    pipe = WaDiControlNetPipeline(**components | {"unet": unet}, controlnet=net.eval())
    pipe.set_progress_bar_config(disable=True)
    x0, shown = squares(100, torch.Generator().manual_seed(1))

    def iou(scale, shown):
        latents = pipe(
            prompt_embeds=torch.zeros(100, 4, 16),
            image=shown.contiguous(),
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        ).images
        drawn, asked = latents.mean(1) > 1, x0.mean(1) > 1
        return ((drawn & asked).sum((1, 2)) / (drawn | asked).sum((1, 2)).clamp(min=1)).mean().item()

    obeyed, elsewhere, without = iou(1.0, shown), iou(1.0, shown.roll(1, 0)), iou(0.0, shown)
    print(f"IoU with the condition {obeyed:.2f}, with another's {elsewhere:.2f}, without {without:.2f}")
    assert obeyed > 0.5 and obeyed > 3 * max(elsewhere, without)  # seen: 0.62, 0.12, 0.14
