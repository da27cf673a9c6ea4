"""Teacher, student and fake-score network on one frozen base.

Where student and fake are PEFT adapters (LoRaD, LoRA, DoRA), both sit in the same model: both off is the teacher,
``student`` on the one-step generator, ``fake`` on the fake score. The authors' release holds three networks instead.
Full fine-tuning and orthogonal maps have a model of their own, which shares with the base whatever is frozen.
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

from .._adapter_ops import add_adapter
from .adapters import AdapterSpec, plain_twin

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"
Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class WaDiNetworks:
    """One base in three roles, each a ``Predict`` of :mod:`~diffusers_wadi.distillation.losses`.

    Args:
        model: a diffusers denoiser; it is frozen and gets the adapters.
        student: what the student is made of; ``None`` if ``model`` already carries an adapter of that name.
        fake: what the fake-score network is made of; its layers may be a part of the student's.
        autocast: makes the context in which every forward pass runs, e.g. ``accelerator.autocast``.
        call: (model, x_t, t, text) -> eps, e.g. :meth:`~diffusers_wadi.distillation.backbones.Backbone.eps`. Default
            ``None``: a UNet's call in the base's dtype.

    Attributes:
        model: the base, with the adapters that are PEFT's.
        specs: role -> :class:`~diffusers_wadi.distillation.adapters.AdapterSpec`, where one was given.

    Raises:
        ValueError: ``student`` is ``None`` and there is no adapter ``student``.
    """

    def __init__(
        self,
        model: nn.Module,
        student: AdapterSpec | PeftConfig | None,
        fake: AdapterSpec | PeftConfig,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        call: Call | None = None,
    ):
        self.model = model
        self.autocast = autocast
        # Read before the adapters exist: their float32 parameters would hide a half-precision base.
        self.base_dtype = next(model.parameters()).dtype
        self._call = call or self._call_unet
        model.requires_grad_(False)
        self.specs = {role: spec for role, spec in ((STUDENT, student), (FAKE, fake)) if isinstance(spec, AdapterSpec)}
        self._models = {TEACHER: model}
        # A copy that has to own the base's layers is made while they are free of adapters.
        for role, made_of in ((STUDENT, student), (FAKE, fake)):
            self._models[role] = self._make(role, made_of)
        self._layers = [(layer, _adapters_of(layer)) for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        if not self.role_state(STUDENT):
            raise ValueError("The model has no adapter 'student': pass student or load one first.")
        # PEFT leaves only the last added adapter trainable; here both train, in turn.
        for parameter in self.student_parameters() + self.fake_parameters():
            parameter.requires_grad_(True)
        self.select(STUDENT)

    @property
    def unet(self) -> nn.Module:
        """The base; the name from when it always was a UNet."""
        return self.model

    def network(self, role: str) -> nn.Module:
        """The model that ``role`` calls: the base, or its own. :meth:`select` the role before using it."""
        return self._models[role]

    def owns_network(self, role: str) -> bool:
        """Whether ``role`` calls a model of its own."""
        return self._models[role] is not self.model

    def _make(self, role: str, made_of: AdapterSpec | PeftConfig | None) -> nn.Module:
        if made_of is None:
            return self.model
        spec = made_of if isinstance(made_of, AdapterSpec) else None
        if spec is not None and spec.owns_network:
            return spec.network(self.model, role)
        config = made_of if spec is None else spec.config(self.model, role)
        present = getattr(self.model, "peft_config", None) or {}
        # PEFT would put one method's layers inside the other's: both right, but two matrix products more.
        alike = all(type(other) is type(config) for other in present.values())
        model = self.model if alike else plain_twin(self.model)
        with warnings.catch_warnings():
            # PEFT warns of a second adapter in one model, which is the point here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            add_adapter(model, config, role)
        (spec or AdapterSpec()).finish(_adapter_parameters(model, role))
        return model

    def _call_unet(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model(x_t.to(self.base_dtype), t, text.to(self.base_dtype), return_dict=False)[0]

    # --- the roles ---

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

    @contextmanager
    def frozen(self, role: str) -> Iterator[None]:
        """Inside the block gradients flow through ``role`` to its input, but none is kept for its parameters."""
        parameters = list(self.role_state(role).values())
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def predict(self, role: str, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of ``role``, (B, C, H, W)."""
        self.select(role)
        with self.autocast():
            return self._call(self._models[role], x_t, t, text)

    def student(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the student, (B, C, H, W)."""
        return self.predict(STUDENT, x_t, t, text)

    def fake(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the fake-score network, (B, C, H, W)."""
        return self.predict(FAKE, x_t, t, text)

    def teacher(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """eps of the teacher, (B, C, H, W)."""
        return self.predict(TEACHER, x_t, t, text)

    # --- their parameters ---

    def student_parameters(self) -> list[nn.Parameter]:
        """What the student trains, in the order of the model's parameters."""
        return list(self.role_state(STUDENT).values())

    def fake_parameters(self) -> list[nn.Parameter]:
        """What the fake trains, in the order of the model's parameters."""
        return list(self.role_state(FAKE).values())

    def role_state(self, role: str) -> dict[str, nn.Parameter]:
        """Name -> live parameter of all that ``role`` trains.

        LoRaD: ``<module path>.lorad_A`` and ``.lorad_B``; LoRA and DoRA: ``<module path>.lora_A.weight`` and so on, as
        PEFT names them in files; full and orthogonal: the names in the role's own model.
        """
        model, spec = self._models[role], self.specs.get(role)
        if spec is not None and spec.owns_network:
            chosen = dict(model.named_parameters()).items()
            return {name: p for name, p in chosen if spec.kind == "full" or ".turn." in name}
        frozen_norm = spec is not None and spec.kind == "dora_frozen_norm"
        return {
            name.replace(f".{role}.", ".").removesuffix(f".{role}"): parameter
            for name, parameter in _adapter_parameters(model, role).items()
            if not (frozen_norm and "lora_magnitude_vector" in name)
        }

    @torch.no_grad()
    def load_role_state(self, role: str, state: dict[str, Tensor]) -> None:
        """Copy ``state`` into the existing parameters of ``role`` (optimisers keep pointing at them).

        Raises:
            ValueError: other names or shapes than this role's; nothing has been copied then.
        """
        live = self.role_state(role)
        wrong = [name for name in sorted(live.keys() | state.keys()) if _shape(live, name) != _shape(state, name)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(live)} tensors do not fit the {role}; first {wrong[0]}: the file has "
                f"{_shape(state, wrong[0])}, the network {_shape(live, wrong[0])}. Use the adapter, the rank and the "
                "teacher of the run that wrote it."
            )
        for name, parameter in live.items():
            parameter.copy_(state[name])

    # --- memory and speed ---

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, under the role that was active in forward.

        Without that, the student's blocks would be recomputed as whatever network ran last before ``backward``.
        """

        def role_keeping_checkpoint(function, *args):
            role = self.role
            contexts = lambda: (nullcontext(), self.selected(role))  # noqa: E731
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

        for model in self._distinct_models():
            model.train()  # diffusers' blocks checkpoint in training mode only
            model.enable_gradient_checkpointing(role_keeping_checkpoint)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the models with ``torch.compile``: one variant for each role, batch size and gradient mode."""
        # Each variant is a recompilation for a guard on the layers' state; 8, torch's limit, would be too few.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for model in self._distinct_models():
            model.compile(backend=backend)

    def _distinct_models(self) -> list[nn.Module]:
        return list({id(model): model for model in self._models.values()}.values())


def _adapter_parameters(model: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Every parameter of the PEFT adapter named ``role``, also frozen ones, by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if role in name.split(".")}


def _adapters_of(layer: BaseTunerLayer) -> frozenset[str]:
    return frozenset(name for group in layer.adapter_layer_names for name in getattr(layer, group))


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
