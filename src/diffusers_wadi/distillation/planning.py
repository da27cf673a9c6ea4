"""What a run would do, without doing it: `--dry_run`. No weights are loaded and nothing is written."""

from __future__ import annotations

import argparse
import math
import shutil
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from . import setup
from .adapters import adapter_specs
from .backbones import Backbone, PixArtBackbone
from .flags import DTYPES
from .networks import FAKE, STUDENT, TEACHER, WaDiNetworks
from .regression import RegressionPairs
from .steps import WaDiSteps
from .text_encoders import PIXART_MAX_LENGTH

META = torch.device("meta")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are still alive, and their peak.

    Real tensors and those of the meta device alike. An allocator's waste and the work spaces of libraries come on top.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {_storage(t)._cdata for t in tree_leaves((arguments, keywords)) if isinstance(t, Tensor)}
        result = function(*arguments, **keywords or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor)._cdata not in given:
                self._count(_storage(tensor))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def as_under_autocast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the layers of ``model`` the dtypes of autocast on a GPU, since the meta device has none.

    Linear layers and convolutions compute in ``dtype``; norms compute and answer in float32.
    """
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.forward = partial(_wide_norm, module)
        elif isinstance(module, BaseTunerLayer):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            module.forward = partial(_low_product, module, dtype)


def _low_product(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype, x: Tensor) -> Tensor:
    x, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, layer.weight, layer.bias))
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)


def _wide_norm(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


class _FusedAttention(torch.autograd.Function):
    """What torch's fused attention keeps and makes: never the matrix of scores, which the meta device would count."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@dataclass(frozen=True)
class Plan:
    """What a run will take. Memory in bytes, for each process; ``memory`` by its parts, on the device."""

    teacher: str
    trainable: dict[str, int]
    prompts: int
    updates: dict[str, int]
    images_per_update: int
    memory: dict[str, int]
    checkpoint_bytes: int
    checkpoints: int
    kept: int
    free_bytes: int

    @property
    def images(self) -> int:
        """Images of the student that score distillation looks at."""
        return self.updates["score distillation"] * self.images_per_update

    def __str__(self) -> str:
        updates = ", ".join(f"{count:,} of {name}" for name, count in self.updates.items() if count)
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.memory.items() if size)
        roles = ", ".join(f"{role} {count:,} trainable parameters" for role, count in self.trainable.items())
        kept = f"{self.kept} kept: {self.kept * self.checkpoint_bytes / 1e9:.2f} GB"
        lines = {
            "teacher": self.teacher,
            "roles": roles,
            "updates": updates or "none",
            "images": f"{self.images:,} ({self.images_per_update:,} an update), {self.prompts:,} prompts: "
            f"{self.images / self.prompts:.2f} epochs",
            "memory": f"about {sum(self.memory.values()) / 1e9:.2f} GB on each device: {parts}",
            "disk": f"{self.checkpoints:,} checkpoints of {self.checkpoint_bytes / 1e9:.2f} GB, {kept}; "
            f"{self.free_bytes / 1e9:.2f} GB are free",
        }
        return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of the run that checked flags ``args`` ask for.

    Prompts are read and counted. Networks are made of shapes alone, and an update is run on them to see what memory its
    tensors take; what the device's allocator and libraries add is not in it.
    """
    state = PartialState()
    backbone = setup.make_backbone(args, META)
    schedule = setup.load_schedule(args, backbone)
    store = setup.load_prompts(args, SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None))
    base_dtype = setup.base_dtype(args, state.device)
    networks = _networks_of_shapes(args, backbone, base_dtype, setup.plain_attention(args, state.device))
    trainable = {role: sum(p.numel() for p in networks.role_state(role).values()) for role in (STUDENT, FAKE)}
    per_update = args.train_batch_size * args.gradient_accumulation_steps * state.num_processes
    updates = _updates(args, len(store), per_update)
    steps = _steps_of_shapes(args, backbone, networks, schedule, len(store))
    checkpoints = math.ceil(sum(updates.values()) / args.checkpointing_steps)
    return Plan(
        teacher=f"{args.pretrained_teacher_model} ({type(networks.model).__name__}, {backbone.prediction_type})",
        trainable=trainable,
        prompts=len(store),
        updates=updates,
        images_per_update=per_update,
        memory=_memory(args, backbone, networks, trainable, steps, base_dtype),
        checkpoint_bytes=_checkpoint_bytes(args, trainable),
        checkpoints=checkpoints,
        kept=min(checkpoints, args.checkpoints_total_limit or checkpoints),
        free_bytes=shutil.disk_usage(_existing(Path(args.output_dir))).free,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _updates(args: argparse.Namespace, prompts: int, per_update: int) -> dict[str, int]:
    steps = args.max_train_steps
    return {
        "regression": args.warmup_regression_steps,
        "the fake alone": args.fake_warmup_steps,
        "score distillation": args.num_train_epochs * math.ceil(prompts / per_update) if steps is None else steps,
    }


def _networks_of_shapes(
    args: argparse.Namespace, backbone: Backbone, base_dtype: torch.dtype, plain_attention: bool
) -> WaDiNetworks:
    """Without numbers; in the dtype of autocast where that is on, whatever the base is kept in."""
    low = DTYPES.get(args.mixed_precision)
    backbone.dtype = base_dtype if low is None else low
    with META:
        model = _cast(backbone.denoiser_class.from_config(backbone.config), backbone.dtype)
        if plain_attention:
            model.set_attn_processor(AttnProcessor())
        networks = WaDiNetworks(model.requires_grad_(False).eval(), *adapter_specs(args), call=backbone.eps)
    if low is not None:
        for network in {id(n): n for n in map(networks.network, (STUDENT, FAKE, TEACHER))}.values():
            as_under_autocast(network, low)
    if args.gradient_checkpointing:
        networks.enable_gradient_checkpointing()
    return networks


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(model, dtype)  # diffusers' own warns, though there is nothing to warn of


def _text_encoder_config(backbone: Backbone):
    return AutoConfig.from_pretrained(backbone.teacher, subfolder="text_encoder", revision=backbone.revision)


def _text_shape(backbone: Backbone) -> tuple[int, int]:
    """(L, D) of the text that the denoiser gets, a mask in the last channel included."""
    if isinstance(backbone, PixArtBackbone):
        return backbone.max_sequence_length or PIXART_MAX_LENGTH, backbone.config["caption_channels"] + 1
    return _text_encoder_config(backbone).max_position_embeddings, backbone.config["cross_attention_dim"]


class _TextOfShapes:
    """In place of the prompts' embeddings."""

    def __init__(self, count: int, length: int, width: int):
        self.count, self.empty = count, torch.zeros(1, length, width, device=META)

    def __len__(self) -> int:
        return self.count

    def at(self, indices: Tensor) -> Tensor:
        return self.empty.expand(len(indices), -1, -1).contiguous()


