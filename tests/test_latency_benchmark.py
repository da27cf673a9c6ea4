"""`benchmarks/latency.py` and `memory.py` on a tiny pipeline: every way draws, parts add up, files are written."""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import add_random_adapter

from diffusers_wadi import WaDiPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fast_paths
import latency
import memory

sys.path.pop(0)

CPU = torch.device("cpu")


@pytest.fixture
def pipe(components, monkeypatch):
    add_random_adapter(components["unet"])
    pipe = WaDiPipeline(**components)
    for script in (latency, memory):
        monkeypatch.setattr(script, "load", lambda *args: pipe)
    monkeypatch.setattr(fast_paths, "tiny_vae", small_decoder)
    return pipe


def small_decoder():
    from diffusers import AutoencoderTiny

    sizes = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    return AutoencoderTiny(**sizes, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()


def arguments(folder, **others):
    given = {"size": "shapes", "device": "cpu", "ways": None, "batches": [1, 2], "repeats": 2, "warmup": 0, "judge": 2}
    return argparse.Namespace(**given | {"threads": None, "compile": False, "output_dir": str(folder)} | others)


SOME = [
    "stock, 25 steps with guidance",
    "stock, 1 step, fused",
    "plain script, fused",
    "fuse + prompt cache",
    "fuse + tiny VAE",
    "optimize()",
]


def test_without_being_asked_nothing_is_compiled_on_a_cpu(tmp_path):
    names = {asked: list(latency.chosen_ways(arguments(tmp_path, compile=asked))) for asked in (False, True)}
    assert len(names[False]) == 14 and set(SOME) < set(names[False])
    assert set(names[True]) - set(names[False]) == {"fuse + regional compile", "fuse + full compile"}


def test_ways_are_measured_and_judged(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "rates", lambda *args: {"operations_per_second": 1e9, "bytes_per_second": 1e9})
    some = {name: way for name, way in fast_paths.ways("shapes").items() if name in SOME}
    monkeypatch.setattr(latency, "chosen_ways", lambda args: some)
    table = latency.run(arguments(tmp_path, batches=[2]))
    found = json.loads((tmp_path / "latency.json").read_text())
    assert table == (tmp_path / "latency.md").read_text().rstrip("\n") and found["floors"].keys() == {"2"}
    for rows in found["batches"].values():
        assert list(rows) == SOME and all(f"| {name} |" in table for name in rows)
        for name, row in rows.items():
            assert row["denoiser"] > 0 and row["decode"] > 0 and row["rest"] > 0, name
            assert row["q1"] <= row["total"] <= row["q3"]
            assert (row["text"] == 0) == ("cache" in name), name
        assert rows["stock, 25 steps with guidance"]["denoiser"] > 5 * rows["optimize()"]["denoiser"]
    same = found["judge"]
    assert same.keys() == set(SOME) - {SOME[0], SOME[-2]}
    assert all(row["least_cosine"] > 0.999 for row in same.values()), same


def test_the_floor_counts_the_operations_of_each_part(pipe):
    merged = fast_paths.with_adapter_merged(pipe)
    counts, twice = (latency.operations(merged, batch, CPU) for batch in (2, 4))
    assert all(counts[part] > 1e5 and twice[part] == 2 * counts[part] for part in latency.PARTS)
    hidden, layers = 16, pipe.text_encoder.config.num_hidden_layers
    per_token = 2 * layers * (4 * hidden**2 + 2 * hidden * 32)  # 2 per multiplication; projections and MLP
    tokens = 2 * pipe.tokenizer.model_max_length
    assert per_token * tokens <= counts["text"] < 1.6 * per_token * tokens  # the rest is attention


def test_rates_are_those_of_a_product_and_a_copy(monkeypatch):
    monkeypatch.setattr(latency, "best", lambda work, device: work() is None or 0.5)
    found = latency.rates(CPU, torch.float32)
    assert found == {"operations_per_second": 4 * 1024**3, "bytes_per_second": 4 * 2**27}


def test_the_plain_script_draws_what_the_pipeline_draws(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    script = fast_paths.PlainScript(fast_paths.with_adapter_merged(pipe))
    ours = script(["red", "blue"], generators)
    theirs = pipe(["red", "blue"], generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]).images
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(ours, theirs))


def test_memory_of_every_kind_of_row(pipe, tmp_path, monkeypatch):
    args = arguments(tmp_path, work_dir=str(tmp_path / "work"), rows=None, repeats=1, batches=[2])
    pipe.save_pretrained(tmp_path / "work" / "fused")
    monkeypatch.setattr(memory, "tiny_vae", small_decoder)
    monkeypatch.setattr(memory, "give_back", lambda: None)  # slow beside the other tests' objects
    kinds = ["stock, fused checkpoint, 1", "tiny"]
    names = [next(name for name in memory.ROWS if kind in name) for kind in kinds]
    args.rows, asked = names, []

    def apart(name, flags):
        asked.append((name, flags))
        monkeypatch.setattr(memory, "load", lambda *args: copy.deepcopy(pipe))
        return memory.measure(name, args)

    table = memory.run(args, apart)
    found = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert list(found) == names and [name for name, _ in asked] == names
    assert all(row.keys() == {"loading_peak", "loaded", "batch_2_peak"} for row in found.values())
    assert table == (tmp_path / "memory.md").read_text().rstrip("\n")
    assert asked[0][1][:2] == ["--size", "shapes"] and "--batches" in asked[0][1]


def test_peaks_are_seen():
    numbers: dict = {}
    with memory.peak(CPU, numbers, "block"):
        held = torch.ones(30_000_000)  # 120 MB, longer than the watcher sleeps
        for _ in range(6):
            held.add_(1)
        del held
    assert numbers["block"] > 110e6
