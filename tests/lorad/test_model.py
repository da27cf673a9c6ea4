"""Whole models through PEFT's and diffusers' own entry points."""

import copy
import pickle

import pytest
import torch
from backbones import add_adapter, fill_adapter, pixart_inputs, select, tiny_pixart, tiny_unet, unet_inputs
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.mapping import inject_adapter_in_model
from torch import nn

from diffusers_wadi.lorad import LoRaDConfig, LoRaDLayer, LoRaDLinear, LoRaDModel, lorad_target_modules, rotate

BACKBONES = {"unet": (tiny_unet, unet_inputs), "pixart": (tiny_pixart, pixart_inputs)}
SECOND_ADAPTER = "ignore:Already found a `peft_config`:UserWarning"  # PEFT says so for every second adapter

pytestmark = pytest.mark.filterwarnings(SECOND_ADAPTER)


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).sample


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before, flags):
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags


class MLP(nn.Module):
    def __init__(self, width=20):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.odd = nn.Linear(10, width), nn.Linear(width, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x).relu())


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("amp", [False, True])
def test_a_new_adapter_changes_no_bit_of_the_output(name, amp):
    make, make_inputs = BACKBONES[name]
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        before = run(model, make_inputs())
        add_adapter(model, LoRaDConfig(r=4))  # without target_modules: the paper's student layers
        assert torch.equal(run(model, make_inputs()), before)
    adapted = [n for n, m in model.named_modules() if isinstance(m, LoRaDLayer)]
    assert adapted == lorad_target_modules(make())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    unet = tiny_unet().to(dtype)
    before = run(unet, unet_inputs(dtype=dtype))
    unet.add_adapter(LoRaDConfig(r=4))
    assert torch.equal(run(unet, unet_inputs(dtype=dtype)), before)
    assert {p.dtype for n, p in unet.named_parameters() if "lorad_" in n} == {torch.float32}
    fill_adapter(unet, "default")
    after = run(unet, unet_inputs(dtype=dtype))
    assert after.dtype == dtype and after.isfinite().all() and not torch.equal(after, before)


@pytest.mark.parametrize("name", BACKBONES)
def test_one_base_in_three_roles(name):
    make, make_inputs = BACKBONES[name]
    model, inputs = make(), make_inputs()
    teacher = run(model, inputs)
    for role in ("student", "fake"):
        add_adapter(model, LoRaDConfig(r=4, target_modules=lorad_target_modules(model, role)), role)
        fill_adapter(model, role, seed=len(role))
    outputs = {}
    for role in ("student", "fake"):
        select(model, [role])
        outputs[role] = run(model, inputs)
    select(model, ["fake"], enabled=False)
    assert torch.equal(run(model, inputs), teacher)
    select(model, ["fake"])
    assert torch.equal(run(model, inputs), outputs["fake"])
    assert not torch.allclose(outputs["student"], outputs["fake"]) and not torch.allclose(outputs["fake"], teacher)


def test_the_switches_of_diffusers_models():
    unet, inputs = tiny_unet(), unet_inputs()
    teacher = run(unet, inputs)
    for name in ("a", "b"):
        unet.add_adapter(LoRaDConfig(r=4), name)
        fill_adapter(unet, name, seed=ord(name))
    b = run(unet, inputs)
    unet.set_adapter("a")
    assert unet.active_adapters() == ["a"] and not torch.allclose(run(unet, inputs), b)
    unet.disable_adapters()
    assert torch.equal(run(unet, inputs), teacher)
    unet.set_adapter("b")
    unet.enable_adapters()
    assert torch.equal(run(unet, inputs), b)
    unet.disable_lora()
    assert torch.equal(run(unet, inputs), teacher)


def test_weighted_adapters_slide_between_teacher_and_student():
    unet, inputs = tiny_unet(), unet_inputs()
    teacher = run(unet, inputs)
    for name in ("a", "b"):
        unet.add_adapter(LoRaDConfig(r=4), name)
        fill_adapter(unet, name, seed=ord(name))
    unet.set_adapters("a")
    student = run(unet, inputs)
    unet.set_adapters(["a", "b"], [1.0, 0.0])
    torch.testing.assert_close(run(unet, inputs), student)
    unet.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(run(unet, inputs), teacher)
    unet.set_adapters(["a", "b"], [1.0, 0.6])
    layer = next(m for m in unet.modules() if isinstance(m, LoRaDLayer))
    expected = layer.lorad_A["a"] @ layer.lorad_B["a"] + 0.6 * layer.lorad_A["b"] @ layer.lorad_B["b"]
    torch.testing.assert_close(layer.get_angles(), expected)
    unet.delete_adapters("b")
    assert list(unet.peft_config) == ["a"] and not any("b" in n.split(".") for n in unet.state_dict())


