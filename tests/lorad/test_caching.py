"""Turned weights that are kept: never another bit than without, whatever changes in between, and no rotation if nothing does."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad import (
    LoRaDConfig,
    RotationCache,
    add_weighted_adapter,
    disable_lorad_cache,
    enable_lorad_cache,
    hotswap_lorad_adapter,
    kept_rotations,
    mixed_adapter_batch,
)
from diffusers_wadi.lorad.caching import lorad_cache_in_call
from diffusers_wadi.lorad.layer import TurnedWeightLayer
from diffusers_wadi.lorad.rotation import set_rotation_backend
from diffusers_wadi.lorad.watching import _PART, _Marked, _Summed, watch

TARGETS = ["conv", "first", "transposed", "last"]
LAYERS = len(TARGETS)


class Toy(nn.Module):
    """One layer of every kind that keeps its turned weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular")
        self.first, self.transposed, self.last = nn.Linear(6, 8), Conv1D(10, 8), nn.Linear(10, 4, bias=False)

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        return self.last(self.transposed(self.first(y).tanh()).tanh())


def toy(names=("a", "b"), cached=True, **config):
    torch.manual_seed(0)
    model = Toy().eval()
    for name in names:
        inject_adapter_in_model(LoRaDConfig(r=3, target_modules=TARGETS, init_weights=False, **config), model, name)
    activate(model, names[0])
    if cached:
        enable_lorad_cache(model)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, TurnedWeightLayer)]


def activate(model, *names):
    for layer in layers(model):
        layer.set_adapter(list(names))


def inputs(model=None):
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    return x if model is None else x.to(model.last.get_base_layer().weight.dtype)


@torch.no_grad()
def run(model):
    return model(inputs(model))


def plainly(model):
    """The same without anything kept."""
    kept = {layer: layer.kept_rotations for layer in layers(model)}
    for layer in kept:
        layer.kept_rotations = None
    try:
        return run(model)
    finally:
        for layer, cache in kept.items():
            layer.kept_rotations = cache


def cache_of(model):
    return layers(model)[0].kept_rotations.cache


@pytest.fixture
def turns(monkeypatch):
    """The rotations that are made: `turns()` counts them and starts again."""
    counted = []
    for module in [module for name, module in sys.modules.items() if name.startswith("diffusers_wadi.lorad")]:
        if (real := getattr(module, "turn_weight", None)) is not None:

            def turn(*args, _real=real, **kwargs):
                counted.append(args)
                return _real(*args, **kwargs)

            monkeypatch.setattr(module, "turn_weight", turn)

    def count():
        number = len(counted)
        counted.clear()
        return number

    return count


def warm(model):
    for _ in range(3):
        y = run(model)
    return y


def test_from_the_third_call_on_nothing_is_turned(turns):
    model = toy()
    expected = plainly(model)
    turns()
    for expected_turns, kept in ((LAYERS, 0), (LAYERS, LAYERS), (0, LAYERS), (0, LAYERS)):
        assert torch.equal(run(model), expected)
        assert (turns(), cache_of(model).num_layers) == (expected_turns, kept)
    weights = [layer.get_base_layer().weight for layer in layers(model)]
    assert cache_of(model).nbytes == sum(weight.nbytes for weight in weights)


def weight(model):
    return model.first.get_base_layer().weight


def add_ulp(tensor):
    tensor.view(torch.int32)[2, 1] += 1


def swap_rows(tensor):
    tensor[[0, 1]] = tensor[[1, 0]].clone()


def negate_two(tensor):
    tensor[1, 1] *= -1
    tensor[2, 1] *= -1


WRITES = {
    "one ulp": add_ulp,
    "negation": torch.Tensor.neg_,
    "negation of two numbers": negate_two,
    "two rows swapped": swap_rows,
    "columns reversed": lambda tensor: tensor.copy_(tensor.flip(1)),
    "scaled": lambda tensor: tensor.mul_(2),
    "by a slice": lambda tensor: tensor[1:2].zero_(),
    "by foreach": lambda tensor: torch._foreach_mul_([tensor], 0.5),
    "by an out argument": lambda tensor: torch.add(tensor, 1, out=tensor),
    "by its storage": lambda tensor: tensor.untyped_storage().copy_((tensor * 3).untyped_storage()),
    "by numpy": lambda tensor: np.multiply(tensor.numpy(), 2, out=tensor.numpy()),
}


