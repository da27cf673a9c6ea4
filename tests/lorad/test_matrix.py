"""What every tuner has to do, for every kind of model: behaviours crossed with configurations."""

import copy
import pickle

import pytest
import torch
from backbones import add_adapter, fill_adapter, pixart_inputs, select, tiny_pixart, tiny_unet, unet_inputs
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad import LoRaDConfig, LoRaDLayer, lorad_target_modules

pytestmark = pytest.mark.filterwarnings("ignore:Already f:UserWarning")


class Words(nn.Module):
    """Embedding, Conv1D of transformers and torch's attention, of even and odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv1d = nn.Embedding(11, 5, padding_idx=0), Conv1D(8, 5)
        self.mha, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x):
        y = self.conv1d(self.emb(x)).relu()
        return self.lin(self.mha(y, y, y)[0])


def words_inputs(dtype):
    return {"x": torch.randint(11, (6, 10), generator=torch.Generator().manual_seed(1))}


class Toy(nn.Module):
    """Linear, 1x1, 3x3 and grouped convolutions, 44 inputs of one of them odd."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1 = nn.Linear(10, 48), nn.Linear(16, 4)
        self.narrow, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.groups = nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular")

    def forward(self, x):
        x = self.lin0(x).relu().view(-1, 3, 4, 4)
        return self.lin1(self.groups(self.wide(self.narrow(x).relu())).view(-1, 16))


def toy_inputs(dtype):
    return {"x": torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).to(dtype)}


def pixart(dtype):
    inputs = pixart_inputs()
    return {k: v.to(dtype) if k in ("hidden_states", "encoder_hidden_states") else v for k, v in inputs.items()}


def with_convolutions(model):
    return lorad_target_modules(model, convolutions=True)


# name -> model, inputs, targets, settings, dtype
CONFIGURATIONS = {
    "mlp": (Toy, toy_inputs, ["lin0", "lin1"], {"r": 4}, torch.float32),
    "mlp, ranks": (Toy, toy_inputs, "lin.", {"r": 1, "rank_pattern": {"lin0": 7}}, torch.float32),
    "mlp, half": (Toy, toy_inputs, "all-linear", {"r": 4}, torch.float16),
    "conv": (Toy, toy_inputs, ["narrow", "wide", "groups"], {"r": 3}, torch.float32),
    "conv, half": (Toy, toy_inputs, ["narrow", "wide", "groups"], {"r": 3}, torch.bfloat16),
    "all, double": (Toy, toy_inputs, ["lin0", "lin1", "narrow", "groups"], {"r": 3}, torch.float64),
    "embedding": (Words, words_inputs, ["emb"], {"r": 3}, torch.float32),
    "conv1d": (Words, words_inputs, ["conv1d", "lin"], {"r": 3}, torch.float32),
    "attention": (Words, words_inputs, ["mha"], {"r": 3}, torch.float32),
    "words, half": (Words, words_inputs, ["emb", "conv1d", "mha"], {"r": 2}, torch.bfloat16),
    "words, double": (Words, words_inputs, ["emb", "conv1d", "mha"], {"r": 2}, torch.float64),
    "unet": (tiny_unet, lambda dtype: unet_inputs(dtype=dtype), lorad_target_modules, {"r": 4}, torch.float32),
    "unet, conv": (tiny_unet, lambda dtype: unet_inputs(dtype=dtype), with_convolutions, {"r": 2}, torch.float32),
    "unet, half": (tiny_unet, lambda dtype: unet_inputs(dtype=dtype), with_convolutions, {"r": 4}, torch.bfloat16),
    "pixart": (tiny_pixart, pixart, lorad_target_modules, {"r": 4}, torch.float32),
    "pixart, half": (tiny_pixart, pixart, ["to_q", "to_v", "net.2"], {"r": 16}, torch.bfloat16),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=CONFIGURATIONS)
