"""`wadi evaluate`, from flags to the table."""

import argparse
import json
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_wadi import cli
from diffusers_wadi.evaluation import PRESETS, UNSUPPORTED, MetricOptions, load_pipeline
from diffusers_wadi.shapes import heldout_captions


@pytest.fixture
def evaluate(capsys):
    """Run the command; returns the exit code and what it said on both streams."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.main(["evaluate", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("red\nblue\na red r\n")
    return path


def images(folder):
    return sorted(path.name for path in (folder / "images").iterdir())


def test_the_bundled_student_on_shapes(evaluate, tmp_path):
    out = tmp_path / "new" / "out"
    code, said, _ = evaluate("-o", out, "--num-prompts", 6, "--device", "cpu", "--latency", "--latency_repeats", 2)
    assert code == 0 and "loaded Bundled student (float32 on cpu)" in said and f"6 images are in {out}" in said
    assert images(out) == [f"{i:05d}.png" for i in range(6)]
    lines = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == heldout_captions(6)
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["name"] == "Bundled student" and 0.5 < row["metrics"]["shapes"]["attributes"] <= 1
    assert row["settings"] == json.loads((out / "settings.json").read_text())
    assert row["settings"]["model"] == "bundled stable-diffusion" and row["settings"]["preset"] == "shapes"
    assert row["latency"]["batches"]["1"]["calls"] == 2
    table = (out / "results.md").read_text()
    assert "| Bundled student | 1 | 6 |" in table and table.strip() in said and (out / "results.csv").is_file()


def test_again_keeps_images_and_what_was_measured(evaluate, adapter_folder, texts, tmp_path, monkeypatch):
    command = (adapter_folder, "--prompts", texts, "-o", tmp_path / "out", "--device", "cpu", "--batch_size", 2)
    assert evaluate(*command, "--latency", "--latency_repeats", 2)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    for module in ("diffusers_wadi.evaluation", "diffusers_wadi.evaluation.metrics"):
        monkeypatch.setattr(f"{module}.compute_metrics", lambda folder, metrics, options: {metrics[0]: 0.25})
        monkeypatch.setattr(f"{module}.check_metrics", lambda *_: None)
    assert evaluate(*command, "--metrics", "fid", "--image_size", 256, "--name", "mine")[0] == 0
    assert evaluate(*command, "--metrics", "clip_score", "--clip_model", "ViT-B-32")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["name"] == "mine" and row["metrics"] == {"fid": 0.25, "clip_score": 0.25}
    assert row["latency"] is not None
    assert row["options"] == {"fid": {"image_size": 256}, "clip_score": {"clip_model": "ViT-B-32"}}
    code, _, error = evaluate(*command, "--seed", 1)
    assert code == 2 and "images of other settings: seed was 0 and is 1" in error


def test_a_complete_pipeline_wants_its_steps(evaluate, base_folder, texts, tmp_path):
    command = (base_folder, "--prompts", texts, "--num_prompts", 2, "-o", tmp_path / "out", "--device", "cpu")
    code, _, error = evaluate(*command, "--num_inference_steps", 2)
    assert code == 2 and "give --num_inference_steps and --guidance_scale" in error
    steps = ("--num_inference_steps", 2, "--guidance_scale", 3, "--seed", 4, "--resolution", 72)
    assert evaluate(*command, *steps)[0] == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    size = {"height": 72, "width": 72}
    assert settings["arguments"] == {"num_inference_steps": 2, "guidance_scale": 3.0} | size
    assert settings["model"] == str(base_folder) and settings["preset"] is None
    first = json.loads((tmp_path / "out" / "prompts.jsonl").read_text().splitlines()[0])
    pipe = load_pipeline(base_folder)
    generator = torch.Generator().manual_seed(first["seed"])
    expected = pipe(first["prompt"], num_inference_steps=2, guidance_scale=3.0, generator=generator, **size).images[0]
    drawn = np.asarray(Image.open(tmp_path / "out" / first["file"]), float)
    assert abs(drawn - np.asarray(expected, float)).max() <= 1


def test_images_that_are_there(evaluate, tmp_path):
    """Those of a run get the table beside them; among other people's nothing is written."""
    assert evaluate("-o", tmp_path / "run", "--num_prompts", 3, "--device", "cpu", "--metrics")[0] == 0
    assert not (tmp_path / "run" / "results.json").exists()
    code, said, _ = evaluate("--images", tmp_path / "run", "--metrics", "shapes")
    assert code == 0 and "| run | 1 | 3 |" in said
    assert "shapes" in json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]["metrics"]
    foreign = shutil.copytree(tmp_path / "run", tmp_path / "foreign")
    (foreign / "settings.json").unlink()
    (foreign / "results.json").unlink()
    there = sorted(foreign.rglob("*"))
    assert evaluate("--images", foreign, "--metrics", "shapes")[0] == 0 and sorted(foreign.rglob("*")) == there
    assert evaluate("--images", foreign, "--metrics", "shapes", "-o", tmp_path / "table", "--name", "other")[0] == 0
    code, said, _ = evaluate("--collect", tmp_path / "run", tmp_path / "table", "-o", tmp_path / "both")
    assert code == 0 and said.index("| run |") < said.index("| other |")
    assert len(json.loads((tmp_path / "both" / "results.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "give --output_dir"),
        (("-o", "{out}", "--metrics", "fid"), "reference"),
        (("-o", "{out}", "--metrics", "beauty"), "no metric 'beauty'"),
        (("-o", "{out}", "--prompts", "{texts}", "--metrics", "shapes"), "'red' is not a Shapes World caption"),
        (("-o", "{out}", "--prompts", "nowhere.json"), "'nowhere.json': no such file or folder"),
        (("-o", "{out}", "--preset", "tiue"), "'tiue' is not supported: .*a UNet of their own code"),
        (("sd-turbo", "-o", "{out}"), "sd-turbo is no model but a preset: --preset sd-turbo"),
        (("m", "-o", "{out}", "--preset_weights", "w"), "--preset_weights goes with --preset"),
        (("-o", "{out}", "--preset", "hyper-sd", "--base_model", "b"), "give the pipeline's folder as MODEL"),
        (("-o", "{out}", "--latency", "--latency_repeats", "1"), "--latency_repeats 1: expected at least 2"),
        (("--images", "{out}"), "--images needs --metrics"),
        (("m", "--images", "{out}", "--latency", "--metrics", "shapes"), "so MODEL, --latency would have no effect"),
        (("--collect", "{out}"), "no results.json"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_drawn(evaluate, texts, tmp_path, monkeypatch, arguments, said):
    from diffusers_wadi.cli import evaluate as module

    def load(*_):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(module._Model, "load", load)
    code, _, error = evaluate(*(text.format(out=tmp_path / "out", texts=texts) for text in arguments))
    assert code == 2 and re.search(said, error), error


def test_every_option_of_the_metrics_has_a_flag(tmp_path):
    from diffusers_wadi.cli import _evaluate_flags, evaluate

    wanted = {
        "reference": str(tmp_path),
        "image_size": 256,
        "inception_weights": "i.pth",
        "clip_model": "ViT-B-32",
        "clip_pretrained": "openai",
        "clip_weights": "c.pt",
        "hps_version": "v2.1",
        "hps_weights": "h.pt",
        "device": "cpu",
    }
    parser = argparse.ArgumentParser()
    _evaluate_flags.add_flags(parser)
    flags = [part for name, value in wanted.items() for part in (f"--{name}", str(value))]
    metrics, options = evaluate._metrics(parser.parse_args(["--metrics", "fid", *flags]))
    assert metrics == ["fid"] and {name: getattr(options, name) for name in wanted} == wanted
    assert {field.name for field in fields(MetricOptions)} - wanted.keys() == {"batch_size", "num_workers"}


def test_presets_are_listed(evaluate):
    code, said, _ = evaluate("--list_presets")
    assert code == 0 and all(f"\n{name} " in f"\n{said}" for name in [*PRESETS, *UNSUPPORTED])


def test_help_shows_one_spelling_of_each_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert (
        "--num_inference_steps" in said and "--num-inference-steps" not in said and "-o DIR, --output_dir DIR" in said
    )
