"""Teacher, student and fake-score network as one frozen UNet with two LoRaD adapters.

Both adapters off is the teacher, ``student`` on the one-step generator, ``fake`` on the fake score. The authors'
release holds three networks instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"


class WaDiNetworks:
    """One UNet in three roles, each a ``Predict`` of :mod:`~diffusers_wadi.distillation.losses`.

    Args:
        unet: a diffusers UNet; it is frozen and gets the adapters ``student`` and ``fake``.
        student_config: LoRaD configuration of the student; ``None`` if ``unet`` already carries that adapter.
        fake_config: LoRaD configuration of the fake-score network; its layers may be a part of the student's.
        autocast: makes the context in which every forward pass runs, e.g. ``accelerator.autocast``.

    Raises:
        ValueError: ``student_config`` is ``None`` and there is no adapter ``student``.
    """

    def __init__(
        self,
        unet: nn.Module,
        student_config: PeftConfig | None,
        fake_config: PeftConfig,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.unet = unet
        self.autocast = autocast
        # Read before the adapters exist: their float32 parameters would hide a half-precision base.
        self.base_dtype = next(unet.parameters()).dtype
        unet.requires_grad_(False)
        if student_config is not None:
            unet.add_adapter(student_config, adapter_name=STUDENT)
        with warnings.catch_warnings():
            # PEFT warns of a second adapter in one model, which is the point here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            unet.add_adapter(fake_config, adapter_name=FAKE)
        self._layers = [(layer, _adapters_of(layer)) for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
        if not self.adapter_state(STUDENT):
            raise ValueError("The UNet has no adapter 'student': pass student_config or load one first.")
        # PEFT leaves only the last added adapter trainable; here both train, in turn.
        for parameter in self.student_parameters() + self.fake_parameters():
            parameter.requires_grad_(True)
        self.select(STUDENT)

    def select(self, role: str) -> None:
        """Make ``role`` the active one. Neither gradient flags nor weights are touched, so it costs nothing."""
        for layer, names in self._layers:
            # A layer without this role's adapter acts as the base (the fake's layers are fewer than the student's).
            layer._disable_adapters = role not in names
            layer._active_adapter = [role]
        self.role = role

    @contextmanager
    def selected(self, role: str) -> Iterator[None]:
        """``role`` inside the block, the former role after it."""
        former = self.role
        self.select(role)
        try:
            yield
        finally:
            self.select(former)

    def _predict(self, role: str, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.select(role)
        with self.autocast():
            return self.unet(x_t.to(self.base_dtype), t, text.to(self.base_dtype), return_dict=False)[0]

    def student(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the student, (B, C, H, W)."""
        return self._predict(STUDENT, x_t, t, text)

    def fake(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the fake-score network, (B, C, H, W)."""
        return self._predict(FAKE, x_t, t, text)

    def teacher(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the teacher, (B, C, H, W)."""
        return self._predict(TEACHER, x_t, t, text)

    def student_parameters(self) -> list[nn.Parameter]:
        """The student's A and B, in the order of the UNet's parameters."""
        return list(self.adapter_state(STUDENT).values())

    def fake_parameters(self) -> list[nn.Parameter]:
        """The fake's A and B, in the order of the UNet's parameters."""
        return list(self.adapter_state(FAKE).values())

    def adapter_state(self, role: str) -> dict[str, nn.Parameter]:
        """``<module path>.lorad_A`` / ``.lorad_B`` -> the live parameter of that role."""
        suffix = f".{role}"
        return {
            name.removesuffix(suffix): parameter
            for name, parameter in self.unet.named_parameters()
            if name.endswith(suffix) and ".lorad_" in name
        }

    @torch.no_grad()
    def load_adapter_state(self, role: str, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the existing parameters of ``role`` (optimisers keep pointing at them).

        Raises:
            ValueError: other names or shapes than this role's; nothing has been copied then.
        """
        live = self.adapter_state(role)
        wrong = [name for name in sorted(live.keys() | state.keys()) if _shape(live, name) != _shape(state, name)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(live)} tensors do not fit the {role}; first {wrong[0]}: the file has "
                f"{_shape(state, wrong[0])}, the network {_shape(live, wrong[0])}. Use the rank and the teacher of "
                "the run that wrote it."
            )
        for name, parameter in live.items():
            parameter.copy_(state[name])

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, under the role that was active in forward.

        Without that, the student's blocks would be recomputed as whatever network ran last before ``backward``.
        """

        def role_keeping_checkpoint(function, *args):
            role = self.role
            contexts = lambda: (nullcontext(), self.selected(role))  # noqa: E731
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

        self.unet.train()  # diffusers' blocks checkpoint in training mode only
        self.unet.enable_gradient_checkpointing(role_keeping_checkpoint)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the UNet with ``torch.compile``: one variant for each role, batch size and gradient mode."""
        # Each variant is a recompilation for a guard on the layers' state; 8, torch's limit, would be too few.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.unet.compile(backend=backend)


def _adapters_of(layer: BaseTunerLayer) -> frozenset[str]:
    return frozenset(name for group in layer.adapter_layer_names for name in getattr(layer, group))


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
