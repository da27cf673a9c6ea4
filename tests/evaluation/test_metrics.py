"""FID, precision and recall against plain definitions and closed forms, and every bad input refused by name."""

import json
import logging

import numpy as np
import pytest
import torch
from image_sets import random_images, random_inception, write_images, write_set
from PIL import Image

pytest.importorskip("torch_fidelity")

from diffusers_wadi.evaluation.metrics import (
    METRICS,
    MetricOptions,
    check_metrics,
    compute_metrics,
    frechet_distance,
    inception,
    open_images,
    precision_recall,
)
from diffusers_wadi.evaluation.metrics.images import read_image
from diffusers_wadi.evaluation.weights import read_state
from diffusers_wadi.shapes import heldout_captions, parse_caption, render_scenes


def features(count, dimension=12, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=generator)
    return torch.randn(count, dimension, generator=generator) @ mix + shift


# The numbers


def test_fid_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(400), features(300, seed=1, shift=0.3)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_fid_has_the_closed_form_of_gaussians():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 over the standard deviations along their common axes."""
    axes = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
        0
    ].numpy()
    mean, spread = np.arange(6) / 7, (np.arange(1, 7), np.array([2, 2, 5, 1, 0.5, 9]))
    first, second = (
        {"mu": mu, "sigma": axes @ np.diag(s**2.0) @ axes.T} for mu, s in zip((mean, np.zeros(6)), spread)
    )
    expected = (mean**2).sum() + ((spread[0] - spread[1]) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fid_takes_the_usual_covariance_of_samples():
    """Divided by n - 1: with features (0, 2) against statistics of mean 0 and variance 1 that is 1 + (sqrt 2 - 1)^2."""
    statistics = {"mu": np.zeros(1), "sigma": np.ones((1, 1))}
    found = frechet_distance({"mu": np.ones(1), "sigma": np.full((1, 1), 2.0)}, statistics)
    assert found == pytest.approx(1 + (2**0.5 - 1) ** 2)
    samples = inception.feature_statistics(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert samples["sigma"].tolist() == [[2, 4], [4, 8]] and samples["mu"].tolist() == [1, 2]


def plain_precision(generated, real, k=3):
    """Share of generated points within the reach of some real point: the distance to its k-th nearest other one."""
    reach = []
    for i, point in enumerate(real):
        others = np.linalg.norm(np.delete(real, i, axis=0) - point, axis=1)
        reach.append(np.sort(others)[k - 1])
    inside = [(np.linalg.norm(real - point, axis=1) <= reach).any() for point in generated]
    return np.mean(inside)


def test_precision_and_recall_are_the_plain_ones_on_1000_points():
    generated, real = features(1000, dimension=4), 1.5 * features(1000, dimension=4, seed=1, shift=1.0)
    found = precision_recall(generated, real)
    plain = [side.double().numpy() for side in (generated, real)]
    assert found["precision"] == pytest.approx(plain_precision(*plain), abs=1e-6)
    assert found["recall"] == pytest.approx(plain_precision(*plain[::-1]), abs=1e-6)
    assert 0.05 < found["precision"] < 0.95 and abs(found["precision"] - found["recall"]) > 0.05


# Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return random_inception(tmp_path_factory.mktemp("inception") / "inception.pth", patch)


def tiles(batch):
    """In the place of Inception where it would only take time: (n, 3, height, width) to (n, 48)."""
    return (torch.nn.functional.adaptive_avg_pool2d(batch.float(), 4).flatten(1),)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("diffusers_wadi.evaluation.metrics.load_inception", lambda *args: tiles)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Generated images of 40 pixels, and real ones."""
    folder = tmp_path_factory.mktemp("sets")
    return write_set(folder / "made", random_images(6)), write_images(folder / "real", random_images(5, seed=1))


