import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, PixArtAlphaPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_pixart import pixart_pipeline

from diffusers_wadi import LoRaDConfig, WaDiControlNetPipeline, WaDiPipeline, bundled_checkpoint, cli
from diffusers_wadi._adapter_ops import add_adapter
from diffusers_wadi._images import save_image
from diffusers_wadi.cli import _flags, convert
from diffusers_wadi.cli import generate as generating
from diffusers_wadi.loaders import save_lorad_adapter


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


def test_a_controlnet_checkpoint_takes_a_condition_image(components, base_folder, tmp_path, capsys):
    controlnet = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight)
    pipe = WaDiControlNetPipeline(**components, controlnet=controlnet)
    pipe.save_pretrained(tmp_path / "model")
    condition = Image.new("RGB", (64, 64), "red")
    condition.save(tmp_path / "condition.png")
    command = ["generate", "red", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out.png")]
    image = ["--image", str(tmp_path / "condition.png")]
    assert cli.main([*command, *image]) == 0
    expected = pipe("red", image=condition, generator=torch.Generator().manual_seed(0)).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected))
    capsys.readouterr()
    for wrong, message in (
        (command, "--image FILE"),
        ([*command, "--image", str(tmp_path / "none.png")], "cannot be read"),
        ([*command[:3], str(base_folder), *command[4:], *image], "has no ControlNet"),
    ):
        assert cli.main(wrong) != 0 and message in capsys.readouterr().err


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
    monkeypatch.setattr(generating, "_load", lambda args: pytest.fail("loaded before checking"))
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


def test_freed_memory_goes_back_where_the_c_library_can(monkeypatch, base_folder, adapter_folder, tmp_path):
    calls = []
    monkeypatch.setattr(
        _flags.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given))
    )
    command = ["--no-figures", "-o", str(tmp_path)]
    assert cli.main(["analyze", str(base_folder), str(adapter_folder), *command]) == 0
    assert calls == [(-3, 2**24)]  # M_MMAP_THRESHOLD
    monkeypatch.setattr(_flags.ctypes, "CDLL", lambda name: SimpleNamespace())
    _flags.give_back_freed_memory()