@pytest.mark.parametrize("of", ["weight", "A", "B"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("where", [lambda t: t.data, lambda t: t.detach()], ids=["data", "detach"])
def test_any_write_is_noticed(turns, write, where, of):
    model = toy()
    before = warm(model)
    tensor = {"weight": weight(model), "A": model.first.lorad_A["a"], "B": model.first.lorad_B["a"]}[of]
    with torch.no_grad():
        write(where(tensor))
    y, expected = run(model), plainly(model)
    assert torch.equal(y, expected)
    if write is not add_ulp:  # which may be rounded away
        assert not torch.equal(y, before)
    assert torch.equal(warm(model), expected)
    turns()
    assert torch.equal(run(model), expected) and turns() == 0


def ema(model):
    average = EMAModel(list(model.parameters()), decay=0.5)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    average.step(model.parameters())
    average.store(model.parameters())
    return average


def ema_copy_to(model):
    ema(model).copy_to(model.parameters())
    warm(model)


def ema_restore(model):
    average = ema(model)
    average.copy_to(model.parameters())
    warm(model)
    average.restore(model.parameters())


def train_a_step(model):
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lorad_" in n], lr=0.1)
    model(inputs()).square().mean().backward()
    optimizer.step()


def swapped_memory(model):
    first, second = (model.first.lorad_A[name] for name in "ab")
    activate(model, "b")
    warm(model)  # both are watched now
    activate(model, "a")
    first.data, second.data = second.data, first.data


def other_view(model):
    square = nn.Parameter(torch.randn(6, 6))
    model.first.base_layer = nn.Linear(6, 6).eval().requires_grad_(False)
    for name in "ab":
        model.first.lorad_A[name].data = torch.randn(6, 3)
    model.first.base_layer.weight = square
    model.transposed.base_layer, model.transposed.lorad_B["a"].data = Conv1D(10, 6).eval(), torch.randn(3, 3)
    warm(model)
    square.data = square.data.T


def lora_merged_into_the_base(model):
    holder = nn.Sequential(model.first.base_layer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), holder, "lora")
    model.first.base_layer = holder[0].eval()
    warm(model)
    holder[0].merge()
    with torch.no_grad():
        holder[0](torch.randn(1, 6))


def numpy_array_from_before(model):
    array = model.first.lorad_A["a"].detach().numpy()
    warm(model)
    array *= 2


def dlpack_from_before(model):
    array = np.from_dlpack(model.first.lorad_A["a"].requires_grad_(False))
    warm(model)
    array *= 2


def memory_of_numpy(model):
    array = weight(model).detach().numpy().copy()
    weight(model).data = torch.from_numpy(array)
    warm(model)
    array[0, 0] += 1


def written_under_the_other_adapter(model):
    activate(model, "b")
    warm(model)
    weight(model).data.neg_()
    warm(model)  # which watches over it anew, and must not make what was kept for "a" look right
    activate(model, "a")


def back_and_forth(model):
    activate(model, "b")
    warm(model)
    activate(model, "a")


def replace_parameter(model):
    model.first.get_base_layer().weight = nn.Parameter(torch.randn(8, 6), requires_grad=False)


def load(assign):
    def change(model):
        state = {key: value * 0.7 for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def hotswap(model):
    adapter = {key: value * 0.3 for key, value in get_peft_model_state_dict(model, adapter_name="a").items()}
    hotswap_lorad_adapter(model, adapter, "a")


def weighted(model):
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "both")
    activate(model, "both")


def delete(model):
    activate(model, "b")
    for layer in layers(model):
        layer.delete_adapter("a")


def each(what):
    def change(model):
        for layer in layers(model):
            what(layer)

    return change


def merged_and_back(model):
    each(lambda layer: layer.merge())(model)
    warm(model)
    each(lambda layer: layer.unmerge())(model)


def added(model):
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["last"], init_weights=False), model, "c")
    activate(model, "a", "c")


