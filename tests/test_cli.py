import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_wadi import WaDiPipeline, cli


def generate(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def test_one_image_equals_the_pipeline(adapter_folder, tmp_path, capsys):
    out = tmp_path / "new folder" / "out.png"
    assert generate("red blue", "-o", out, "--seed", 7, "--model", adapter_folder, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert f"loaded {adapter_folder} (float32 on cpu)" in said and f"wrote {out} (seed 7)" in said
    assert "drew 1 of 'red blue' in" in said
    image = Image.open(out)
    assert (
        image.text["prompt"] == "red blue" and image.text["seed"] == "7" and str(adapter_folder) in image.text["model"]
    )
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    expected = pipe("red blue", generator=torch.Generator().manual_seed(7)).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_several_prompts_and_images_count_seeds_up(adapter_folder, base_folder, tmp_path):
    options = ("--seed", 3, "--model", adapter_folder, "--device", "cpu", "--base-model", base_folder)
    assert generate("red", "blue", "-o", tmp_path / "x.png", "--num-images", 2, *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x-{i}.png" for i in range(4)]
    assert generate("blue", "-o", f"{tmp_path}/folder/", *options, "--seed", 6) == 0
    again = Image.open(tmp_path / "folder" / "wadi-0.png")
    fourth = Image.open(tmp_path / "x-3.png")
    assert again.text["seed"] == fourth.text["seed"] == "6"
    assert np.abs(np.asarray(again, float) - np.asarray(fourth, float)).max() <= 1  # a batch may round differently


def test_size_and_dtype(adapter_folder, tmp_path, capsys):
    options = ("--model", adapter_folder, "--device", "cpu", "--dtype", "bfloat16", "--height", 72, "--width", 64)
    assert generate("red", "-o", tmp_path / "x.jpg", *options) == 0
    assert Image.open(tmp_path / "x.jpg").size == (64, 72)
    said = capsys.readouterr().out
    assert "bfloat16" in said and "(seed 0)" in said  # the same image each time, if no seed is given


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-o", "{tmp}/file/x.png"], "cannot write to the folder"),
        (["-o", "{tmp}/x.xyz"], "expected a file ending in .png"),
        (["--height", "60", "--width", "64"], "multiples of 8, got 60 and 64"),
        (["--height", "64"], "give both or neither"),
        (["--seed", str(2**64)], "leaves the range"),
        (["--seed", str(2**64 - 1), "--num-images", "2"], "with 2 images leaves the range"),
    ],
)
def test_a_bad_request_is_refused_before_loading(tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("loaded before checking"))
    assert generate("red", *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{tmp}/nothing"], "not a folder here"),
        (["--device", "tpu9000"], "no device that torch knows"),
        (["--model", "{tmp}"], "neither model_index.json"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, arguments, message):
    assert generate("red", "-o", tmp_path / "x.png", *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["_load", "_draw"])
def test_running_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch, part):
    def exhaust(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(cli, "_load", lambda args: (None, "model"))
    monkeypatch.setattr(cli, part, exhaust)
    assert generate("red", "-o", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: CUDA out of memory. Tried") and error.count("\n") == 1
    assert "fewer --num-images" in error


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert cli._device("cuda:1") == torch.device("cuda:1") and cli._device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="cuda:9: there are 2 of kind cuda"):
        cli._device("cuda:9")


def test_an_image_is_whole_or_absent(tmp_path):
    class Broken:
        def save(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        cli._save(Broken(), tmp_path / "x.png", {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"old")]


def test_help_names_every_flag(capsys):
    for arguments in ([], ["generate"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--help"])
        assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--seed", "--num-images", "--model", "--base-model", "--device", "--dtype", "--height", "--width"):
        assert flag in said
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "x", "--num-images", "0"])
    assert stop.value.code == 2
