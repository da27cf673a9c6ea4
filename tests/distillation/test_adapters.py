"""What student and fake can be made of: sizes, starts, one update, sharing with the base, files."""

import copy
import json

import pytest
import reference_objectives as plain
import torch
from backbones import PIXART_ALPHA_256, SD15_UNET, SD21_UNET, meta_model, pixart_inputs, tiny_pixart
from conftest import tiny_unet
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from plain_steps import SHAPE, TABLE, B, PlainRole, assert_gradients, disturb, make_steps
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_wadi import LoRaDConfig
from diffusers_wadi.distillation import checkpoint, exporting
from diffusers_wadi.distillation.adapters import INITS, KINDS, AdapterSpec, plain_twin, target_layers
from diffusers_wadi.distillation.networks import WaDiNetworks
from diffusers_wadi.distillation.noise import SampleDraws

X, T, TEXT = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 16)


def make(student: AdapterSpec | None, fake: AdapterSpec | None = None, moved: bool = True) -> WaDiNetworks:
    torch.manual_seed(0)
    networks = WaDiNetworks(tiny_unet(), student, fake or AdapterSpec(rank=2))
    if moved:
        disturb(networks, torch.float32)
    return networks


def outputs(networks: WaDiNetworks) -> list[torch.Tensor]:
    with torch.no_grad():
        return [role(X, T, TEXT) for role in (networks.student, networks.fake, networks.teacher)]


# --- sizes ---

COUNTS = {
    "LoRaD": (SD15_UNET, "student", AdapterSpec("lorad", 256), 83_795_968),
    "LoRaD's fake": (SD15_UNET, "fake", AdapterSpec("lorad", 32), 9_378_816),
    "LoRaD, Linear and Conv": (SD15_UNET, "student", AdapterSpec("lorad", 256, layers="linear_conv"), 174_891_008),
    "LoRA of Tab. 2": (SD15_UNET, "student", AdapterSpec("lora", 256), 120_897_536),
    "DoRA of Tab. 2": (SD15_UNET, "student", AdapterSpec("dora", 256), 121_154_816),
    "DoRA, frozen norm": (SD15_UNET, "student", AdapterSpec("dora_frozen_norm", 256), 120_897_536),
    "full": (SD15_UNET, "student", AdapterSpec("full"), 859_520_964),
    "SwiftBrush's LoRA, SD 1.5": (SD15_UNET, "fake", AdapterSpec("lora", 64, 108, "qv"), 6_377_472),
    "SwiftBrush's LoRA, SD 2.1": (SD21_UNET, "fake", AdapterSpec("lora", 64, 108, "qv"), 6_639_616),
    "LoRaD, SD 2.1": (SD21_UNET, "student", AdapterSpec("lorad", 256), 94_429_184),
    "qkv, SD 2.1": (SD21_UNET, "student", AdapterSpec("lora", 256, layers="qkv"), 40_337_408),
}


@pytest.mark.parametrize("config, role, spec, expected", COUNTS.values(), ids=COUNTS)
def test_trained_parameters(config, role, spec, expected):
    specs = (spec, AdapterSpec(rank=1)) if role == "student" else (AdapterSpec(rank=1), spec)
    networks = WaDiNetworks(meta_model(UNet2DConditionModel, config), *specs)
    assert sum(parameter.numel() for parameter in networks.role_state(role).values()) == expected


@pytest.mark.parametrize("role, rank, expected", [("student", 128, 81_219_584), ("fake", 32, 20_127_744)])
def test_trained_parameters_of_pixart(role, rank, expected):
    specs = [AdapterSpec(rank=rank if other == role else 1) for other in ("student", "fake")]
    networks = WaDiNetworks(meta_model(PixArtTransformer2DModel, PIXART_ALPHA_256), *specs)
    assert sum(parameter.numel() for parameter in networks.role_state(role).values()) == expected


def test_layer_sets():
    unet = meta_model(UNet2DConditionModel, SD15_UNET)
    names = {layers: target_layers(unet, "student", layers) for layers in ("linear", "projections", "qkv", "qv")}
    assert {layers: len(found) for layers, found in names.items()} == {
        "linear": 182,
        "projections": 214,
        "qkv": 96,
        "qv": 64,
    }
    assert target_layers(unet, "fake", "paper", "lora") == target_layers(unet, "fake", "linear")
    with pytest.raises(ValueError, match="layer set 'x' is unknown"):
        target_layers(unet, "student", "x")


# --- start ---


@pytest.mark.parametrize("kind", KINDS)
def test_new_roles_are_the_teacher(kind):
    student, fake, teacher = outputs(make(AdapterSpec(kind, 4), AdapterSpec(kind, 2), moved=False))
    assert torch.allclose(student, teacher, atol=1e-5) and torch.allclose(fake, teacher, atol=1e-5)


STARTS = [(kind, init) for kind, inits in INITS.items() for init in inits]