@pytest.mark.parametrize("adapter_names", [None, ["a"], ["b", "a"]])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fuse_and_unfuse(adapter_names, scale):
    unet, inputs = tiny_unet(), unet_inputs()
    for name in ("a", "b"):
        unet.add_adapter(LoRaDConfig(r=4), name)
        fill_adapter(unet, name, seed=ord(name))
    unet.set_adapters(adapter_names or ["a", "b"], [scale] * len(adapter_names or "ab"))
    expected = run(unet, inputs)
    unet.set_adapters(["a", "b"])
    before = state(unet)
    unet.fuse_lora(lora_scale=scale, safe_fusing=True, adapter_names=adapter_names)
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-6, rtol=1e-4)
    unet.unfuse_lora()
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0, msg=name)


def test_training_moves_only_the_adapter_and_keeps_every_row_norm():
    unet = tiny_unet().train()
    base = state(unet)
    unet.add_adapter(LoRaDConfig(r=4))
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(lorad_target_modules(unet))
    optimizer, target = torch.optim.AdamW(trained, lr=0.05), torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(5):
        loss = (unet(**unet_inputs()).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, module in unet.named_modules():
        if isinstance(module, LoRaDLayer):
            weight = module.base_layer.weight
            turned = rotate(weight, module.get_angles())
            assert torch.equal(weight, base[f"{name}.weight"]) and not torch.equal(turned, weight)
            torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1), rtol=1e-6, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        unet.add_adapter(LoRaDConfig(r=4))
        fill_adapter(unet, "default")
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**unet_inputs()).sample.square().mean().backward()
        grads.append([p.grad for p in unet.parameters() if p.requires_grad])
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_state_dict_round_trip(low_cpu_mem_usage):
    unet, inputs = tiny_unet(), unet_inputs()
    unet.add_adapter(LoRaDConfig(r=4, rank_pattern={"to_q": 2}), "one")
    fill_adapter(unet, "one")
    stored = get_peft_model_state_dict(unet, adapter_name="one")
    names = lorad_target_modules(unet)
    assert set(stored) == {f"{name}.lorad_{factor}" for name in names for factor in "AB"}
    assert {t.shape[1] for n, t in stored.items() if n.endswith("to_q.lorad_A")} == {2}

    other = tiny_unet()
    config = LoRaDConfig(r=4, rank_pattern={"to_q": 2}, target_modules=names)
    inject_adapter_in_model(config, other, "two", low_cpu_mem_usage=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        assert all(p.is_meta for n, p in other.named_parameters() if "lorad_" in n)
    result = set_peft_model_state_dict(other, stored, "two", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lorad_" in k]
    assert torch.equal(run(other, inputs), run(unet, inputs))


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(autocast, tmp_path):
    config, x = LoRaDConfig(r=2, target_modules=["lin0"], init_weights=False), torch.randn(3, 10).bfloat16()
    model = get_peft_model(MLP().bfloat16(), config, autocast_adapter_dtype=autocast)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP().bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
    for each in (model, loaded):
        dtypes = {p.dtype for n, p in each.named_parameters() if "lorad_" in n}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        assert each.base_model.model.lin0.get_angles().dtype == torch.float32  # computed so either way
    assert torch.equal(loaded(x), model(x))


def test_default_targets_of_a_transformers_model_may_be_an_expression(monkeypatch):
    mlp = MLP()
    mlp.config = {"model_type": "toy"}
    monkeypatch.setattr(LoRaDModel, "target_module_mapping", {"toy": "lin[01]"})
    model = get_peft_model(mlp, LoRaDConfig(r=2))
    assert model.base_model.targeted_module_names == ["lin0", "lin1"]


def test_low_memory_loading_of_a_half_file_gives_float32_factors():
    mlp = MLP()
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["lin0"]), mlp, "x", low_cpu_mem_usage=True)
    half = {"lin0.lorad_A": torch.ones(20, 2).half(), "lin0.lorad_B": torch.ones(2, 5).half()}
    set_peft_model_state_dict(mlp, half, "x", low_cpu_mem_usage=True)
    assert mlp.lin0.lorad_A["x"].dtype == torch.float32 and mlp.lin0.lorad_A["x"].device == mlp.lin0.weight.device


def test_get_peft_model_trains_saves_loads_merges_and_unloads(tmp_path):
    x, base = torch.randn(3, 10), MLP()
    expected_base = base(x)
    model = get_peft_model(base, LoRaDConfig(target_modules=["lin0", "lin1"], init_weights=False))
    assert model.get_nb_trainable_parameters()[0] == 64 * (20 + 5) + 64 * (2 + 10)
    adapted = model(x)
    assert not torch.allclose(adapted, expected_base)
    with model.disable_adapter():
        assert torch.equal(model(x), expected_base)
    assert model.get_model_status().peft_types == {"default": "LORAD"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path)
    assert torch.equal(loaded(x), adapted)
    loaded.add_adapter("more", LoRaDConfig(r=2, target_modules=["lin1"]))
    loaded.delete_adapter("more")
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), adapted)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged.lin0) is nn.Linear
    torch.testing.assert_close(merged(x), adapted)


def test_biases_and_modules_to_save_train_where_asked():
    model = get_peft_model(
        MLP(), LoRaDConfig(r=2, target_modules=["lin0"], bias="lorad_only", modules_to_save=["lin1"])
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.endswith("lin0.base_layer.bias") for n in trained) and any("modules_to_save" in n for n in trained)
    model(torch.randn(3, 10)).sum().backward()
    assert model.base_model.model.lin0.base_layer.bias.grad is not None


