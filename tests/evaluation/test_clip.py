"""CLIP score and HPSv2 against open_clip by hand, on a tiny random model."""

import numpy as np
import pytest
import torch
from image_sets import random_images, tiny_clip, write_set
from PIL import Image
from safetensors.torch import save_file

open_clip = pytest.importorskip("open_clip")

from diffusers_wadi.evaluation.metrics import MetricOptions, check_metrics, clip, compute_metrics  # noqa: E402

PROMPTS = ["a red cat", "two dogs on a hill", "the sea", "a house", "nothing at all"]
GROUPS = ["anime", "photo", "anime", None, "photo"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("made") / "set", random_images(5), PROMPTS, GROUPS)


@pytest.fixture(scope="module")
def cosines(tiny):
    """One image and prompt at a time, by open_clip's own documentation."""
    model = tiny[0]
    prepare = open_clip.image_transform(32, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = []
    for pixels, prompt in zip(random_images(5), PROMPTS):
        with torch.no_grad():
            image = model.encode_image(prepare(Image.fromarray(pixels)).unsqueeze(0))[0]
            text = model.encode_text(tokenizer([prompt]))[0]
        found.append(float(image @ text / image.norm() / text.norm()))
    return np.array(found)


def options(tiny, **more):
    return MetricOptions(clip_model="tiny-clip", clip_weights=tiny[1], batch_size=2, device="cpu", **more)


def test_clip_score_is_the_mean_cosine(tiny, made, cosines):
    assert cosines.std() > 0.01
    assert compute_metrics(made, ["clip_score"], options(tiny)) == {
        "clip_score": pytest.approx(cosines.mean(), abs=1e-6)
    }


def test_weights_may_be_safetensors(tiny, made, cosines, tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file({key: value.contiguous() for key, value in tiny[0].state_dict().items()}, file)
    again = MetricOptions(clip_model="tiny-clip", clip_weights=file, device="cpu")
    assert compute_metrics(made, ["clip_score"], again)["clip_score"] == pytest.approx(cosines.mean(), abs=1e-6)


def test_hpsv2_is_a_hundred_cosines_by_style(tiny, made, cosines, monkeypatch, tmp_path):
    """The published file holds its tensors under `state_dict`."""
    monkeypatch.setattr(clip, "HPS_MODEL", "tiny-clip")
    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": tiny[0].state_dict()}, file)
    found = compute_metrics(made, ["hpsv2"], MetricOptions(hps_weights=file, device="cpu", batch_size=3))["hpsv2"]
    assert found["mean"] == pytest.approx(100 * cosines.mean(), abs=1e-4)
    expected = {"anime": 50 * cosines[[0, 2]].sum(), "photo": 50 * cosines[[1, 4]].sum()}
    assert found["styles"] == pytest.approx(expected, abs=1e-4)


def test_how_images_are_prepared_follows_the_weights(tiny, monkeypatch):
    """Some of open_clip's weights want another mean; a local copy of them must be fed the same."""
    entry = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "shortest"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: entry if tag == "own" else {})
    gray = Image.new("RGB", (32, 32), (255, 255, 255))
    for tag, white in ((None, 1.93), ("own", 1.0)):  # (1 - mean) / std of the first channel
        source = clip.clip_source(options(tiny, clip_pretrained=tag))
        transform = clip.load_clip(source, torch.device("cpu"))[1]
        assert float(transform(gray)[0].mean()) == pytest.approx(white, abs=0.01)


def test_weights_that_do_not_fit_or_could_run_code_are_refused(tiny, made, tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('sprung')",))

    file = tmp_path / "file.pt"
    for content in ({"state_dict": {"weight": torch.zeros(2)}}, {"state_dict": {"weight": Trap()}}):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"clip_weights=.*file\.pt.*cannot be loaded as open_clip's tiny-clip"):
            compute_metrics(made, ["clip_score"], MetricOptions(clip_model="tiny-clip", clip_weights=file))


def test_features_that_are_not_finite_name_their_image(tiny, made, tmp_path):
    state = {key: value.clone() for key, value in tiny[0].state_dict().items()}
    state["visual.proj"].fill_(float("nan"))
    file = tmp_path / "nan.pt"
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"tiny-clip gives NaN or infinite features for .*00000\.png"):
        compute_metrics(made, ["clip_score"], MetricOptions(clip_model="tiny-clip", clip_weights=file, device="cpu"))


def test_models_and_weights_that_do_not_exist_are_refused(tiny):
    with pytest.raises(ValueError, match="clip_model='ViT-Z': open_clip has no such model"):
        check_metrics(["clip_score"], MetricOptions(clip_model="ViT-Z"))
    with pytest.raises(ValueError, match="clip_pretrained='nope': .*laion2b_s39b_b160k"):
        check_metrics(["clip_score"], MetricOptions(clip_pretrained="nope"))
    with pytest.raises(ValueError, match="'tiny-clip' has no default weights. Give clip_weights=FILE"):
        check_metrics(["clip_score"], MetricOptions(clip_model="tiny-clip"))
    with pytest.raises(FileNotFoundError, match="clip_weights='missing.pt' is not a file"):
        check_metrics(["clip_score"], MetricOptions(clip_weights="missing.pt"))
    with pytest.raises(FileNotFoundError, match="hps_weights='missing.pt' is not a file"):
        check_metrics(["hpsv2"], MetricOptions(hps_weights="missing.pt"))


def test_weights_that_cannot_be_downloaded_name_file_and_option(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(OSError, match=r"CLIP ViT-bigG-14 \(laion2b_s39b_b160k\) .*no network.*clip_weights=FILE"):
        check_metrics(["clip_score"], MetricOptions())
    with pytest.raises(
        OSError, match=r"HPS_v2\.1_compressed\.pt could not be downloaded from xswu/HPSv2.*hps_weights=FILE"
    ):
        check_metrics(["hpsv2"], MetricOptions(hps_version="v2.1"))


def test_the_usual_weights_are_ones_that_open_clip_knows():
    for model, tag in clip.PRETRAINED.items():
        assert open_clip.get_pretrained_cfg(model, tag), (model, tag)
    assert clip.HPS_MODEL in open_clip.list_models()