@pytest.mark.parametrize("kind, init", STARTS)
def test_starts(kind, init):
    networks = make(AdapterSpec(kind, 4, init=init), moved=False)
    student, _, teacher = outputs(networks)
    assert torch.allclose(student, teacher, atol=1e-5) == (init != "xavier")
    state = networks.role_state("student")
    first = next(iter(state)).rpartition("_A")[0]
    if kind == "lorad":
        zero = {"A": init == "paper", "B": init == "zero_b"}
        assert {letter: not state[f"{first}_{letter}"].any() for letter in "AB"} == zero
    else:
        spread = state[f"{first}_A.weight"].std() * state[f"{first}_A.weight"].shape[0]
        assert (0.5 < spread < 1.6) == (init == "gaussian")


# --- one update ---

ADAPTERS = {kind: (kind, "lorad") for kind in KINDS} | {
    f"{kind} fake": ("lorad", kind) for kind in ("lora", "dora", "full", "cayley", "householder")
}
ADAPTERS |= {"both lora": ("lora", "lora"), "dora and lora": ("dora", "lora"), "lora and cayley": ("lora", "cayley")}


SCALED = {f"{name}, alpha 6": (*pair, 6) for name, pair in ADAPTERS.items() if {"lora", "dora"} & set(pair)}
UPDATES = {name: (*pair, None) for name, pair in ADAPTERS.items()} | SCALED


@pytest.mark.parametrize("student, fake, alpha", UPDATES.values(), ids=UPDATES)
def test_one_update_agrees_with_plain_weights(tmp_path, student, fake, alpha):
    """The release's objective; the weights that an adapter stands for are written out in `reference_adapters.py`."""
    flags = ["--proportion_empty_prompts", 0]
    for role, kind in (("student", student), ("fake", fake)):
        flags += [f"--{role}_adapter", kind]
        flags += [f"--{role}_rank", 4] if kind in INITS else []
        flags += [f"--{role}_alpha", alpha] if alpha and kind in ("lora", "dora") else []
    steps = make_steps(tmp_path, *flags)
    steps.vsd_update()
    roles = {role: PlainRole(steps.networks, role) for role in ("teacher", "student", "fake")}
    draws = SampleDraws(0, B)
    draws.next_round()
    words, empty = steps.embeddings.texts[steps.order._permutation[:B]], steps.embeddings.empty[0]
    z, noise = draws.normal("z", SHAPE).double(), draws.normal("noise", SHAPE).double()
    images = [plain.one_step(roles["student"].predict, z[i], words[i], TABLE) for i in range(B)]
    t = draws.integers("t", 20, 980).tolist()
    networks = (roles["teacher"].predict, roles["fake"].predict)
    loss = plain.student_loss("wadi", images, *networks, TABLE, words, empty, t, noise, [1.5] * B, [1.5] * B)
    assert_gradients(steps.taken[0][1], roles["student"].gradients(loss))
    draws.next_round()
    t, noise = draws.integers("fake_t", 0, 999).tolist(), draws.normal("fake_noise", SHAPE).double()
    loss = plain.fake_loss("wadi", images, roles["fake"].predict, TABLE, words, empty, t, noise)
    assert_gradients(steps.taken[1][1], roles["fake"].gradients(loss))


# --- one base ---


@pytest.mark.parametrize("student, fake", ADAPTERS.values(), ids=ADAPTERS)
def test_roles_do_not_leak_into_one_another(student, fake):
    networks = make(AdapterSpec(student, 4), AdapterSpec(fake, 2))
    before = outputs(networks)
    for moved, others in (("student", (1, 2)), ("fake", (0, 2))):
        with torch.no_grad():
            for name, parameter in networks.role_state(moved).items():
                parameter.add_(0.1 * torch.ones_like(parameter).tril(-1) if ".turn." in name else 0.1)
        now = outputs(networks)
        assert all(torch.equal(now[i], before[i]) for i in others)
        assert not torch.allclose(now[1 if moved == "fake" else 0], before[1 if moved == "fake" else 0], atol=1e-3)
        before = now


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_is_one_set_of_tensors(kind):
    base = tiny_unet()
    storages = {p.data_ptr() for p in base.parameters()}
    networks = WaDiNetworks(base, AdapterSpec(kind, 4), AdapterSpec("lora", 2))
    trained = {p.data_ptr() for role in ("student", "fake") for p in networks.role_state(role).values()}
    for role in ("student", "fake", "teacher"):
        own = {p.data_ptr() for n, p in networks.network(role).named_parameters() if "magnitude" not in n}
        assert own - trained <= storages
    assert not trained & storages
    trained_ids = {id(p) for role in ("student", "fake") for p in networks.role_state(role).values()}
    models = [networks.network(role) for role in ("student", "fake")]
    assert {id(p) for model in models for p in model.parameters() if p.requires_grad} == trained_ids