def test_all_linear_patterns_and_ranks():
    mlp = nn.ModuleDict({"layers": nn.ModuleList([MLP(), MLP()])})
    config = LoRaDConfig(r=4, target_modules=["lin0"], layers_to_transform=[1], layers_pattern="layers")
    inject_adapter_in_model(config, mlp)
    assert [n for n, m in mlp.named_modules() if isinstance(m, LoRaDLinear)] == ["layers.1.lin0"]
    mlp = MLP()
    inject_adapter_in_model(
        LoRaDConfig(target_modules="all-linear", exclude_modules=["odd"], rank_pattern={"lin1": 3}), mlp
    )
    assert (mlp.lin0.r, mlp.lin1.r, type(mlp.odd)) == ({"default": 64}, {"default": 3}, nn.Linear)


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            ["nope"],
            r"\['nope'\] not found in the base model. It is a MLP with 3 Linear layers, such as lin0.*full names",
        ),
        ("nope.*", "'nope.*' not found in the base model"),
        (["lin0", "odd"], "even, but `odd` has 3.*exclude_modules"),
        ("all-linear", "even, but `odd` has 3"),
        (["lin0", "norm"], "`norm` is a LayerNorm.*exclude_modules"),
        (None, "Please specify `target_modules`"),
    ],
)
@pytest.mark.parametrize("inject", [get_peft_model, inject_adapter_in_model])
def test_what_cannot_be_adapted_leaves_the_model_as_it_was(targets, message, inject):
    mlp = MLP()
    mlp.norm = nn.LayerNorm(4)
    before, flags = state(mlp), [p.requires_grad for p in mlp.parameters()]
    args = (
        (mlp, LoRaDConfig(target_modules=targets))
        if inject is get_peft_model
        else (LoRaDConfig(target_modules=targets), mlp)
    )
    with pytest.raises(ValueError, match=message):
        inject(*args)
    assert_untouched(mlp, before, flags)
    assert not hasattr(mlp, "peft_config") and not any(isinstance(m, LoRaDLayer) for m in mlp.modules())


@pytest.mark.parametrize("first", [None, "student"])
def test_a_failed_add_adapter_can_be_repeated_under_the_same_name(first):
    unet = tiny_unet()
    if first:
        unet.add_adapter(LoRaDConfig(r=2), first)
        fill_adapter(unet, first)
    before, flags, output = state(unet), [p.requires_grad for p in unet.parameters()], run(unet, unet_inputs())
    with pytest.raises(ValueError, match=r"\['to_x'\] not found in the base model"):
        unet.add_adapter(LoRaDConfig(target_modules=["to_x"]), "new")
    assert_untouched(unet, before, flags)
    assert torch.equal(run(unet, unet_inputs()), output)
    unet.add_adapter(LoRaDConfig(r=2), "new")
    assert list(unet.peft_config) == ([first] if first else []) + ["new"]


@pytest.mark.parametrize("lora_first", [False, True])
def test_a_lora_and_a_lorad_act_together(lora_first):
    unet, inputs = tiny_unet(), unet_inputs()
    configs = {"lora": LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lorad": LoRaDConfig(r=2)}
    torch.manual_seed(3)
    for name in sorted(configs, reverse=not lora_first):
        inject_adapter_in_model(configs[name], unet, name)
    fill_adapter(unet, "lorad")
    both = run(unet, inputs)
    to_q = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    lorad = to_q if lora_first else to_q.base_layer
    lora = to_q.base_layer if lora_first else to_q
    x, inner = torch.randn(3, 16), to_q.get_base_layer()
    expected = (
        x @ rotate(inner.weight, lorad.get_angles()).T
        + lora.lora_B["lora"](lora.lora_A["lora"](x)) * lora.scaling["lora"]
    )
    torch.testing.assert_close(to_q(x), expected)
    assert both.isfinite().all()


def test_pefts_conversion_to_a_lora():
    base = MLP()
    model = get_peft_model(base, LoRaDConfig(r=4, target_modules=["lin0"], init_weights=False)).eval()
    x = torch.randn(3, 10)
    expected, weight = model(x), base.lin0.get_base_layer().weight
    change = rotate(weight, base.lin0.get_angles()) - weight
    torch.testing.assert_close(base.lin0.get_delta_weight("default"), change.detach())
    config, state = convert_to_lora(model, rank=10, progressbar=False)
    lora = get_peft_model(MLP(), config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    torch.testing.assert_close(lora(x), expected, atol=1e-5, rtol=1e-5)
    base.lin0.merge()
    with pytest.raises(ValueError, match="default is merged into the base weight"):
        base.lin0.get_delta_weight("default")


def test_deepcopy_and_pickle_of_an_adapted_model():
    unet, inputs = tiny_unet(), unet_inputs()
    unet.add_adapter(LoRaDConfig(r=2))
    fill_adapter(unet, "default")
    expected = run(unet, inputs)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(run(twin, inputs), expected)
