"""What the student or the fake may be made of: the adapters that the paper compares (Tables 2, 7 and 8).

A kind is either a PEFT adapter on the base that all roles share, or a network of its own that shares what is frozen
with the base. To add one, name it in :data:`KINDS` and give :meth:`AdapterSpec.config` its PEFT configuration, or
:meth:`AdapterSpec.network` the way to make its network.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..lorad import LoRaDConfig, lorad_target_modules
from .orthogonal import ORTHOGONAL_MAPS, turn_linears

LORA_KINDS = ("lora", "dora", "dora_frozen_norm")
OWN_NETWORKS = ("full", *ORTHOGONAL_MAPS)
KINDS = ("lorad", *LORA_KINDS, *OWN_NETWORKS)
LAYER_SETS = ("paper", "linear", "linear_conv", "projections", "qkv", "qv")
# Kind -> starts that it knows; "paper" is the teacher itself for all of them.
INITS = {"lorad": ("paper", "xavier", "zero_b"), **dict.fromkeys(LORA_KINDS, ("paper", "gaussian"))}

_QKV = ("to_q", "to_k", "to_v")
# The LoRA and DoRA of the paper's Tab. 2 (120.9 M and 121.2 M for SD 1.5 at rank 256), with SD 1.5's 1x1 convolutions.
_PROJECTIONS = (*_QKV, "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "proj_in", "proj_out")
_SUFFIXES = {"projections": _PROJECTIONS, "qkv": _QKV, "qv": ("to_q", "to_v")}
_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")


@dataclass(frozen=True)
class AdapterSpec:
    """One role's adapter.

    Args:
        kind: one of :data:`KINDS`. ``"dora_frozen_norm"`` is DoRA whose magnitudes stay those of the base.
        rank: of LoRaD, LoRA and DoRA.
        alpha: of LoRA and DoRA, whose change is scaled by alpha / rank. Default ``None``: the rank.
        layers: one of :data:`LAYER_SETS`, see :func:`target_layers`. Default ``"paper"``.
        init: one of ``INITS[kind]``: ``"paper"`` (default) starts as the teacher; ``"xavier"`` draws both factors of
            LoRaD (Tab. 8); ``"zero_b"`` is LoRaD with B zero in place of A (the paper's text; ``"paper"`` is the
            release); ``"gaussian"`` draws LoRA's A normal.
    """

    kind: str = "lorad"
    rank: int = 256
    alpha: float | None = None
    layers: str = "paper"
    init: str = "paper"

    def __post_init__(self) -> None:
        inits = INITS.get(self.kind, ("paper",))
        for name, allowed in (("kind", KINDS), ("layers", LAYER_SETS), ("init", inits)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not possible for {self.kind}, expected one of {', '.join(allowed)}."
                )
        if self.alpha is not None and self.kind not in LORA_KINDS:
            raise ValueError(f"alpha is {self.alpha}, but only {', '.join(LORA_KINDS)} have it, not {self.kind}.")
        if self.kind == "full" and self.layers != "paper":
            raise ValueError(f"layers is {self.layers!r}, but 'full' trains every parameter. Leave it out.")

    @property
    def owns_network(self) -> bool:
        """Whether the role calls a network of its own, not the shared base."""
        return self.kind in OWN_NETWORKS

    def targets(self, model: nn.Module, role: str) -> list[str]:
        """Full names of the layers, for ``role`` of ``model``."""
        return target_layers(model, role, self.layers, self.kind)

    def config(self, model: nn.Module, role: str) -> PeftConfig:
        """The PEFT configuration, for ``role`` of ``model``."""
        targets = self.targets(model, role)
        if self.kind == "lorad":
            return LoRaDConfig(r=self.rank, target_modules=targets, init_lorad_weights="xavier" != self.init)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=targets,
            init_lora_weights=True if self.init == "paper" else self.init,
            use_dora=self.kind != "lora",
        )

    def network(self, model: nn.Module, role: str) -> nn.Module:
        """A network of its own for ``role``, on the tensors of ``model``."""
        own = plain_twin(model)
        if self.kind == "full":
            _own_parameters(own)
        else:
            turn_linears(own, self.targets(own, role), self.kind)
        return own

    def finish(self, parameters: dict[str, nn.Parameter]) -> None:
        """Set what the PEFT configuration cannot say in the new adapter's ``parameters``, by name."""
        for name, parameter in parameters.items():
            # PEFT takes LoRA's dtype from the base, and updates of 1e-4 do not survive 16 bits.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            frozen = self.kind == "dora_frozen_norm" and "lora_magnitude_vector" in name
            parameter.requires_grad_(not frozen)
            if self.init == "zero_b" and not parameter.is_meta:
                nn.init.xavier_uniform_(parameter) if "lorad_A" in name else nn.init.zeros_(parameter)


