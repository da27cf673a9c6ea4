"""Prompts, their embeddings and their order."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_wadi.distillation import data


def test_reads_text_and_json(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \na cat\n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps(["ein Bär", "", "a dog"]), encoding="utf-8")
    assert data.read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    assert data.read_prompts(tmp_path / "p.json") == ["ein Bär", "a dog"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.csv", "a", "expected .txt"),
        ("p.txt", "\n \n", "no prompt"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"a": 1}', "list of strings"),
        ("p.json", "[1]", "list of strings"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        data.read_prompts(tmp_path / name)


def test_missing_prompt_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.read_prompts(tmp_path / "nowhere.txt")


def test_embeddings_are_those_of_the_stock_pipeline(components):
    prompts = ["red", "blue", "r e d", "blue red blue"]
    pipe = StableDiffusionPipeline(**components)
    expected, empty = pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=[""] * 4)
    encode = data.clip_encoder(components["tokenizer"], components["text_encoder"])
    index = torch.tensor([2, 0, 3])
    cached = data.PromptEmbeddings(prompts, encode, batch_size=3)
    on_the_fly = data.PromptEmbeddings(prompts, encode, max_cached=3)
    assert cached.cached and not on_the_fly.cached
    for embeddings in (cached, on_the_fly):
        assert torch.allclose(embeddings.at(index), expected[index], atol=1e-6)
        assert torch.allclose(embeddings.empty, empty[:1], atol=1e-6)
    half = data.PromptEmbeddings(prompts, encode, dtype=torch.float16).at(index)
    assert half.dtype == torch.float32 and torch.allclose(half, expected[index], atol=5e-3)


def test_order_visits_everything_each_epoch_and_reshuffles():
    order = data.PromptOrder(10, 4, seed=3)
    epochs = torch.cat([order.next_batch() for _ in range(5)]).view(2, 10)
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(10))] * 2
    assert not torch.equal(*epochs)
    assert data.PromptOrder(2, 5, seed=0).next_batch().numel() == 5  # a batch larger than the data


def test_order_resumes_anywhere():
    whole, part = data.PromptOrder(7, 3, seed=1), data.PromptOrder(7, 3, seed=1)
    for _ in range(5):
        whole.next_batch()
    part.load_state_dict(whole.state_dict())
    assert all(torch.equal(whole.next_batch(), part.next_batch()) for _ in range(5))
    for other in (data.PromptOrder(8, 3, seed=1), data.PromptOrder(7, 3, seed=2)):
        with pytest.raises(ValueError, match="same prompts and --seed"):
            other.load_state_dict(whole.state_dict())


def test_processes_share_the_batch():
    whole = data.PromptOrder(16, 4, seed=1)
    parts = [data.PromptOrder(16, 2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(6):
        assert torch.equal(whole.next_batch(), torch.cat([part.next_batch() for part in parts]))


def test_order_of_nothing():
    with pytest.raises(ValueError, match="0 items"):
        data.PromptOrder(0, 1, seed=0)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_dropping(per):
    text, empty = torch.ones(64, 2, 3), torch.zeros(1, 2, 3)
    generator = torch.Generator().manual_seed(0)
    rates = [1 - data.drop_prompts(text, empty, 0.3, per, generator).mean(dim=(1, 2)) for _ in range(200)]
    assert torch.cat(rates).mean() == pytest.approx(0.3, abs=0.07)
    whole_batches = all(rate.unique().numel() == 1 for rate in rates)
    assert whole_batches == (per == "batch")
    assert torch.equal(data.drop_prompts(text, empty, 0.0, per, generator), text)
    assert torch.equal(data.drop_prompts(text, empty, 1.0, per, generator), empty.expand_as(text))