@pytest.mark.parametrize("kind", ["full", "cayley", "lora", "dora"])
def test_half_precision_base_keeps_trained_float32(kind):
    base = tiny_unet().to(torch.bfloat16)
    networks = WaDiNetworks(
        base, AdapterSpec(kind, 4), AdapterSpec(rank=2), lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert all(p.dtype == torch.float32 for p in networks.student_parameters())
    assert networks.student(X, T, TEXT).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    gradients = []
    for checkpointing in (False, True):
        networks = make(AdapterSpec(kind, 4))
        if checkpointing:
            networks.enable_gradient_checkpointing()
        loss = networks.student(X, T, TEXT).square().mean()
        with torch.no_grad():
            networks.fake(X, T, TEXT)
        loss.backward()
        gradients.append([p.grad for p in networks.student_parameters()])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(*gradients))


def test_a_network_of_its_own_beside_a_loaded_adapter():
    unet = tiny_unet()
    unet.add_adapter(LoRaDConfig(r=2, target_modules=["to_q"]), "student")
    networks = WaDiNetworks(unet, None, AdapterSpec("full"))
    disturb(networks, torch.float32)
    plain_names = set(dict(tiny_unet().named_parameters()))
    assert set(networks.role_state("fake")) == plain_names and networks.network("fake") is not unet
    assert not hasattr(plain_twin(unet), "peft_config") and unet.peft_config


def test_convolutions_have_no_orthogonal_map():
    with pytest.raises(ValueError, match="is a Conv2d; cayley turns the inputs of Linear layers"):
        make(AdapterSpec("cayley", layers="linear_conv"))


# --- files ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_keeps_comes_back_bit_for_bit(tmp_path, kind):
    networks = make(AdapterSpec(kind, 4), AdapterSpec(kind, 2))
    expected = outputs(networks)
    base = copy.deepcopy(plain_twin(networks.model))
    torch.manual_seed(9)  # other random starts than those of the run that is resumed
    resumed = WaDiNetworks(base, AdapterSpec(kind, 4), AdapterSpec(kind, 2))
    for role in ("student", "fake"):
        checkpoint.save_role(networks, role, tmp_path / role, "base")
        checkpoint.load_role(resumed, role, tmp_path / role)
        saved, loaded = networks.role_state(role), resumed.role_state(role)
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert all(torch.equal(*pair) for pair in zip(outputs(resumed), expected))


def exported(networks: WaDiNetworks, folder, component: str = "unet", dtype=torch.float32) -> list[str]:
    return exporting.export_role(networks, "student", folder, component, "base", dtype)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora_frozen_norm"])
def test_lora_is_exported_as_stock_diffusers_reads_it(tmp_path, components, kind):
    torch.manual_seed(0)
    networks = WaDiNetworks(copy.deepcopy(components["unet"]), AdapterSpec(kind, 4, 6.0), AdapterSpec(rank=2))
    disturb(networks, torch.float32)
    student, _, teacher = outputs(networks)
    assert exported(networks, tmp_path) == ["pytorch_lora_weights.safetensors"]
    pipe = StableDiffusionPipeline(**components)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        loaded = pipe.unet(X, T, TEXT).sample
    assert torch.allclose(loaded, student, atol=1e-5) and not torch.allclose(loaded, teacher, atol=1e-2)
    # Without alpha in the file, diffusers would take the rank.
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 6.0


@pytest.mark.parametrize("kind", ["full", "matrix_exp", "cayley", "householder"])
def test_others_are_exported_as_a_whole_denoiser(tmp_path, kind):
    networks = make(AdapterSpec(kind))
    student, _, teacher = outputs(networks)
    assert exported(networks, tmp_path) == ["unet"]
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        same = loaded(X, T, TEXT).sample
    assert torch.allclose(same, student, atol=1e-5) and not torch.allclose(same, teacher, atol=1e-2)
    assert torch.equal(outputs(networks)[0], student)  # the networks are as they were
    exported(networks, tmp_path / "half", dtype=torch.float16)
    half = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["lora", "dora", "cayley", "full"])
def test_pixart_has_no_lora_loader_and_gets_merged_weights(tmp_path, kind):
    call = lambda model, x, t, text: model(  # noqa: E731
        x, text, t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False
    )[0]
    networks = WaDiNetworks(tiny_pixart(), AdapterSpec(kind, 4), AdapterSpec(rank=2), call=call)
    disturb(networks, torch.float32)
    inputs = pixart_inputs()
    given = inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"]
    with torch.no_grad():
        student, teacher = networks.student(*given), networks.teacher(*given)
    assert exported(networks, tmp_path, "transformer") == ["transformer"]
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        same = call(loaded, *given)
        assert torch.equal(networks.teacher(*given), teacher)
    assert torch.allclose(same, student, atol=1e-5) and not torch.allclose(same, teacher, atol=1e-2)