class _NoOptimizer:
    """Stands where accelerate puts an optimiser; the guard leaves the stepping to its "scaler"."""

    scaler = True

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _steps_of_shapes(args: argparse.Namespace, backbone: Backbone, networks: WaDiNetworks, schedule, prompts: int):
    one_process = SimpleNamespace(
        device=META,
        process_index=0,
        num_processes=1,
        scaler=None,
        prepare_optimizer=_NoOptimizer,
        unscale_gradients=lambda optimizer: None,
        backward=lambda loss: loss.backward(),
    )
    length, width = _text_shape(backbone)
    text = _TextOfShapes(prompts, length, width)
    shape, count = backbone.latent_shape(args.resolution), args.train_batch_size
    pairs = None
    if args.warmup_regression_steps or args.regression_weight:
        pairs = RegressionPairs(torch.zeros(count, *shape), torch.zeros(count, *shape), torch.zeros(count).long())
    return WaDiSteps(args, one_process, networks, schedule, text, shape, pairs, 1)


def _memory(
    args: argparse.Namespace,
    backbone: Backbone,
    networks: WaDiNetworks,
    trainable: dict[str, int],
    steps: WaDiSteps,
    base_dtype: torch.dtype,
) -> dict[str, int]:
    moments = _bytes_of_moments(args)
    own = {id(p) for role in (STUDENT, FAKE) for p in networks.role_state(role).values()}
    return {
        "frozen base": sum(p.numel() for p in networks.model.parameters() if id(p) not in own) * base_dtype.itemsize,
        "student and Adam": trainable[STUDENT] * (4 + moments),
        "fake and Adam": trainable[FAKE] * (4 + moments),
        "average": trainable[STUDENT] * 4 * args.use_ema,
        **_bytes_of_other_models(args, backbone, base_dtype),
        "activations and gradients": _update_bytes(steps, args),
    }


def _bytes_of_moments(args: argparse.Namespace) -> int:
    """Of Adam, for each parameter."""
    return 2 if args.use_8bit_adam else 8


def _bytes_of_other_models(args: argparse.Namespace, backbone: Backbone, base_dtype: torch.dtype) -> dict[str, int]:
    """VAE and, unless its work is done before, text encoder."""
    config = AutoencoderKL.load_config(backbone.teacher, subfolder="vae", revision=backbone.revision)
    with META:
        models = {"VAE": _cast(AutoencoderKL.from_config(config), base_dtype)}
        if not args.precompute_text_embeddings:
            encoder = getattr(transformers, backbone.index["text_encoder"][1])(_text_encoder_config(backbone))
            usual = base_dtype if isinstance(backbone, PixArtBackbone) else torch.float32
            models["text encoder"] = _cast(encoder, DTYPES.get(args.text_encoder_dtype, usual))
    return {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}


def _update_bytes(steps: WaDiSteps, args: argparse.Namespace) -> int:
    """Peak of the tensors that an update makes."""
    fused = mock.patch.object(
        F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _FusedAttention.apply(q, k, v)
    )
    with fused, LiveMemory() as memory:
        if args.warmup_regression_steps:
            steps.warmup_update()
        steps.vsd_update()
    return memory.peak


def _checkpoint_bytes(args: argparse.Namespace, trainable: dict[str, int]) -> int:
    """Weights and Adam's moments of both roles; the average as tensors and as an adapter."""
    moments = _bytes_of_moments(args)
    warmup = trainable[STUDENT] * moments if args.warmup_regression_steps else 0
    average = trainable[STUDENT] * 8 * args.use_ema
    return sum(trainable.values()) * (4 + moments) + warmup + average