def test_features_are_those_of_torch_fidelitys_network(sets, inception_file):
    """In the order of the files, whatever the batch size."""
    made = sets[0]
    options = MetricOptions(batch_size=4, device="cpu")
    network = inception.load_inception(inception_file, torch.device("cpu"))
    pixels = torch.from_numpy(random_images(6)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network(pixels)[0]
    assert expected.std(dim=0).max() > 0.01  # the random network tells the images apart
    found = inception.inception_features(
        inception.ImageSet(made, sorted(made.rglob("*.png")), None, None, []), network, options
    )
    assert found.shape == (6, 2048) and torch.allclose(found, expected, atol=1e-4)


def test_image_size_is_torch_fidelitys_crop(tmp_path):
    from torch_fidelity.utils import prepare_input_from_descriptor

    wide = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    folder = write_images(tmp_path / "wide", [wide])
    theirs = prepare_input_from_descriptor(
        {"input": str(folder)}, samples_find_deep=True, samples_resize_and_crop=16, verbose=False
    )[0]
    assert torch.equal(inception._transform(16)(Image.fromarray(wide)), theirs)
    assert inception._transform(None)(Image.fromarray(wide)).shape == (3, 30, 50)


def test_weights_are_read_as_data(tmp_path, sets):
    class Trap:
        def __reduce__(self):
            return (exec, ("import os; os.environ['SPRUNG'] = '1'",))

    trap = tmp_path / "trap.pth"
    torch.save({"weight": Trap()}, trap)
    with pytest.raises(ValueError, match="inception_weights=.*trap.pth.*holds more than tensors and is not read"):
        compute_metrics(sets[0], ["precision_recall"], MetricOptions(reference=sets[1], inception_weights=trap))
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="other.pth.*does not fit torch-fidelity's InceptionV3"):
        inception.load_inception(other, torch.device("cpu"))
    torch.save([torch.zeros(2)], other)
    with pytest.raises(ValueError, match="holds a list; expected tensors by name"):
        read_state(other, "inception_weights")


def test_features_that_are_not_finite_name_their_image(sets):
    def network(batch):  # the image of the second batch
        values = torch.ones(len(batch), 3)
        values[-1, 1] = float("nan") if len(batch) < 4 else 1
        return (values,)

    images = inception.ImageSet(sets[0], sorted(sets[0].rglob("*.png")), None, None, [])
    with pytest.raises(ValueError, match=r"NaN or infinite features for .*00005\.png"):
        inception.inception_features(images, network, MetricOptions(batch_size=4, device="cpu"))


def test_statistics_take_the_place_of_real_images(tmp_path, monkeypatch, sets):
    """As pytorch-fid and clean-fid write them, float64; the features here are three, to be quick."""
    monkeypatch.setattr(inception, "FEATURES", 3)
    path = tmp_path / "real.npz"
    real = features(50, dimension=3)
    np.savez(path, mu=real.double().numpy().mean(0), sigma=np.cov(real.double().numpy(), rowvar=False))
    monkeypatch.setattr("diffusers_wadi.evaluation.metrics.load_inception", lambda *args: None)
    made = features(6, dimension=3, seed=1)
    monkeypatch.setattr("diffusers_wadi.evaluation.metrics.inception_features", lambda *args: made)
    options = MetricOptions(reference=path, inception_weights=path)
    assert compute_metrics(sets[0], ["fid"], options) == {"fid": pytest.approx(frechet_distance(made, real), rel=1e-9)}
    with pytest.raises(ValueError, match="precision_recall needs the images themselves"):
        check_metrics(["fid", "precision_recall"], options)
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="NaN or infinite numbers"):
        check_metrics(["fid"], options)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"expected mu of shape \(2048,\)"):
        check_metrics(["fid"], options)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ValueError, match="real.npz is no statistics file"):
        check_metrics(["fid"], options)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="real.npz is no statistics file"):
        check_metrics(["fid"], options)


def test_features_are_computed_once_and_given_the_right_way_round(sets, inception_file, quick):
    """FID, precision and recall of folders are those of the features of the two sets."""
    made, real = (
        tiles(torch.from_numpy(random_images(count, seed=seed)).permute(0, 3, 1, 2))[0]
        for count, seed in ((6, 0), (5, 1))
    )
    found = compute_metrics(sets[0], ["precision_recall", "fid"], options(sets[1], inception_file))
    assert list(found) == ["fid", "precision_recall"]
    assert found["fid"] == pytest.approx(frechet_distance(made, real), rel=1e-9)
    assert found["precision_recall"] == precision_recall(made, real) != precision_recall(real, made)


@pytest.mark.slow
def test_fid_of_folders_is_torch_fidelitys(tmp_path, sets, inception_file):
    """Its command on the same folders, two matrices of 2,048: half a minute."""
    import torch_fidelity

    options = MetricOptions(reference=sets[1], inception_weights=inception_file, device="cpu")
    ours = compute_metrics(sets[0], ["precision_recall", "fid"], options)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sets[0]), input2=str(sets[1]), fid=True, prc=True, cuda=False, samples_find_deep=True, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_file), cache=False,
        save_cpu_ram=True,
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5) and ours["fid"] > 0
    assert ours["precision_recall"] == {name: theirs[name] for name in ("precision", "recall")}


# Shapes World