def setting(request):
    make, make_inputs, targets, options, dtype = CONFIGURATIONS[request.param]
    model = make().eval().to(dtype)

    def add(name, seed=None):
        chosen = targets(make()) if callable(targets) else targets
        add_adapter(model, LoRaDConfig(target_modules=chosen, **options), name)
        if seed is not None:
            fill_adapter(model, name, seed=seed)

    return model, make_inputs(dtype), add, dtype


@torch.no_grad()
def run(model, inputs):
    y = model(**inputs)
    return y if isinstance(y, torch.Tensor) else y.sample


def layers(model):
    return [m for m in model.modules() if isinstance(m, LoRaDLayer)]


def weights(model):
    return [layer.weight.detach().clone() for layer in layers(model)]


def difference(one, two):
    return float((one.double() - two.double()).norm() / two.double().norm())


def test_identity_at_the_start_switches_and_deletion(setting):
    model, inputs, add, _ = setting
    base = run(model, inputs)
    add("first")
    assert torch.equal(run(model, inputs), base)
    fill_adapter(model, "first")
    first = run(model, inputs)
    assert difference(first, base) > 1e-3
    select(model, ["first"], enabled=False)
    assert torch.equal(run(model, inputs), base)
    add("second", seed=5)
    select(model, ["second"])
    assert difference(run(model, inputs), first) > 1e-3
    select(model, ["first"])
    assert torch.equal(run(model, inputs), first)
    for layer in layers(model):
        layer.set_scale("first", 0.0)
    assert torch.equal(run(model, inputs), base)
    for layer in layers(model):
        layer.set_scale("first", 1.0)
        layer.delete_adapter("second")
    assert torch.equal(run(model, inputs), first) and not any("second" in key for key in model.state_dict())


def test_fused_is_unfused_in_any_order_and_comes_back(setting):
    model, inputs, add, dtype = setting
    base = run(model, inputs)
    add("a", seed=3)
    add("b", seed=4)
    select(model, ["a", "b"])
    before, unfused = weights(model), run(model, inputs)
    fused = []
    for order in (["a", "b"], ["b", "a"]):
        for name in order:
            for layer in layers(model):
                layer.merge(adapter_names=[name], safe_merge=True)
        fused.append(weights(model))
        assert difference(run(model, inputs), unfused) < TOLERANCE[dtype]
        for layer in layers(model):
            layer.unmerge()
        assert difference(run(model, inputs), unfused) < TOLERANCE[dtype]
    for one, two, original in zip(*fused, before):
        limit = 1e-6 if dtype.itemsize >= 4 else 1e-2
        assert (one.double() - two.double()).abs().max() < limit and not torch.equal(one, original)
    for now, original in zip(weights(model), before):
        assert torch.equal(now, original) if dtype.itemsize < 4 else difference(now, original) < 1e-7
    select(model, ["a", "b"], enabled=False)
    assert difference(run(model, inputs), base) < TOLERANCE[dtype] / 10


def test_saved_loaded_copied_and_pickled(setting):
    model, inputs, add, _ = setting
    fresh = copy.deepcopy(model)
    add("a", seed=3)
    expected = run(model, inputs)
    stored = get_peft_model_state_dict(model, adapter_name="a")
    assert all(value.dtype == torch.float32 and key.endswith(("lorad_A", "lorad_B")) for key, value in stored.items())
    assert len(stored) == 2 * len(layers(model))
    add_adapter(fresh, model.peft_config["a"], "other")
    result = set_peft_model_state_dict(fresh, stored, "other")
    assert not result.unexpected_keys
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, inputs), expected)


def test_training_moves_the_angles_and_nothing_else(setting):
    model, inputs, add, dtype = setting
    add("a", seed=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lorad_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1 if dtype.itemsize >= 4 else 1e-2)
    y = model(**inputs)
    (y if isinstance(y, torch.Tensor) else y.sample).float().square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained.values()
    )
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert name in trained or torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())
