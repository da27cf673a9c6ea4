"""The table of results: what was measured, and the paper's numbers that are told apart from it."""

import csv
import json

import pytest

from diffusers_wadi.evaluation.paper_numbers import TABLE_1
from diffusers_wadi.evaluation.presets import PRESETS
from diffusers_wadi.evaluation.table import results_table, write_results

LATENCY = {
    "device": "a device",
    "dtype": "float16",
    "batches": {"1": {"median_s": 0.1104, "q1_s": 0.1, "q3_s": 0.12, "images_per_s": 9.06, "calls": 20}},
}
OURS = {
    "name": "WaDi, SD 1.5",
    "metrics": {
        "fid": 10.9149,
        "precision_recall": {"precision": 0.6181, "recall": 0.4712},
        "clip_score": 0.31249,
        "hpsv2": {"mean": 27.1234, "styles": {"anime": 27.5, "photo": 26.75}},
    },
    "latency": LATENCY,
    "settings": {
        "arguments": {"num_inference_steps": 1},
        "prompts": {"source": "captions_val2014", "number": 15000},
        "images_per_prompt": 2,
        "preset": "wadi-sd15",
    },
}
SHAPES = {
    "name": "Bundled student",
    "metrics": {"fid": 3.0, "shapes": {"attributes": 0.9876, "captions": 0.95, "by_attribute": {"colour": 1.0}}},
}


COCO = {"prompts": {"source": "captions_val2017", "number": 5000}}


def cells(text):
    """Rows of a Markdown table, by the first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head = rows[0]
    assert all(len(row) == len(head) for row in rows)
    return {row[0]: dict(zip(head, row)) for row in rows[2:]}


def test_the_papers_row_of_the_same_weights_follows_ours():
    rows = cells(results_table([OURS, {"name": "another", "metrics": {"fid": 20.0}}]))
    names = list(rows)
    assert names[:3] == ["WaDi, SD 1.5", "*WaDi, SD 1.5, quoted*", "another"]
    assert len(names) == 2 + len(TABLE_1) and all("quoted" in name for name in names[3:])
    ours, quoted = rows[names[0]], rows[names[1]]
    assert [
        quoted[name] for name in ("steps", "FID ↓", "CLIP ↑", "precision ↑", "recall ↑")
    ] == "1 10.79 0.31 0.62 0.48".split()
    assert [ours[name] for name in ("FID ↓", "CLIP ↑", "precision ↑", "recall ↑")] == "10.91 0.312 0.618 0.471".split()
    assert ours["images"] == "30,000" and ours["HPSv2 ↑"] == "27.12" and ours["HPSv2, photo ↑"] == "26.75"
    assert ours["seconds, batch 1 ↓"] == "0.11 (0.1 to 0.12)" and ours["device"] == "a device"
    assert quoted["seconds, batch 1 ↓"] == "0.11" and quoted["device"] == "A40"
    assert rows["*UFOGen, SD 1.5, quoted*"]["CLIP ↑"] == "" and quoted["HPSv2 ↑"] == ""
    assert rows["*DMD2, SD 1.5, quoted, reproduced there*"]["FID ↓"] == "12.96"


def test_a_teacher_is_that_of_the_paper_only_with_its_guidance():
    for guidance, following in ((3.0, "*SD 1.5 (cfg 3.0), quoted*"), (7.5, "second")):
        arguments = {"num_inference_steps": 25, "guidance_scale": guidance}
        row = {
            "name": "teacher",
            "metrics": {"fid": 9.0},
            "settings": COCO | {"preset": "sd15-25", "arguments": arguments},
        }
        assert list(cells(results_table([row, {"name": "second"}])))[1] == following


def test_the_source_of_quoted_numbers_is_told():
    text = results_table([OURS])
    assert "quoted, not measured here: WaDi (arXiv 2603.08258), Table 1" in text and "COCO 2014" in text
    assert "quoted" not in results_table([OURS], quoted=False)
    assert cells(results_table([{"name": "no metrics"}], quoted=True))["*WaDi, SD 2.1, quoted*"]["FID ↓"] == "12.34"
    assert "seconds" not in results_table([{"name": "not timed"}], quoted=True).splitlines()[0]


@pytest.mark.parametrize(
    "row",
    [
        SHAPES,
        {"name": "its table has no HPSv2", "metrics": {"hpsv2": {"mean": 1.0, "styles": {}}}, "settings": COCO},
        {"name": "other prompts", "metrics": {"fid": 1.0}, "settings": {"prompts": {"source": "my prompts"}}},
        {"name": "unknown prompts", "metrics": {"fid": 1.0}, "settings": None},
    ],
)
def test_nothing_is_quoted_beside_what_the_paper_did_not_measure(row):
    assert "quoted" not in results_table([row])


def test_shapes_and_latency_alone_have_their_columns_only():
    rows = cells(results_table([SHAPES, {"name": "timed", "latency": LATENCY}]))
    assert list(rows["timed"]) == [
        "model", "FID ↓", "attributes right ↑", "captions wholly right ↑", "seconds, batch 1 ↓", "device"
    ]  # fmt: skip
    assert rows["Bundled student"]["attributes right ↑"] == "98.8%"


def test_files_hold_everything(tmp_path):
    files = write_results([OURS, SHAPES], tmp_path / "out")
    assert [file.name for file in files] == ["results.json", "results.csv", "results.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    whole = json.loads(files[0].read_text())
    assert whole["rows"] == [OURS, SHAPES] and len(whole["quoted"]) == len(TABLE_1)
    lines = list(csv.DictReader(files[1].open(encoding="utf-8")))
    assert [line["source"] for line in lines[:2]] == ["measured", "quoted: WaDi (arXiv 2603.08258), Table 1"]
    assert float(lines[0]["fid"]) == 10.9149 and lines[0]["hpsv2_anime"] == "27.5" and lines[0]["images"] == "30000"
    assert lines[0]["batch_1_q3_s"] == "0.12" and lines[1]["device"] == "A40" and lines[4]["device"] == ""
    assert next(line for line in lines if line["name"] == "Bundled student")["attributes_colour"] == "1.0"
    assert files[2].read_text(encoding="utf-8") == results_table([OURS, SHAPES])


def test_bad_rows_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_results([], tmp_path / "out")
    with pytest.raises(ValueError, match="row 1 of the results has no `name`; its keys are metrics"):
        write_results([OURS, {"metrics": {}}], tmp_path / "out")
    with pytest.raises(ValueError):
        write_results([{"name": "broken", "metrics": {"fid": float("nan")}}], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_quoted_rows_name_presets_that_exist():
    named = [number.preset for number in TABLE_1 if number.preset]
    assert len(set(named)) == len(named) and set(named) <= PRESETS.keys()
    assert {"wadi-sd15", "wadi-sd21", "wadi-pixart"} <= set(named)
    assert len({number.name for number in TABLE_1}) == len(TABLE_1) == 22