CHANGES = {
    "scale": each(lambda layer: layer.set_scale("a", 0.3)),
    "scale_layer": each(lambda layer: layer.scale_layer(0.5)),
    "scale_layer and back": each(lambda layer: (layer.scale_layer(0.5), layer.unscale_layer(0.5))),
    "other adapter": lambda model: activate(model, "b"),
    "both adapters": lambda model: activate(model, "a", "b"),
    "other order": lambda model: (activate(model, "a", "b"), warm(model), activate(model, "b", "a")),
    "and back": back_and_forth,
    "off": each(lambda layer: layer.enable_adapters(False)),
    "off and on": each(lambda layer: (layer.enable_adapters(False), layer.enable_adapters(True))),
    "deleted": delete,
    "added": added,
    "merged": each(lambda layer: layer.merge()),
    "merged and back": merged_and_back,
    "hotswap": hotswap,
    "weighted sum": weighted,
    "EMA copied": ema_copy_to,
    "EMA restored": ema_restore,
    "training step": train_a_step,
    "state dict": load(assign=False),
    "state dict assigned": load(assign=True),
    "another parameter": replace_parameter,
    "memory swapped": swapped_memory,
    "memory exchanged": lambda model: setattr(weight(model), "data", torch.randn(8, 6)),
    "memory seen otherwise": other_view,
    "shared memory": lambda model: (model.share_memory(), weight(model).data.neg_()),
    "a LoRA below": lora_merged_into_the_base,
    "written under the other adapter": written_under_the_other_adapter,
    "NumPy array from before": numpy_array_from_before,
    "DLPack from before": dlpack_from_before,
    "memory of NumPy": memory_of_numpy,
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "factors in 16 bits": each(lambda layer: layer.cast_adapter("a", torch.bfloat16)),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "dilated": lambda model: setattr(model.conv.get_base_layer(), "dilation", [2, 2]),
    "cache off": disable_lorad_cache,
    "less memory": lambda model: enable_lorad_cache(model, 200),
}


@pytest.mark.filterwarnings("ignore")  # PEFT on merging and on names
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_any_change_the_output_is_that_without_a_cache(change):
    model = toy()
    warm(model)
    change(model)
    for _ in range(4):
        y, expected = run(model), plainly(model)
        assert torch.equal(y, expected) and torch.isfinite(y).all()


def test_the_other_backend_computes_for_itself():
    model = toy()
    warm(model)
    try:
        for backend in ("plain", "chunked"):
            set_rotation_backend(backend)
            assert torch.equal(run(model), plainly(model)) and torch.equal(warm(model), plainly(model))
    finally:
        set_rotation_backend("auto")


def test_autocast_and_inference_mode(turns):
    model = toy()
    with torch.inference_mode():
        y = [model(inputs()) for _ in range(3)]
    turns()
    assert torch.equal(run(model), y[0]) and turns() == 0  # what was kept there serves here
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly(model)
        assert torch.equal(warm(model), expected) and expected.dtype == torch.bfloat16
        turns()
        assert torch.equal(run(model), expected) and turns() == 0
    assert torch.equal(run(model), y[0]) and turns() == 0


def test_a_model_made_in_inference_mode(turns):
    with torch.inference_mode():
        model = toy()
    y = warm(model)
    turns()
    assert torch.equal(run(model), y) and turns() == 0
    with torch.inference_mode():
        weight(model).mul_(2)
    assert torch.equal(run(model), plainly(model)) and not torch.equal(run(model), y)


def test_layers_over_one_weight():
    model = toy()
    model.last.base_layer = nn.Linear(6, 8).eval()
    first, last = model.first, model.last
    for layer in (first, last):
        layer.base_layer.weight = last.base_layer.weight
        layer.lorad_A["a"].data, layer.lorad_B["a"].data = torch.randn(8, 3), torch.randn(3, 3)
    x = torch.randn(2, 6)
    with torch.no_grad():
        for layer in (first, last) * 3:
            layer(x)
        weight(model).data.neg_()
        for _ in range(3):
            last(x)
        kept = first(x)
        first.kept_rotations = None
        assert torch.equal(kept, first(x))


def test_gradients_are_as_ever_and_free_what_is_kept():
    model, reference = toy(), toy(cached=False)
    warm(model)
    for each_model in (model, reference):
        each_model(inputs()).square().mean().backward()
    assert cache_of(model).nbytes == 0
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        assert (parameter.grad is None and expected.grad is None) or torch.equal(parameter.grad, expected.grad)


def test_training_mode_keeps_nothing():
    model = toy()
    warm(model)
    model.train()
    assert cache_of(model).nbytes == 0
    assert torch.equal(warm(model), plainly(model)) and cache_of(model).nbytes == 0
    model.eval()
    warm(model)
    assert cache_of(model).num_layers == LAYERS