def adapter_specs(args: argparse.Namespace) -> tuple[AdapterSpec, AdapterSpec]:
    """What the flags of `training/train_wadi.py` say that student and fake are made of.

    Raises:
        ValueError: flags that do not go together, by name.
    """
    if args.student_convolutions and args.student_layers != "paper":
        raise ValueError(
            f"--student_convolutions is short for --student_layers linear_conv, but that is {args.student_layers!r}."
        )
    layers = "linear_conv" if args.student_convolutions else args.student_layers
    student = (args.student_adapter, args.student_rank, args.student_alpha, layers, args.student_init)
    fake = (args.fake_adapter, args.fake_rank, args.fake_alpha, args.fake_layers, args.fake_init)
    return _spec("student", *student), _spec("fake", *fake)


def _spec(role: str, *settings) -> AdapterSpec:
    try:
        return AdapterSpec(*settings)
    except ValueError as error:
        raise ValueError(f"--{role}_adapter {settings[0]}: {error}") from None


def target_layers(model: nn.Module, role: str, layers: str = "paper", kind: str = "lorad") -> list[str]:
    """Full names of the layers of a set, in the model's order.

    Args:
        model: a UNet2DConditionModel or PixArtTransformer2DModel.
        role: "student" or "fake".
        layers: ``"linear"``: LoRaD's set of the paper for that role; ``"linear_conv"``: and a UNet's convolutions
            (Tab. 7); ``"projections"``: all attention, feed-forward, time and in/out projections in the blocks,
            Linear or 1x1 convolution (LoRA's and DoRA's set of Tab. 2); ``"qkv"``: to_q, to_k, to_v; ``"qv"``: to_q and
            to_v (SwiftBrush's fake); ``"paper"``: ``"projections"`` for a LoRA or DoRA student, else ``"linear"``.
        kind: of the adapter.

    Raises:
        ValueError: an unknown set, or a model in which it is empty.
    """
    if layers == "paper":
        layers = "projections" if kind in LORA_KINDS and role == "student" else "linear"
    if layers in ("linear", "linear_conv"):
        return lorad_target_modules(model, role=role, convolutions=layers == "linear_conv")
    if layers not in _SUFFIXES:
        raise ValueError(f"layer set {layers!r} is unknown, expected one of {', '.join(LAYER_SETS)}.")
    ends = tuple(f".{suffix}" for suffix in _SUFFIXES[layers])
    names = [
        name
        for name, module in plain_layers(model)
        if name.endswith(ends) and any(block in name for block in _BLOCKS) and _is_matrix(module)
    ]
    if not names:
        raise ValueError(f"This {type(model).__name__} has no layers of the set {layers!r}.")
    return names


def plain_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) as they are without adapters."""
    found, inside = [], ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            module = module.get_base_layer()
        found.append((name, module))
    return found


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def plain_twin(model: nn.Module) -> nn.Module:
    """Another module tree over the same parameters and buffers, without adapters: it costs next to no memory."""
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    twin = copy.deepcopy(model, shared)
    for name, layer in plain_layers(twin):
        if isinstance(twin.get_submodule(name), BaseTunerLayer):
            twin.set_submodule(name, layer)
    if hasattr(twin, "peft_config"):
        del twin.peft_config
        twin._hf_peft_config_loaded = False
    return twin


def _own_parameters(model: nn.Module) -> None:
    """Give ``model`` trainable float32 (or wider) copies of its parameters; tied ones stay tied."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in copies:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                copies[id(parameter)] = nn.Parameter(parameter.detach().to(wide, copy=True))
            module._parameters[name] = copies[id(parameter)]
