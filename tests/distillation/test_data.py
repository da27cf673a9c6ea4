"""Embeddings of the training prompts, with and without a cache on disk, and the order of the prompts."""

import time
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pixart import t5_encoder_model, t5_tokenizer

from diffusers_wadi.distillation import CLIPEncoder, T5Encoder, data, text_cache
from diffusers_wadi.distillation.text_cache import CachePlan, TextCache, cache_folder, fill_cache

PROMPTS = ["red", "blue", "r e d", "blue red blue", "e", "d", "l"]


@pytest.fixture
def encoder(components):
    return CLIPEncoder(components["tokenizer"], components["text_encoder"])


@pytest.fixture
def plan():
    return CachePlan(7, (24, 16), "float32", shard_bytes=3 * 24 * 16 * 4)  # 3, 3 and 1 rows


def test_embeddings_are_those_of_the_stock_pipeline(components, encoder, tmp_path, plan):
    pipe = StableDiffusionPipeline(**components)
    expected, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=[""] * 7)
    index = torch.tensor([6, 2, 0, 3])
    fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=2)
    cached = data.PromptEmbeddings(PROMPTS, encoder, TextCache(tmp_path, plan))
    on_the_fly = data.PromptEmbeddings(PROMPTS, encoder)
    assert cached.cached and not on_the_fly.cached
    for embeddings in (cached, on_the_fly):
        assert torch.allclose(embeddings.at(index), expected[index], atol=1e-6)
        assert torch.allclose(embeddings.empty, empty[:1], atol=1e-6)


def test_text_is_encoded_in_one_batch(encoder):
    embeddings = data.PromptEmbeddings(PROMPTS, encoder)
    sizes = []
    encoder.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    embeddings.at(torch.arange(5))
    assert sizes == [5]


def test_a_cache_in_half_precision(encoder, tmp_path, plan):
    half = CachePlan(7, (24, 16), "float16", plan.shard_bytes)
    fill_cache(tmp_path, half, PROMPTS, encoder, batch_size=4)
    assert half.rows_per_shard == 6
    rows = data.PromptEmbeddings(PROMPTS, encoder, TextCache(tmp_path, half)).at(torch.arange(7))
    assert rows.dtype == torch.float32 and torch.allclose(rows, encoder(PROMPTS), atol=5e-3)


def test_masks_of_t5_survive_the_cache(tmp_path):
    tokenizer = t5_tokenizer()
    encoder = T5Encoder(tokenizer, t5_encoder_model(len(tokenizer)), max_length=9)
    plan = CachePlan(2, (9, 13), "float16")
    fill_cache(tmp_path, plan, ["red", "blue red"], encoder, batch_size=1)
    rows = TextCache(tmp_path, plan).at(torch.tensor([1, 0]))
    assert rows[..., -1].sum(1).tolist() == [3, 2] and rows[..., -1].unique().tolist() == [0, 1]


@pytest.mark.parametrize("stopped_at", range(7))
def test_a_cache_goes_on_after_a_crash_at_any_row(components, encoder, tmp_path, plan, stopped_at, monkeypatch):
    """What was whole is not computed again, what was not is not taken for whole, and the result is the same."""
    expected = encoder(PROMPTS)
    calls = []

    def dying(self, prompts):
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        calls.append(prompts)
        return original(self, prompts)

    original = CLIPEncoder.__call__
    monkeypatch.setattr(CLIPEncoder, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=1)
    whole = sorted(file.name for file in tmp_path.glob("shard-*.npy"))
    assert len(whole) == stopped_at // 3
    with pytest.raises(ValueError, match="no whole shard"):
        TextCache(tmp_path, plan)
    monkeypatch.setattr(
        CLIPEncoder, "__call__", lambda self, prompts: calls.append(prompts) or original(self, prompts)
    )
    calls.clear()
    fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=1)
    assert len(calls) == 7 - 3 * len(whole)
    assert torch.allclose(TextCache(tmp_path, plan).at(torch.arange(7)), expected, atol=1e-6)