def test_what_changes_at_every_call_is_not_kept():
    model = toy()
    for i in range(6):
        model.first.set_scale("a", 1 + i / 10)
        model.last.lorad_A["a"].data = model.last.lorad_A["a"].data.clone()
        with torch.no_grad():
            model.conv.lorad_A["a"] += 1e-3
        assert torch.equal(run(model), plainly(model))
    assert cache_of(model).num_layers == 1  # `transposed`


def test_what_moved_is_freed_and_what_did_not_stays(turns):
    model = toy()
    y = warm(model)
    model.to("cpu", torch.float32)
    turns()
    assert torch.equal(run(model), y) and turns() == 0
    model.double()
    assert cache_of(model).nbytes == 0


def test_merging_and_deleting_free_it():
    for change in (CHANGES["merged"], delete):
        model = toy()
        warm(model)
        change(model)
        assert cache_of(model).nbytes == 0


def test_eight_bit_weights_are_not_kept():
    model = toy()
    weight(model).data = weight(model).data.to(torch.float8_e4m3fn)
    assert torch.equal(warm(model), plainly(model)) and cache_of(model).num_layers == LAYERS - 1


def test_the_limit_is_kept_and_the_dearest_layers_are(turns):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)).eval()
    config = LoRaDConfig(r=2, rank_pattern={"1": 30}, target_modules=["0", "1", "2", "3"], init_weights=False)
    inject_adapter_in_model(config, model, "a")
    x, small = torch.randn(3, 32), 32 * 32 * 4
    cache, expected = enable_lorad_cache(model, max_memory=0), None
    for limit, kept in (
        (0, []),
        (small - 1, []),
        (small, [1]),
        (2 * small, [0, 1]),
        (5 * small, [0, 1, 2]),
        ("1MiB", range(4)),
    ):
        assert enable_lorad_cache(model, limit) is cache
        for _ in range(14):
            with torch.no_grad():
                y = model(x)
            expected = y if expected is None else expected
            assert torch.equal(y, expected)
            assert cache.nbytes <= cache.max_memory
        turns()
        with torch.no_grad():
            model(x)
        assert turns() == 4 - len(kept)
        held = [any(entry.nbytes for entry in layer.kept_rotations.entries.values()) for layer in layers(model)]
        assert [i for i, one in enumerate(held) if one] == list(kept), limit


def test_what_is_no_longer_used_gives_way():
    model = toy()
    enable_lorad_cache(model, sum(layer.get_base_layer().weight.nbytes for layer in layers(model)))
    warm(model)
    activate(model, "b")
    for _ in range(12):
        run(model)
    used = [key[0] for layer in layers(model) for key, entry in layer.kept_rotations.entries.items() if entry.nbytes]
    assert used == [("b",)] * LAYERS


def test_limits_that_are_none():
    for bad in (-1, "much", "-3"):
        with pytest.raises(ValueError, match="max_memory"):
            enable_lorad_cache(toy(), bad)
    assert enable_lorad_cache(toy(), "2MB").max_memory == 2_000_000


def test_copies_are_empty_and_on_their_own(turns):
    model = toy()
    enable_lorad_cache(model, 12345)
    y, keys = warm(model), list(model.state_dict())
    assert keys == list(toy(cached=False).state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    assert len(buffer.getvalue()) < len(pickle.dumps(toy())) * 1.2 + 1000
    for twin in twins:
        cache = cache_of(twin)
        assert cache is not cache_of(model) and (cache.nbytes, cache.max_memory) == (0, 12345)
        assert len({id(layer.kept_rotations.cache) for layer in layers(twin)}) == 1
        weight(twin).data.neg_()
        assert not torch.equal(warm(twin), y) and torch.equal(run(twin), plainly(twin))
    warm(model)  # whoever writes a file asks for addresses, which counts as a change
    turns()
    assert torch.equal(run(model), y) and turns() == 0
    disable_lorad_cache(twins[0])
    assert not cache_of(twins[0]).max_memory and cache_of(model).max_memory == 12345


def test_the_setting_reaches_layers_that_come_later_and_wrapped_models():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    cache = enable_lorad_cache(model, 1000)
    wrapped = get_peft_model(model, LoRaDConfig(r=2, target_modules=["0"], init_weights=False), "a")
    wrapped.add_adapter("b", LoRaDConfig(r=2, target_modules=["1"], init_weights=False))
    assert [layer.kept_rotations.cache for layer in layers(model)] == [cache, cache]
    assert enable_lorad_cache(wrapped.eval(), 2000) is cache and cache.max_memory == 2000


def test_in_a_pipeline_s_call_alone():
    model = toy(cached=False)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="in between"), lorad_cache_in_call(model):
            run(model)
            raise RuntimeError("in between")
    kept = cache_of(model).nbytes
    assert kept and cache_of(model).calls_only
    weight(model).data.neg_()
    assert torch.equal(warm(model), plainly(model))  # outside: nothing is looked at
    with lorad_cache_in_call(model):
        assert torch.equal(warm(model), plainly(model))
    assert cache_of(model).nbytes == kept
    disable_lorad_cache(model)
    with lorad_cache_in_call(model):
        warm(model)
    assert cache_of(model).nbytes == 0
    enable_lorad_cache(model)
    with lorad_cache_in_call(model):
        warm(model)
    assert not cache_of(model).calls_only and cache_of(copy.deepcopy(model)).max_memory == 1 << 30


