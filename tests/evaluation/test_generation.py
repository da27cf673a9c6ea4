"""Generated folders: the same images however they are made, and taken up again where they stopped."""

import functools
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from diffusers import StableDiffusionPipeline
from killable_run import forkserver
from PIL import Image

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.evaluation import Prompt, PromptSet, generate_images, image_seed
from diffusers_wadi.evaluation.folders import whole_image

PROMPTS = PromptSet(
    "test", tuple(Prompt(i, text, "ab"[i % 2]) for i, text in enumerate("red|blue|a red|a blue|r e".split("|")))
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(adapter_folder):
    return quiet(WaDiPipeline.from_pretrained(adapter_folder))


def generate(pipe, folder, prompts=PROMPTS, **options):
    return generate_images(pipe, prompts, folder, **{"num_inference_steps": 1, "guidance_scale": 1.0} | options)


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(Path(folder, "images").glob("*"))}


def assert_same(first, second):
    """The same files, and pixels but for one level, which rounding of another batch size may cost."""
    first, second = pixels(first), pixels(second)
    assert list(first) == list(second)
    assert all(abs(first[name] - second[name]).max() <= 1 for name in first)


def test_the_folder_says_what_it_holds(pipe, tmp_path):
    folder = generate(
        pipe, tmp_path / "out", images_per_prompt=2, seed=1, settings={"model": "tiny"}, call={"eta": 0.5}
    )
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert lines[:2] == [
        {"file": "images/00000.png", "index": 0, "prompt": "red", "seed": image_seed(1, 0), "group": "a"},
        {"file": "images/00000-1.png", "index": 0, "prompt": "red", "seed": image_seed(1, 0, 1), "group": "a"},
    ]
    assert {line["file"] for line in lines} == {f"images/{name}" for name in pixels(folder)} and len(lines) == 10
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model"] == "tiny" and settings["scheduler"]["class"] == "DDIMScheduler"
    assert settings["arguments"] == {"eta": 0.5, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert settings["prompts"] == {"source": "test", "number": 5, "digest": PROMPTS.digest}
    assert settings["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_images_are_those_of_the_pipeline(pipe, tmp_path):
    drawn = pixels(generate(pipe, tmp_path / "out", seed=2))
    for prompt in PROMPTS:
        generator = torch.Generator().manual_seed(image_seed(2, prompt.index))
        image = pipe(prompt.text, generator=generator).images[0]
        assert np.array_equal(drawn[f"{prompt.index:05d}.png"], np.asarray(image))


def test_any_batch_size_and_any_subset_gives_the_same(base_folder, tmp_path):
    """With three steps and an ancestral scheduler, which draws noise at every step."""
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = quiet(StableDiffusionPipeline.from_pretrained(base_folder))
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    one = generate(pipe, tmp_path / "one", **options)
    assert_same(one, generate(pipe, tmp_path / "five", batch_size=5, **options))
    subset = PromptSet("part", PROMPTS.prompts[1::2])
    part, whole = pixels(generate(pipe, tmp_path / "part", subset, batch_size=2, **options)), pixels(one)
    assert list(part) == ["00001.png", "00003.png"] and all(abs(part[n] - whole[n]).max() <= 1 for n in part)
    other = pixels(generate(pipe, tmp_path / "other", seed=1, **options))
    assert all(abs(other[name] - whole[name]).max() > 1 for name in whole)


def test_seeds_of_a_set_are_all_different():
    seeds = {image_seed(seed, index) for seed in range(5) for index in range(40_000)}
    assert len(seeds) == 5 * 40_000 and max(seeds) < 2**32
    assert image_seed(0, 12) == 12 and image_seed(3, 5, number=2) == image_seed(5, 5)


class Stopped(Exception):
    pass


def recording(drawn, limit=None):
    """The pipeline's call, which notes its prompts and stops after so many calls."""
    draw = WaDiPipeline.__call__

    @functools.wraps(draw)
    def call(self, prompt, **options):
        if len(drawn) == limit:
            raise Stopped
        drawn.append(prompt)
        return draw(self, prompt, **options)

    return call


def test_a_run_that_was_stopped_goes_on(pipe, tmp_path, monkeypatch):
    whole = generate(pipe, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(WaDiPipeline, "__call__", recording([], limit=2))
        generate(pipe, tmp_path / "out")
    images = tmp_path / "out" / "images"
    assert sorted(os.listdir(images)) == ["00000.png", "00001.png"]
    kept = images / "00000.png"
    before = kept.stat().st_mtime_ns
    (images / "00001.png").write_bytes((images / "00001.png").read_bytes()[:-5])  # cut off, as a full disk leaves it
    (images / ".00002-x.png").write_bytes(b"half")  # of a process that was killed while it wrote
    assert whole_image(kept) and not whole_image(images / "00001.png")
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(WaDiPipeline, "__call__", recording(drawn))
        assert_same(whole, generate(pipe, tmp_path / "out"))
    assert drawn == [[text] for text in PROMPTS.texts[1:]]
    assert kept.stat().st_mtime_ns == before and len(os.listdir(images)) == 5


def test_another_setting_is_refused_and_named(pipe, tmp_path):
    generate(pipe, tmp_path / "out", settings={"model": "tiny"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    subset = PromptSet("part", PROMPTS.prompts[:2])
    for said, options in {
        "model was 'tiny' and is 'other'": {"settings": {"model": "other"}},
        "seed was 0 and is 1": {"seed": 1, "settings": {"model": "tiny"}},
        "arguments.num_inference_steps was 1 and is 2": {"num_inference_steps": 2},
        "arguments.eta was None and is 0.5": {"call": {"eta": 0.5}},
        "prompts.number was 5 and is 2; prompts.digest was": {"prompts": subset},
    }.items():
        with pytest.raises(ValueError, match=f"holds images of other settings: .*{said}.*Give another output_dir"):
            generate(pipe, tmp_path / "out", **options)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pipe.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(
        ValueError, match="settings: scheduler.steps_offset was 1 and is 0; model was 'tiny' and is None. Give"
    ):
        generate(pipe, tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json is missing"):
        generate(pipe, tmp_path / "out")


def test_without_images_any_settings_will_do(pipe, tmp_path):
    """As after a first run that failed, such as for a size that the pipeline refuses."""
    with pytest.raises(ValueError, match="divisible by 8"):
        generate(pipe, tmp_path / "out", resolution=60)
    settings = json.loads((generate(pipe, tmp_path / "out", resolution=72) / "settings.json").read_text())
    assert settings["arguments"]["height"] == settings["arguments"]["width"] == 72
    assert Image.open(tmp_path / "out" / "images" / "00000.png").size == (72, 72)


def test_other_versions_are_not_refused(pipe, tmp_path):
    path = generate(pipe, tmp_path / "out") / "settings.json"
    path.write_text(path.read_text().replace(torch.__version__.split("+")[0], "0.0"))
    generate(pipe, tmp_path / "out")


def test_images_that_are_not_finite(pipe, tmp_path):
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="prompt 0 \\('red'\\) is not finite.*float32"):
        generate(pipe, tmp_path / "out")
    assert pixels(tmp_path / "out") == {}


def test_a_pipeline_of_another_kind(base_folder, tmp_path):
    from diffusers import StableDiffusionImageVariationPipeline

    pipe = StableDiffusionImageVariationPipeline.__new__(StableDiffusionImageVariationPipeline)
    with pytest.raises(ValueError, match="StableDiffusionImageVariationPipeline takes no prompt.*text-to-image"):
        generate_images(pipe, PROMPTS, tmp_path / "out", 1, 1.0)
    assert not (tmp_path / "out").exists()


def worker(rank: int, port: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    pipe = quiet(WaDiPipeline.from_pretrained(model))
    made: list[list[str]] = []
    WaDiPipeline.__call__ = recording(made)
    generate(pipe, folder, batch_size=2)
    there = len(list(Path(folder, "images").glob("*.png")))  # on every process when all are done
    Path(folder, f"made-{rank}.json").write_text(json.dumps([sum(made, []), there]))
    with pytest.raises(ValueError, match="seed was 0 and is 1"):  # on both, and neither waits for the other
        generate(pipe, folder, seed=1)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_set_of_one(pipe, adapter_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forkserver()  # which has imported everything
    arguments = (port, str(tmp_path / "two"), str(adapter_folder))
    mp.start_processes(worker, arguments, nprocs=2, start_method="forkserver")
    made = [json.loads((tmp_path / "two" / f"made-{rank}.json").read_text()) for rank in (0, 1)]
    assert made == [[PROMPTS.texts[0::2], 5], [PROMPTS.texts[1::2], 5]]
    one = generate(pipe, tmp_path / "one")
    assert_same(one, tmp_path / "two")
    for name in ("prompts.jsonl", "settings.json"):
        assert (one / name).read_text() == (tmp_path / "two" / name).read_text()
