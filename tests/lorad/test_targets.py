"""Layer sets and parameter counts of the published backbones, against the paper's numbers."""

import pytest
from backbones import PIXART_ALPHA_256, SD15_UNET, SD21_UNET, add_adapter, meta_model, tiny_pixart, tiny_unet
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from reference import reference_parameter_count
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad import DEFAULT_RANKS, LoRaDConfig, lorad_target_modules, trainable_parameter_count
from diffusers_wadi.lorad.targets import adaptable_linears

BACKBONES = {
    "sd15": (UNet2DConditionModel, SD15_UNET),
    "sd21": (UNet2DConditionModel, SD21_UNET),
    "pixart": (PixArtTransformer2DModel, PIXART_ALPHA_256),
}

# backbone, role, layers, rank, trainable parameters: the paper's tables give them in millions
COUNTS = [
    ("sd15", "student", 182, 256, 83_795_968),
    ("sd15", "student", 182, 64, 20_948_992),
    ("sd15", "fake", 160, 32, 9_378_816),
    ("sd21", "student", 214, 256, 94_429_184),
    ("sd21", "fake", 160, 32, 9_509_888),
    ("pixart", "student", 283, 128, 81_219_584),
    ("pixart", "fake", 280, 32, 20_127_744),
]


@pytest.fixture(scope="module")
def backbones():
    return {name: meta_model(*parts) for name, parts in BACKBONES.items()}


def plain_rule(backbone, role):
    """The sets in the reference's words."""
    if backbone == "pixart":
        return (lambda n: "adaln_single" not in n) if role == "student" else (lambda n: "transformer_blocks." in n)
    left_out = () if role == "student" else ("proj_in", "proj_out", "time_emb_proj")
    return lambda n: "_block" in n and not any(part in n for part in left_out)


@pytest.mark.parametrize("backbone, role, layers, r, count", COUNTS)
def test_counts_of_the_paper(backbones, backbone, role, layers, r, count):
    model = backbones[backbone]
    names = lorad_target_modules(model, role)
    assert len(names) == len(set(names)) == layers
    assert trainable_parameter_count(model, names, r) == count
    assert reference_parameter_count(model, plain_rule(backbone, role), r) == count


def test_linear_and_convolutions_of_the_paper(backbones):
    unet = backbones["sd15"]
    names = lorad_target_modules(unet, convolutions=True)
    assert len(names) == len(set(names)) == 182 + 96 and set(lorad_target_modules(unet)) < set(names)
    assert not {"conv_in", "conv_out"} & set(names) and any(name.endswith("conv_shortcut") for name in names)
    assert trainable_parameter_count(unet, names, 256) == 174_891_008
    adapted = meta_model(*BACKBONES["sd15"])
    adapted.add_adapter(LoRaDConfig(r=256, target_modules=names))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 174_891_008
    assert lorad_target_modules(adapted, convolutions=True) == names
    with pytest.raises(ValueError, match="cuts the image into patches"):
        lorad_target_modules(backbones["pixart"], convolutions=True)


@pytest.mark.parametrize("backbone, role, layers, r, count", [COUNTS[0], COUNTS[3], COUNTS[5]])
def test_an_injected_adapter_has_that_many_parameters(backbone, role, layers, r, count):
    model = meta_model(*BACKBONES[backbone])
    names = lorad_target_modules(model, role)
    add_adapter(model, LoRaDConfig(r=r, target_modules=names), role)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert lorad_target_modules(model, role) == names  # adapted layers keep their names
    assert trainable_parameter_count(model, names, r) == count


def test_default_ranks_are_those_of_the_counts():
    assert DEFAULT_RANKS["UNet2DConditionModel"] == {"student": 256, "fake": 32}
    assert DEFAULT_RANKS["PixArtTransformer2DModel"] == {"student": 128, "fake": 32}


@pytest.mark.parametrize("make", [tiny_unet, tiny_pixart])
def test_layers_of_a_lora_are_not_taken_for_layers_of_the_model(make):
    model = make()
    names = lorad_target_modules(model)
    add_adapter(model, LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    assert lorad_target_modules(model) == names


def test_unknown_models_roles_and_names():
    with pytest.raises(ValueError, match="not for Linear.*target_modules"):
        lorad_target_modules(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not for UNet2DModel"):
        lorad_target_modules(meta_model(UNet2DModel, {"block_out_channels": (32, 32, 32, 32)}))
    unet = tiny_unet()
    with pytest.raises(ValueError, match="one of .'student', 'fake'., got 'teacher'"):
        lorad_target_modules(unet, "teacher")
    with pytest.raises(ValueError, match="1 of 2 names.*the first is 'conv_norm_out'"):
        trainable_parameter_count(unet, ["time_embedding.linear_1", "conv_norm_out"], 4)


def test_a_backbone_without_such_layers():
    unet = tiny_unet()
    for part in ("down_blocks", "mid_block", "up_blocks"):
        setattr(unet, part, nn.Identity())
    with pytest.raises(ValueError, match="no Linear layer of the kind the paper adapts for the student"):
        lorad_target_modules(unet)


class Mixed(nn.Module):
    """Layers of every kind; the last four could not be adapted."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin10, self.conv1d = nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4)
        self.block, self.other = nn.ModuleDict({"proj": nn.Linear(4, 4)}), nn.ModuleDict({"proj": nn.Embedding(5, 1)})
        self.embedding, self.conv = nn.Embedding(5, 1), nn.Conv2d(1, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3)


def test_all_linear_looks_at_linear_layers_alone():
    """Every layer that is to be adapted is checked before anything is changed, and no other."""
    model = Mixed()
    names = ["lin1", "lin10", "conv1d", "block.proj", "attention.out_proj"]
    assert [name for name, _ in adaptable_linears(model)] == names
    with pytest.warns(UserWarning, match="attention.out_proj"):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules="all-linear"), model)
    adapted = [name for name, module in model.named_modules() if "default" in getattr(module, "lorad_A", ())]
    assert adapted == names[:4]
    with pytest.raises(ValueError, match="Mixed with 5 Linear layers, such as lin1, lin10, conv1d"):
        inject_adapter_in_model(LoRaDConfig(target_modules=["lin2"]), Mixed())


def test_adapted_layers_count_once_under_their_own_names():
    model = Mixed()
    before = list(adaptable_linears(model))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin1"]), model, "lora")
    assert list(adaptable_linears(model)) == before
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["lin1"]), model, "lorad")  # over the LoRA
    assert list(adaptable_linears(model)) == before


def test_all_linear_leaves_out_what_peft_leaves_out():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=8, **ends))
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules="all-linear"), model)
    assert type(model.lm_head) is nn.Linear and type(model.transformer.h[0].mlp.c_fc) is not Conv1D