def test_a_copied_model_brings_its_setting():
    model = toy()
    disable_lorad_cache(model)
    twin = copy.deepcopy(model)
    with lorad_cache_in_call(twin):
        warm(twin)
    assert cache_of(twin).nbytes == 0


def test_mixed_batches(turns):
    model = toy()
    names = ["b", "__base__"]
    with mixed_adapter_batch(model, names):
        expected = plainly(model)
        assert torch.equal(warm(model), expected)
        turns()
        assert torch.equal(run(model), expected) and turns() == 0
    assert torch.equal(run(model), plainly(model))


def test_threads_with_different_adapters():
    layer = toy(("a", "b", "c"), cached=False).first
    x, wrong = torch.randn(3, 6), []
    with torch.no_grad():
        expected = {name: layer(x, adapter_names=[name] * 3) for name in "abc"}
    enable_lorad_cache(nn.ModuleList([layer]), 2 * weight_bytes(layer))  # so that they take it from one another

    def draw(name):
        with torch.no_grad():
            for _ in range(150):
                if not torch.equal(layer(x, adapter_names=[name] * 3), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=draw, args=(name,)) for name in "abcabc"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and layer.kept_rotations.cache.nbytes <= 2 * weight_bytes(layer)


def weight_bytes(layer):
    return layer.get_base_layer().weight.nbytes


@pytest.mark.parametrize("what", ["scale and back", "write", "memory"])
def test_what_others_do_while_the_weight_is_turned_is_not_kept(monkeypatch, what):
    model = toy()
    first = model.first
    activate(model, "b")
    warm(model)  # watches over the factors of "b" too
    activate(model, "a")
    run(model)
    real = type(first)._rotated_weight

    def swap():
        first.lorad_A["a"].data, first.lorad_A["b"].data = first.lorad_A["b"].data, first.lorad_A["a"].data

    def turn(layer, names, scaling, dtype):
        if layer is not first:
            return real(layer, names, scaling, dtype)
        if what == "memory":
            swap()
        if what == "scale and back":
            layer.set_scale("a", 0.25)
        rotated = real(layer, names, scaling, dtype)
        layer.set_scale("a", 1.0)
        if what == "write":
            layer.lorad_A["a"].data.mul_(2)
        return rotated

    monkeypatch.setattr(type(first), "_rotated_weight", turn)
    run(model)
    monkeypatch.undo()
    if what == "memory":
        swap()
    assert torch.equal(run(model), plainly(model)) and torch.equal(warm(model), plainly(model))


def test_kernels_that_ask_for_addresses(turns, monkeypatch):
    """As Triton's do, on CUDA."""
    model = toy()
    expected = run(model)
    real = type(model.first)._rotated_weight

    def turn(layer, names, scaling, dtype):
        layer.get_base_layer().weight.data_ptr()
        return real(layer, names, scaling, dtype)

    monkeypatch.setattr(type(model.first), "_rotated_weight", turn)
    warm(model)
    assert cache_of(model).num_layers == LAYERS - 2  # on a CPU it would be a write by somebody else
    monkeypatch.setattr(kept_rotations, "_may_be_triton", lambda rotated: True)
    warm(model)
    turns()
    assert torch.equal(run(model), expected) and turns() == 0