@pytest.mark.parametrize("part", ["_load", "_draw"])
def test_running_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch, part):
    def exhaust(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(generating, "_load", lambda args: (None, "model"))
    monkeypatch.setattr(generating, part, exhaust)
    assert generate("red", "-o", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: CUDA out of memory. Tried") and error.count("\n") == 1
    assert "fewer --num-images" in error


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert _flags.torch_device("cuda:1") == torch.device("cuda:1") and _flags.torch_device("cuda") == torch.device(
        "cuda"
    )
    with pytest.raises(ValueError, match="cuda:9: there are 2 of kind cuda"):
        _flags.torch_device("cuda:9")


def test_an_image_is_whole_or_absent(tmp_path):
    class Broken:
        def save(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("disk full")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save_image(Broken(), tmp_path / "x.png", {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.png", b"old")]


FLAGS = {
    "generate": "--seed --num-images --model --base-model --device --dtype --height --width",
    "fuse": "--output --base-model --weight-name --subfolder --scale --dtype",
    "extract": "--output --rank --energy --subfolder --variant --target-modules --exclude-modules --convolutions "
    "--base-model --dtype --device",
    "demo": "--model --base-model --weight-name --controlnet --device --dtype --port --open",
    "export": "--output --text-encoder --lora --rank --energy --layout --base-model --weight-name --subfolder --scale --dtype",
}


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all(command in said for command in FLAGS)
    for command, flags in FLAGS.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0 and not [flag for flag in flags.split() if flag not in said]
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "x", "--num-images", "0"])
    assert stop.value.code == 2


def test_the_command_line_imports_nothing_slow():
    code = "import sys, diffusers_wadi.cli; assert not {'torch', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "diffusers_wadi.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("diffusers-wadi ")


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def images(pipe, **options):
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"} | options
    return pipe("red", generator=torch.Generator().manual_seed(0), **call).images


def test_fuse_writes_a_folder_for_stock_diffusers(adapter_folder, base_folder, tmp_path, capsys):
    out = tmp_path / "new" / "complete"
    assert run("fuse", adapter_folder, "-o", out) == 0
    assert f"wrote the complete checkpoint {out}" in capsys.readouterr().out
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.fuse_lorad()
    stock = StableDiffusionPipeline.from_pretrained(out)
    assert np.array_equal(images(stock), images(pipe))
    assert not [key for key in stock.unet.state_dict() if "lorad" in key]
    # Over an older one, at another strength, in half precision.
    assert (
        run("fuse", adapter_folder, "-o", out, "--scale", "0.5", "--dtype", "float16", "--base-model", base_folder)
        == 0
    )
    state = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.fuse_lorad(lorad_scale=0.5)
    pipe.unload_lorad_weights()
    assert "Casting directly" not in capsys.readouterr().err
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(state[key], value.half())


def test_fuse_of_a_complete_checkpoint_copies_it(base_folder, tmp_path, capsys):
    assert run("fuse", base_folder, "-o", tmp_path / "copy") == 0
    first, second = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (base_folder, tmp_path / "copy")
    )
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    assert run("fuse", base_folder, "-o", tmp_path / "other", "--scale", "0.5") == 2
    assert "nothing for --scale to scale" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_fuse_takes_pixart_and_export_says_that_it_does_not(tmp_path, capsys):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "complete"
    pipe = pixart_pipeline()
    pipe.save_pretrained(base)
    add_adapter(pipe.transformer, LoRaDConfig(r=2, init_lorad_weights="xavier", target_modules=["to_q"]), "default")
    save_lorad_adapter(pipe.transformer, adapter, component="transformer", base_model_name_or_path=str(base))
    assert run("fuse", adapter, "-o", out) == 0
    fused, plain = (PixArtAlphaPipeline.from_pretrained(folder).transformer.state_dict() for folder in (out, base))
    assert fused.keys() == plain.keys()
    assert any(not torch.equal(fused[name], plain[name]) for name in plain)
    capsys.readouterr()
    assert run("export", adapter, "-o", tmp_path / "one.safetensors") == 2
    assert "WaDiPixArtPipeline" in capsys.readouterr().err


def test_extract_undoes_fuse(adapter_folder, base_folder, tmp_path, capsys):
    assert run("fuse", adapter_folder, "-o", tmp_path / "complete") == 0
    out = tmp_path / "adapter"
    assert run("extract", base_folder, tmp_path / "complete", "-o", out, "--rank", 4) == 0
    said = capsys.readouterr().out
    assert "| layer |" in said and "100.00% of their change explained" in said and "wrote " in said
    assert "names no base model" not in said
    again, pipe = (WaDiPipeline.from_pretrained(folder) for folder in (out, adapter_folder))
    assert np.abs(images(again) - images(pipe)).max() < 1e-3
    layers = len(json.loads((out / "extraction_report.json").read_text())["layers"])
    arguments = ["extract", base_folder / "unet", tmp_path / "complete" / "unet", "-o", out, "--dtype", "float16"]
    assert run(*arguments, "--energy", "0.9", "--base-model", "org/base", "--exclude-modules", "to_q, to_k") == 0
    report = json.loads((out / "extraction_report.json").read_text())
    assert 0 < len(report["layers"]) < layers and {entry["reason"] for entry in report["left_out"]} == {"excluded"}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    file = out / "pytorch_lorad_weights.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    weights = tmp_path / "complete" / "unet" / "diffusion_pytorch_model.safetensors"
    base = base_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert run("extract", base, weights, "-o", tmp_path / "nameless", "--rank", 2, "--target-modules", "to_q") == 0
    assert "it names no base model" in capsys.readouterr().out


def test_export_of_a_checkpoint(adapter_folder, base_folder, tmp_path, capsys):
    out = tmp_path / "new" / "model.safetensors"
    assert run("export", adapter_folder, "-o", out, "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said and "CFG 1" in said
    stock = StableDiffusionPipeline.from_single_file(str(out), config=str(base_folder), local_files_only=True)
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.fuse_lorad()
    assert np.array_equal(images(stock), images(pipe))
    assert run("export", base_folder, "-o", out, "--text-encoder", "sd2", "--dtype", "float16") == 0
    state = load_file(out)
    assert "cond_stage_model.model.token_embedding.weight" in state and {v.dtype for v in state.values()} == {
        torch.float16
    }


def test_export_of_a_lora(adapter_folder, base_folder, tmp_path, capsys):
    assert run("export", adapter_folder, "--lora", "--rank", 100, "--scale", "0.5", "-o", tmp_path / "lora") == 0
    assert "100.00% of their change explained" in capsys.readouterr().out
    stock = StableDiffusionPipeline.from_pretrained(base_folder)
    stock.load_lora_weights(str(tmp_path / "lora"))
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.fuse_lorad(lorad_scale=0.5)
    assert np.abs(images(stock) - images(pipe)).max() < 1e-3
    arguments = ["export", adapter_folder, "--lora", "--energy", "0.5", "--layout", "kohya"]
    assert run(*arguments, "-o", tmp_path / "deep" / "kohya.safetensors") == 0
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "deep" / "kohya.safetensors"))


def layers_beyond_half_a_turn(adapter):
    """Names of the layers that a LoRaD turns by more than pi somewhere."""
    state = load_file(adapter / "pytorch_lorad_weights.safetensors")
    names = {key.rsplit(".", 1)[0] for key in state}
    angles = {name: state[f"{name}.lorad_A"].float() @ state[f"{name}.lorad_B"].float() for name in names}
    return {name.removeprefix("unet.") for name, theta in angles.items() if theta.abs().max() > np.pi}


def test_conversions_of_the_bundled_checkpoint(tmp_path):
    """Whatever its weights are: fuse it, extract it again at its rank, export it both ways."""
    adapter, teacher = bundled_checkpoint(), bundled_checkpoint() / "teacher"
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    assert run("fuse", adapter, "-o", tmp_path / "complete") == 0
    assert (
        run("extract", teacher, tmp_path / "complete", "-o", tmp_path / "adapter", "--rank", rank, "--convolutions")
        == 0
    )
    report = json.loads((tmp_path / "adapter" / "extraction_report.json").read_text())
    assert report["explained"] > 0.9999
    pipes = [WaDiPipeline.from_pretrained(folder) for folder in (adapter, tmp_path / "adapter")]
    for pipe in pipes:
        pipe.fuse_lorad()
        pipe.unload_lorad_weights()
    first, second = (pipe.unet.state_dict() for pipe in pipes)
    off = {key: (first[key] - second[key]).abs().max().item() for key in first}
    beyond = layers_beyond_half_a_turn(
        adapter
    )  # there an angle cannot be told from the one that turns the other way round
    assert len(beyond) < 5 and max(off.values()) <= 5e-3
    assert max(value for key, value in off.items() if key.removesuffix(".weight") not in beyond) <= 1e-4
    assert run("export", adapter, "-o", tmp_path / "one.safetensors") == 0
    assert run("export", adapter, "--lora", "--rank", 8, "-o", tmp_path / "lora") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["extract", "a", "b", "-o", "{tmp}/x"], "pass --rank"),
        (["extract", "a", "b", "-o", "{tmp}/x", "--energy", "2"], "at most 1, got 2.0"),
        (["extract", "{tmp}", "{tmp}", "-o", "{tmp}/x", "--rank", "2"], "no diffusion_pytorch_model.safetensors"),
        (["extract", "{tmp}/no", "{tmp}", "-o", "{tmp}/x", "--rank", "2"], "not a folder here"),
        (["extract", "a", "b", "-o", "{tmp}/file", "--rank", "2"], "it is a file already"),
        (["extract", "a", "b", "-o", "{tmp}/file/x", "--rank", "2"], "cannot write to the folder"),
        (["extract", "a", "b", "-o", "{tmp}/x", "--rank", "2", "--device", "tpu9000"], "no device that torch knows"),
        (["fuse", "{tmp}", "-o", "{tmp}/x"], "neither model_index.json"),
        (["export", "{tmp}", "-o", "{tmp}/x.safetensors"], "neither model_index.json"),
        (["export", "a", "-o", "{tmp}/x"], "expected a file ending in .safetensors, or --lora"),
        (["export", "a", "-o", "{tmp}/x.safetensors", "--rank", "2"], "only --lora takes --rank"),
        (["export", "a", "-o", "{tmp}/x", "--lora"], "pass --rank"),
        (
            ["export", "a", "-o", "{tmp}/x", "--lora", "--rank", "2", "--text-encoder", "sd1"],
            "does not take --text-encoder",
        ),
        (["export", "{base}", "-o", "{tmp}/x", "--lora", "--rank", "2"], "no LoRaD adapter to make a LoRA of"),
    ],
)
def test_user_errors_of_conversions_are_one_line(tmp_path, base_folder, capsys, arguments, message):
    (tmp_path / "file").touch()
    assert run(*(argument.format(tmp=tmp_path, base=base_folder) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: ") and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_running_out_of_memory_in_a_conversion(tmp_path, capsys, monkeypatch):
    def exhaust(args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(convert, "_load", exhaust)
    assert run("fuse", "x", "-o", tmp_path / "y") == 2
    assert "more memory, or --device cpu" in capsys.readouterr().err


def test_analyze_prints_and_writes(base_folder, adapter_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="comes with the extra `analysis`")
    out = tmp_path / "out"
    few = ["--target-modules", "to_q, time_emb_proj"]
    assert cli.main(["analyze", str(base_folder), str(adapter_folder), "--output_dir", str(out), *few]) == 0
    said = capsys.readouterr().out
    assert "| all layers |" in said and "is a rotation in LoRaD's planes" in said and f"to {out}" in said
    written = {path.name for path in out.iterdir()}
    assert written == {"analysis.json", "layers.csv", "overall.csv", "overview.png", "layers.png", "energies.png"}
    (saved,) = json.loads((out / "analysis.json").read_text())
    assert saved["label"] == adapter_folder.name and saved["overall"]["rotation_share"] == pytest.approx(1)


def test_analyze_compares_several(base_folder, adapter_folder, tmp_path, capsys):
    command = ["analyze", str(base_folder), str(adapter_folder), str(base_folder / "unet"), "--names", "ours", "base"]
    out = ["-o", str(tmp_path), "--no-figures", "--no-energies", "--layers", "linear", "--convention", "row"]
    assert cli.main([*command, *out]) == 0
    saved = json.loads((tmp_path / "analysis.json").read_text())
    assert [one["label"] for one in saved] == ["ours", "base"] and {one["convention"] for one in saved} == {"row"}
    assert saved[0]["overall"]["direction_mean"] > 0.01 and saved[1]["overall"]["direction_mean"] == 0
    assert {len(layer["shape"]) for layer in saved[0]["layers"]} == {2}
    assert not list(tmp_path.glob("*.png")) and "compared in" in capsys.readouterr().out


def test_swap_writes_a_pipeline_that_runs(base_folder, adapter_folder, tmp_path, capsys):
    out = tmp_path / "swapped"
    assert cli.main(["swap", str(base_folder), str(adapter_folder), "-o", str(out), "--take", "norm"]) == 0
    assert f"wrote {out}: {base_folder} with the norms of {adapter_folder}" in capsys.readouterr().out
    base, swapped = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (base_folder, out))
    assert max((swapped[key] - base[key]).abs().max() for key in base) < 1e-6  # a rotation has no norms to take
    StableDiffusionPipeline.from_pretrained(out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["analyze", "{base}", "{tmp}/nothing"], "not a folder here"),
        (["analyze", "{base}", "{tmp}/empty"], "no diffusion_pytorch_model.safetensors"),
        (["analyze", "{base}", "{base}", "--names", "a", "b"], "expected 1 different names"),
        (["analyze", "{base}", "{base}", "-o", "{tmp}/file/x"], "cannot write to the folder"),
        (["analyze", "{base}", "{base}", "--target-modules", "nothing"], "none of the"),
        (["swap", "{base}", "{base}", "-o", "{tmp}"], "is not empty"),
    ],
)
def test_what_analyze_and_swap_refuse(base_folder, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert cli.main([argument.format(base=base_folder, tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wadi: error: ") and message in error and error.count("\n") == 1


def test_figures_without_matplotlib_are_refused_before_the_work(base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("diffusers_wadi.analysis.analyze_weights", lambda *a, **k: pytest.fail("worked first"))
    assert cli.main(["analyze", str(base_folder), str(base_folder), "-o", str(tmp_path)]) == 2
    assert 'pip install "diffusers-wadi[analysis]"' in capsys.readouterr().err