def test_a_crash_while_a_shard_is_written_leaves_no_shard(encoder, tmp_path, plan, monkeypatch):
    def full(file, values):
        file.write(b"\x93NUMPY")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_cache.np, "save", full)
    with pytest.raises(OSError, match="No space"):
        fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=4)
    monkeypatch.undo()
    assert not list(tmp_path.glob("shard-*.npy"))
    fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"shard-00000{i}.npy" for i in range(3)]


def test_damaged_shards_are_named(encoder, tmp_path, plan):
    fill_cache(tmp_path, plan, PROMPTS, encoder, batch_size=4)
    file = tmp_path / "shard-000001.npy"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="shard-000001.npy.*Delete it"):
        TextCache(tmp_path, plan)
    np.save(file, np.zeros((3, 24, 15), "float32"))
    with pytest.raises(ValueError, match=r"\(3, 24, 15\), expected float32 \(3, 24, 16\)"):
        TextCache(tmp_path, plan)


def test_processes_share_the_work(encoder, tmp_path, plan):
    """Each its shards, even if one has found all of another's missing; and all see the whole."""
    fill_cache(tmp_path, plan, PROMPTS, encoder, 4, rank=1, world_size=2)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-000001.npy"]
    waiting = Thread(target=text_cache.wait_for_shards, args=(tmp_path, plan, 0.01), daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    fill_cache(tmp_path, plan, PROMPTS, encoder, 4, rank=0, world_size=2)
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert torch.allclose(TextCache(tmp_path, plan).at(torch.arange(7)), encoder(PROMPTS), atol=1e-6)


def test_a_cache_that_does_not_fit_is_refused(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(text_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match="7 prompts of 2 kB.*--embedding_dtype fp16"):
        text_cache.check_space(tmp_path, plan)
    for shard in range(2):
        text_cache.shard_file(tmp_path, shard).touch()
    text_cache.check_space(tmp_path, plan)  # a row is missing only


def test_values_beyond_half_precision_are_refused(encoder, tmp_path):
    loud = lambda prompts: encoder(prompts) * 1e6  # noqa: E731
    with pytest.raises(ValueError, match="not finite in float16: use --embedding_dtype fp32"):
        fill_cache(tmp_path, CachePlan(7, (24, 16), "float16"), PROMPTS, loud, batch_size=4)


def test_the_fingerprint_names_all_that_the_embeddings_depend_on(components, encoder, plan, tmp_path):
    before = encoder.fingerprint()
    assert CLIPEncoder(components["tokenizer"], components["text_encoder"]).fingerprint() == before
    seen = {before}
    encoder.max_length = 10
    seen.add(encoder.fingerprint())
    encoder.max_length = 24
    weight = next(encoder.model.parameters())
    weight.data.view(-1)[3] += 1e-3
    seen.add(encoder.fingerprint())
    encoder.model.half()
    seen.add(encoder.fingerprint())
    tokenizer = t5_tokenizer()
    t5 = t5_encoder_model(len(tokenizer))
    seen |= {T5Encoder(tokenizer, t5, length).fingerprint() for length in (120, 40)}
    assert len(seen) == 6
    folders = {cache_folder(tmp_path, plan, *names) for names in ("ab", "ac", "bb")}
    folders.add(cache_folder(tmp_path, CachePlan(7, (24, 16), "float16", plan.shard_bytes), "a", "b"))
    assert len(folders) == 4


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


def test_one_process_two_processes_and_accumulation_see_the_same_items():
    """1 x 8, 2 x 4 and 1 x 4 twice, over the end of an epoch, item for item."""
    whole, halves = data.PromptOrder(21, 8, seed=1), data.PromptOrder(21, 4, seed=1)
    ranks = [data.PromptOrder(21, 4, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(6):
        batch = whole.next_batch()
        assert torch.equal(batch, torch.cat([rank.next_batch() for rank in ranks]))
        assert torch.equal(batch, torch.cat([halves.next_batch() for _ in range(2)]))


def test_order_resumes_with_other_processes():
    whole = data.PromptOrder(21, 8, seed=1)
    whole.next_batch()
    ranks = [data.PromptOrder(21, 4, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(whole.state_dict())
    assert torch.equal(whole.next_batch(), torch.cat([rank.next_batch() for rank in ranks]))


def test_order_of_nothing():
    with pytest.raises(ValueError, match="0 items"):
        data.PromptOrder(0, 1, seed=0)