def test_the_judge_is_a_metric(tmp_path):
    captions = heldout_captions(12, seed=5)
    renders = render_scenes([parse_caption(caption) for caption in captions])
    perfect = compute_metrics(write_set(tmp_path / "right", renders, captions), ["shapes"])["shapes"]
    assert perfect["attributes"] == perfect["captions"] == 1 and "colour" in perfect["by_attribute"]
    drawn = ["a large red heart on a white background", "a small blue circle on a gray background"]
    asked = [drawn[0].replace("red", "green"), drawn[1]]
    renders = render_scenes([parse_caption(caption) for caption in drawn])
    half = compute_metrics(write_set(tmp_path / "half", renders, asked), ["shapes"])["shapes"]
    assert half["captions"] == half["by_attribute"]["colour"] == 0.5 and half["by_attribute"]["shape"] == 1
    assert half["attributes"] == pytest.approx(9 / 10)


def test_the_judge_refuses_other_captions_and_shapes(tmp_path):
    folder = write_set(tmp_path / "set", random_images(2), ["a large red heart on a white background", "a dog"])
    with pytest.raises(ValueError, match=r"00001\.png is none"):
        check_metrics(["shapes"], folder=folder)
    wide = write_set(tmp_path / "wide", [np.zeros((8, 9, 3), np.uint8)], ["a large red heart on a white background"])
    with pytest.raises(ValueError, match="square images, and .* of 9x8"):
        check_metrics(["shapes"], folder=wide)


# Bad input


def options(reference, inception_file):
    return MetricOptions(reference=reference, inception_weights=inception_file, device="cpu")


def test_unknown_metrics_and_settings_are_refused():
    with pytest.raises(ValueError, match=f"no metric 'kid'; expected some of {', '.join(METRICS)}"):
        check_metrics(["fid", "kid"])
    with pytest.raises(ValueError, match="fid and precision_recall need reference"):
        check_metrics(["precision_recall", "fid"])
    with pytest.raises(ValueError, match="batch_size=0"):
        MetricOptions(batch_size=0)
    with pytest.raises(ValueError, match=r"hps_version='v3'.*v2\.0, v2\.1"):
        MetricOptions(hps_version="v3")
    assert compute_metrics("nowhere", []) == {}


def test_references_that_are_not_there_are_refused(tmp_path, inception_file):
    with pytest.raises(FileNotFoundError, match="reference='nowhere' is not a folder"):
        check_metrics(["fid"], options("nowhere", inception_file))
    with pytest.raises(FileNotFoundError, match="reference='nowhere.npz' is not there"):
        check_metrics(["fid"], options("nowhere.npz", inception_file))
    with pytest.raises(ValueError, match="reference=.* holds no images"):
        check_metrics(["fid"], options(tmp_path, inception_file))
    with pytest.raises(FileNotFoundError, match="inception_weights='missing.pth'"):
        check_metrics(["fid"], options(write_images(tmp_path / "real", random_images(2)), "missing.pth"))


def test_weights_that_cannot_be_downloaded_name_file_and_option(tmp_path, monkeypatch, sets):
    def offline(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match=r"weights-inception-.*\.pth could not be downloaded.*inception_weights=FILE"):
        check_metrics(["fid"], MetricOptions(reference=sets[1]))


def test_missing_packages_name_the_extra(monkeypatch, sets):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"torch_fidelity is needed.*diffusers-wadi\[eval\]"):
        check_metrics(["fid"], MetricOptions(reference=sets[1]))


def test_files_that_are_no_images_are_named_and_counted(tmp_path, inception_file):
    real = write_images(tmp_path / "real", random_images(3))
    (real / "notes.txt").write_text("hello")
    (real / ".cache").mkdir()
    for hidden in (".hidden", ".cache/left alone.png"):
        (real / hidden).write_text("by others")
    with pytest.raises(ValueError, match=r"1 of the 4 files .*not images by their names, first 'notes.txt'"):
        check_metrics(["fid"], options(real, inception_file))
    (real / "notes.txt").rename(real / "notes.png")
    with pytest.raises(ValueError, match=r"1 of 4 files are no images that can be read, first .*notes\.png"):
        check_metrics(["fid"], options(real, inception_file))


def test_images_that_break_off_are_named(tmp_path, inception_file, quick):
    made = write_set(tmp_path / "made", random_images(5))
    broken = made / "images" / "00003.png"
    broken.write_bytes(broken.read_bytes()[:120])
    with pytest.raises(ValueError, match=r"00003\.png cannot be read as an image"):
        compute_metrics(made, ["precision_recall"], options(made, inception_file))


