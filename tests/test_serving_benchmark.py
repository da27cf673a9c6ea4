"""`benchmarks/serving.py`: every way of serving gives the same images, and every number of the table is measured."""

import json
import sys
from pathlib import Path

import numpy as np

from diffusers_wadi import WaDiPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import serving

sys.path.pop(0)


def test_all_ways_draw_the_same(adapter_folder):
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.set_progress_bar_config(disable=True)
    ways = serving.ways_to_serve(pipe, [1, 4], [0.01])
    assert list(ways) == ["one at a time", "batches of 1", "batches of 4", "batches of 1, max_wait 10 ms"]
    drawn = {}
    for name, make in ways.items():
        server = make()
        drawn[name] = {}
        ask = lambda prompt, seed: drawn[name].update({seed: np.asarray(server.ask(prompt, seed), dtype=int)})  # noqa: B023, E731
        seconds, latencies = serving.serve(ask, ["red", "blue", "a red"] * 3, clients=3)
        server.close()
        assert sorted(drawn[name]) == list(range(9)) and len(latencies) == 9 and max(latencies) <= seconds
    for seed, image in drawn["one at a time"].items():
        assert all(np.abs(image - others[seed]).max() <= 1 for others in drawn.values())


def test_what_is_written(adapter_folder, tmp_path, capsys):
    small = "--device cpu --clients 1 2 --batch_sizes 1 2 --waits 0.01 --requests 4 --images 3 --rounds 1".split()
    serving.main(["--model", str(adapter_folder), *small, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "serving.json").read_text())
    assert len(result["serving"]) == 8 and len(result["folder"]) == 2
    for row in result["serving"]:
        assert 0 < row["p50_s"] <= row["p95_s"] <= row["p99_s"] and row["requests_per_s"] > 0
    assert [row["against_one_at_a_time"] for row in result["serving"]][::4] == [1, 1]
    assert all(row["ms_per_image"] > 0 < row["of_it_png_ms"] for row in result["folder"])
    text = (tmp_path / "serving.md").read_text()
    assert text in capsys.readouterr().out and "one at a time | " in text and result["machine"]["date"] in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["serving.json", "serving.md"]
