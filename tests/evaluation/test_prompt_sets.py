"""Prompt sets: what is drawn from each source, and what is said of a file of another form."""

import hashlib
import json

import pytest

from diffusers_wadi.evaluation import load_prompts
from diffusers_wadi.evaluation.prompts import HPSV2_STYLES
from diffusers_wadi.shapes import heldout_captions


@pytest.fixture
def coco(tmp_path):
    """A caption file of COCO's layout: 60 images in no order, five captions each, one of them empty."""
    images = [(i * 37) % 1009 + 1 for i in range(60)]
    annotations = [
        {"image_id": image, "id": 10_000 - 10 * image - n, "caption": f" caption {n} of {image}\n" if n else " "}
        for n in range(5)
        for image in images
    ]
    path = tmp_path / "captions_val2014.json"
    path.write_text(
        json.dumps({"info": {}, "images": [{"id": image} for image in images], "annotations": annotations})
    )
    return path


@pytest.fixture
def hpsv2(tmp_path):
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for style in HPSV2_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} prompt {i}" for i in range(20)]))
    return folder


def sha(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def test_coco_gives_one_caption_for_each_image_as_documented(coco):
    prompts = load_prompts(coco, num_prompts=20, seed=3)
    ids = sorted({entry["image_id"] for entry in json.loads(coco.read_text())["annotations"]})
    drawn = sorted(sorted(ids, key=lambda image: sha(f"3/{image}"))[:20])
    assert prompts.indices == [ids.index(image) for image in drawn]
    for prompt, image in zip(prompts, drawn):
        captions = [f"caption {n} of {image}" for n in (4, 3, 2, 1)]  # by their ids, which run the other way
        assert prompt.text == captions[sha(f"3/{image}/caption") % 4]


def test_a_smaller_draw_is_part_of_a_larger_one(coco, hpsv2):
    for source in (coco, hpsv2, "shapes"):
        small, large = load_prompts(source, num_prompts=8), load_prompts(source, num_prompts=24)
        assert len(small) == 8 and set(small) < set(large) and small.indices == sorted(small.indices)
        assert load_prompts(source, num_prompts=8).digest == small.digest != large.digest
        assert load_prompts(source, num_prompts=8, seed=1).digest != small.digest


def test_coco_draws_30_000_where_there_are_more(coco, monkeypatch):
    assert len(load_prompts(coco)) == 60
    monkeypatch.setattr("diffusers_wadi.evaluation.prompts.COCO_SAMPLE", 50)
    assert load_prompts(coco).digest == load_prompts(coco, num_prompts=50).digest


def test_hpsv2_keeps_its_styles_in_equal_parts(hpsv2):
    prompts = load_prompts(hpsv2)
    assert len(prompts) == 80 and prompts.name == "benchmark"
    assert all(prompt.text == f"{prompt.group} prompt {prompt.index % 20}" for prompt in prompts)
    drawn = load_prompts(hpsv2, num_prompts=10)
    assert [drawn.groups.count(style) for style in HPSV2_STYLES] == [3, 3, 2, 2]
    assert set(drawn) < set(prompts)


def test_shapes_are_held_out_captions():
    prompts = load_prompts("shapes", num_prompts=5, seed=7)
    assert prompts.texts == heldout_captions(5, seed=7) and prompts.indices == [0, 1, 2, 3, 4]
    assert len(load_prompts("shapes")) == 512


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", "\ufeffa cat\r\n\n  a dog \n"),
        ("a.json", json.dumps(["a cat", "a dog"])),
        ("a.json", json.dumps([{"id": 1, "prompt": "a cat"}, {"caption": "a dog"}])),
        ("a.jsonl", '{"text": "a cat"}\n\n"a dog"\n'),
    ],
)
def test_files_of_prompts(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    prompts = load_prompts(tmp_path / name)
    assert (prompts.texts, prompts.indices, prompts.groups) == (["a cat", "a dog"], [0, 1], [None, None])


INSTANCES = {"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("instances.json", json.dumps(INSTANCES), "annotation 1 holds image_id, bbox; expected a caption file"),
        ("a.json", json.dumps({"images": []}), "an object with images, and no list 'annotations'.*Expected a COCO"),
        ("a.json", json.dumps({"annotations": []}), "holds no prompt"),
        ("a.json", '["a cat"', "is not valid JSON"),
        ("a.json", '"a cat"', "holds a text"),
        ("a.json", '[{"url": "x"}]', "entry 1 is an object with url; expected one of the keys prompt, caption, text"),
        ("a.jsonl", '"a"\n{"prompt": 3}\n', "line 2 is a number, expected a text"),
        ("a.jsonl", '"a"\n{"prompt": \n', "line 2 is not valid JSON"),
        ("a.json", '["a", " "]', "entry 2 is empty"),
        ("a.txt", '["a", "b"]', "holds JSON, not a prompt a line"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.csv", "a\n", "end in '.csv'"),
    ],
)
def test_a_file_of_another_form(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        load_prompts(tmp_path / name)


def test_other_requests_that_cannot_be_met(tmp_path, hpsv2):
    with pytest.raises(FileNotFoundError, match="'nowhere': no such file or folder. Expected"):
        load_prompts("nowhere")
    (hpsv2 / "photo.json").unlink()
    with pytest.raises(ValueError, match="holds anime.json, concept-art.json, paintings.json, and not photo.json"):
        load_prompts(hpsv2)
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="holds 2 prompts, fewer than the 3 asked for"):
        load_prompts(tmp_path / "a.txt", num_prompts=3)
    with pytest.raises(ValueError, match="num_prompts=0"):
        load_prompts(tmp_path / "a.txt", num_prompts=0)