def test_every_stream_keeps_its_own_and_a_captured_graph_nothing(turns, monkeypatch):
    model = toy()
    expected = warm(model)
    one = cache_of(model).nbytes
    monkeypatch.setattr(kept_rotations, "_stream", lambda device: 7)
    turns()
    assert torch.equal(run(model), expected) and turns() == LAYERS
    warm(model)
    assert cache_of(model).nbytes == 2 * one
    monkeypatch.setattr(kept_rotations, "_stream", lambda device: None)
    turns()
    assert torch.equal(warm(model), expected) and turns() == 3 * LAYERS
    assert cache_of(model).nbytes == 2 * one


def test_a_cache_dies_with_its_layers():
    model = toy()
    cache = enable_lorad_cache(model)
    warm(model)
    for name in TARGETS:
        setattr(model, name, getattr(model, name).get_base_layer())
    assert cache.nbytes == 0 and isinstance(cache, RotationCache)
    del model.peft_config
    pickled = pickle.dumps(model)
    assert b"diffusers_wadi" not in pickled


@pytest.mark.parametrize("of", ["torch", "numpy", "alias", "view"])
def test_watching(of):
    memory = np.arange(64, dtype=np.float32)
    tensor = torch.from_numpy(memory) if of == "numpy" else torch.arange(64, dtype=torch.float32)
    alias = tensor.view(-1) if of == "alias" else None
    tensor = tensor[16:48] if of == "view" else tensor
    for write in (
        lambda t: t.neg_(),
        lambda t: t[3:5].neg_(),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t[31:32].add_(1),
    ):
        first, second = watch(tensor), watch(tensor)
        assert type(first) is type(second) is (_Marked if of == "torch" else _Summed)
        assert first.holds(tensor) and second.holds(tensor)
        (tensor.sum(), tensor @ tensor, tensor.clone(), torch.cat([tensor, tensor]))
        assert first.holds(tensor)
        write(tensor.data if alias is None else alias)
        assert not first.holds(tensor) and not second.holds(tensor)
        third = watch(tensor)
        assert third.holds(tensor) and not first.holds(tensor)
    if of == "numpy":
        memory[5] = 77
        assert not third.holds(tensor)


@pytest.mark.parametrize("threads", [1, 3])
def test_checksums_see_every_part(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    memory = np.zeros(_PART // 2 + 5, dtype=np.float32)
    tensor = torch.from_numpy(memory)
    for place in (0, _PART // 4, len(memory) - 1):
        kept = watch(tensor)
        memory[place] = np.nextafter(np.float32(0), np.float32(1))
        assert not kept.holds(tensor) and watch(tensor).holds(tensor)
    strided = watch(torch.from_numpy(memory)[::7])
    memory[14] += 1
    assert not strided.holds(tensor[::7])


@pytest.mark.filterwarnings("ignore")  # torch says that it no longer likes tracing
def test_what_is_traced_or_transformed_turns_for_itself(turns):
    model = toy()
    warm(model)
    turns()
    with torch.no_grad():
        torch.func.vmap(model)(inputs()[None])
        assert turns() == LAYERS
        traced = torch.jit.trace(model, inputs(), check_trace=False)
        assert turns() == LAYERS
        weight(model).data.neg_()
        torch.testing.assert_close(traced(inputs()), plainly(model))


@pytest.mark.slow
def test_the_compiler_does_not_see_it():
    torch._dynamo.reset()
    model = toy()
    y = warm(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), y)
        weight(model).data.neg_()
        torch.testing.assert_close(compiled(inputs()), plainly(model))


def test_disabled_or_in_training_the_memory_may_be_resized():
    for end in (disable_lorad_cache, lambda model: layers(model)[0].train(), run_with_gradients):
        model = toy()
        warm(model)
        end(model)
        storage = layers(model)[0].get_base_layer().weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(2 * size)
        layers(model)[0].get_base_layer().weight.data.fill_(0.5)  # which fails for a storage that is watched over


def run_with_gradients(model):
    with torch.enable_grad():
        model(inputs())


NEW_SWITCHES = """
import sys
sys.path[:0] = {folders!r}
import torch
from test_caching import cache_of, inputs, toy, warm
model = toy()
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
warm(model)
assert cache_of(model).nbytes > 0
"""


def test_with_the_newer_switches_of_precision():
    here = Path(__file__).parent
    program = NEW_SWITCHES.format(folders=[str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