def test_nan_images_are_named(tmp_path, inception_file):
    real = write_images(tmp_path / "real", random_images(3))
    pixels = np.zeros((8, 8), np.float32)
    pixels[0, :2] = np.nan
    Image.fromarray(pixels).save(real / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif holds pixels of type float32, 2 of them NaN or infinite"):
        check_metrics(["fid"], options(real, inception_file))


@pytest.mark.parametrize(("metric", "count", "least"), [("fid", 1, 2), ("precision_recall", 3, 4)])
def test_too_few_images_are_refused(tmp_path, inception_file, metric, count, least):
    real = write_images(tmp_path / "real", random_images(5))
    made = write_set(tmp_path / "made", random_images(count))
    with pytest.raises(ValueError, match=rf"made holds {count} image\(s\), and {metric} need at least {least}"):
        check_metrics([metric], options(real, inception_file), made)
    with pytest.raises(ValueError, match=r"made holds"):
        check_metrics([metric], options(made, inception_file), real)


def test_what_numbers_say_little_about_is_told(tmp_path, sets, inception_file, caplog, quick):
    small = write_images(tmp_path / "small", random_images(4, size=32))
    with caplog.at_level(logging.WARNING):
        compute_metrics(sets[0], ["precision_recall"], options(small, inception_file))
    assert "images of 40x40 pixels" in caplog.text and "full rank" not in caplog.text
    caplog.clear()
    made, real = (
        inception.ImageSet(name, [0] * n, None, None, [(8, 8)] * n) for name, n in (("a", 2047), ("b", 2048))
    )
    inception.warn_of_sets(made, real, ["fid"], None)
    assert "2047 images of a: below 2048" in caplog.text and "images of b" not in caplog.text


def test_images_of_different_sizes_are_refused_unless_cropped(tmp_path, sets, inception_file, quick):
    real = write_images(tmp_path / "real", random_images(4))
    Image.new("RGB", (50, 30)).save(real / "wide.png")
    with pytest.raises(ValueError, match=r"different sizes: 0\.png of 40x40 and wide\.png of 50x30.*image_size"):
        check_metrics(["fid"], options(real, inception_file), sets[0])
    fitted = MetricOptions(reference=real, image_size=16, inception_weights=inception_file, device="cpu")
    assert "precision_recall" in compute_metrics(sets[0], ["precision_recall"], fitted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: expected"),
        ('["a list"]', "line 2: expected"),
        ('{"file": "images/00001.png"}', "line 2: expected"),
        ('{"file": "images/00001.png", "prompt": "a", "group": 3}', "A group is a name or null"),
        ('{"file": "../00001.png", "prompt": "a"}', "leaves the folder"),
        ('{"file": "images/00000.png", "prompt": "a"}', "names images/00000.png twice"),
        ('{"file": "images/00007.png", "prompt": "a"}', "1 of the 2 images .* are missing, first 'images/00007.png'"),
        ("", "1 images are not in .*prompts.jsonl, first 'images/00001.png'"),
    ],
)
def test_prompts_that_do_not_match_are_refused(tmp_path, line, message):
    made = write_set(tmp_path / "made", random_images(2))
    first = json.dumps({"file": "images/00000.png", "prompt": "a large red heart on a white background"})
    (made / "prompts.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        check_metrics(["shapes"], folder=made)


def test_prompts_may_hold_any_letter(tmp_path):
    """A line separator inside a prompt does not end the line of the file."""
    made = write_set(tmp_path / "made", random_images(1))
    line = {"file": "images/00000.png", "prompt": "one\u2028two\x85three", "index": 0, "seed": 0, "group": "anime"}
    (made / "prompts.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    opened = open_images(made, prompts=True)
    assert opened.prompts == [line["prompt"]] and opened.groups == ["anime"] and opened.sizes == [(40, 40)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_read_as_rgb(tmp_path, mode):
    gray = Image.new("RGB", (4, 4), (200, 200, 200)).convert(mode)
    gray.save(tmp_path / f"{mode}.tif")
    pixels = np.asarray(read_image(open_images(tmp_path).files[0]))
    assert pixels.shape == (4, 4, 3) and abs(pixels.astype(int) - 200).max() <= 5


def test_sets_without_prompts_are_refused_where_prompts_count(tmp_path):
    images = write_images(tmp_path / "images", random_images(2))
    with pytest.raises(FileNotFoundError, match="has no prompts.jsonl"):
        check_metrics(["shapes"], folder=images)
    (images / "prompts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="prompts.jsonl is empty"):
        check_metrics(["shapes"], folder=images)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        check_metrics(["shapes"], folder=tmp_path / "nowhere")
