"""What every one-step pipeline adds to the stock one: loading, guard rails, the float32 step, the two schedulers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusers_wadi._adapter_ops import lorad_layers
from diffusers_wadi.loaders import LoRaDLoaderMixin
from diffusers_wadi.lorad.caching import lorad_cache_in_call
from diffusers_wadi.pipelines._adapter_scheduler import AdapterSchedulerMixin
from diffusers_wadi.pipelines._caching import LoRaDCacheMixin
from diffusers_wadi.pipelines._fast_images import device_without_hooks
from diffusers_wadi.pipelines._loading import load_pipeline, resolve_source
from diffusers_wadi.pipelines._optimization import OptimizationMixin, as_it_was
from diffusers_wadi.pipelines._saving import OneStepCheckpointMixin
from diffusers_wadi.pipelines._scalecrafter import ScaleCrafterMixin
from diffusers_wadi.schedulers import ONE_STEP_SETTINGS, check_one_step_scheduler, one_step_scheduler

LOW_PRECISION = (torch.float16, torch.bfloat16)


class OneStepMixin(
    OptimizationMixin,
    AdapterSchedulerMixin,
    LoRaDLoaderMixin,
    LoRaDCacheMixin,
    OneStepCheckpointMixin,
    ScaleCrafterMixin,
):
    """To be named before a stock pipeline class, whose `__call__` the subclass wraps in `_ready`."""

    stock_class: ClassVar[type[DiffusionPipeline]]
    """The class that a saved folder names."""
    denoiser_class: ClassVar[type[torch.nn.Module]]
    """Class of the component `lorad_component`."""
    further_components: ClassVar[dict[str, str]] = {}
    """Components that a checkpoint need not have, and how they are then given to `from_pretrained`."""
    terminal_alpha_cumprod: ClassVar[float | None] = None
    """alphas_cumprod[T-1] of the one step where nothing beside the weights says otherwise; None: the schedule's own."""
    _step_index: ClassVar[int] = 0
    """Which of the results of `scheduler.step` the stock pipeline takes at one step."""

    _warned: frozenset[str] = frozenset()
    _checked_scheduler: tuple = (None, None)  # what passed the check, which takes a millisecond, and its settings then

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: str | os.PathLike | None = None,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Load a complete one-step checkpoint, a LoRaD adapter together with the base model it names, or a file of the
        paper's authors.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Local folder or Hub repository: a complete pipeline (`model_index.json`) or an adapter
                (`adapter_config.json` with `peft_type` "LORAD" and the weights). With `weight_name`, or as the path of
                a file, also the authors' models (`"gudaochangsheng/WaDi"`) and training files (`theta_a`, `theta_b`).
            base_model (`str` or `os.PathLike`, *optional*):
                Pipeline to put the adapter or the authors' model on. By default the `base_model_name_or_path` of the
                adapter's config: a folder inside its folder or repository, else a path, else a Hub name; for the
                authors' published files Stable Diffusion 1.5, 2.1-base, or PixArt-XL-2-256x256.
            weight_name (`str`, *optional*, defaults to `"pytorch_lorad_weights.safetensors"`):
                File name of the weights, such as `"rotated_unet-sdv1-5.safetensors"` for one of the authors' models.
            adapter_name (`str`, *optional*, defaults to `"default_0"`):
                Name to give the adapter.
            subfolder (`str`, *optional*):
                Folder inside `pretrained_model_name_or_path` to load from.
            **kwargs:
                As in [`DiffusionPipeline.from_pretrained`]: `dtype` or `torch_dtype` (default float32), `variant`, `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`, components to replace, ... They apply to the base
                pipeline; those that concern the Hub also to the adapter, except that `revision` is the adapter's.

        A scheduler that would not feed t = T-1 at one step (as in most checkpoints) is replaced by
        `one_step_scheduler(scheduler.config, terminal_alpha_cumprod)`, which is logged; `terminal_alpha_cumprod` is
        None for Stable Diffusion, and for PixArt 0.0047, which replaces any scheduler that was not made for one step.
        Calls of several steps then still use the checkpoint's own scheduler. A `scheduler/` folder beside the adapter,
        as training writes it, takes the place of the base pipeline's. With the authors' files the scheduler has their
        `alphas_cumprod[T-1]` of 0.0047. Their `.pth` files are read as tensors only; code in them is not run.

        Returns:
            A pipeline of this class.

        Raises:
            OSError: the folder, repository or a file in it is missing or damaged.
            ValueError: the adapter or model does not fit the base model or this class, or the base model predicts
                something else than epsilon or v.
        """
        plain = super().from_pretrained
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            # Else diffusers' models come as float32 but transformers' in the dtype of their config, and do not fit.
            kwargs["dtype"] = torch.float32
        source = resolve_source(cls, pretrained_model_name_or_path, base_model, weight_name, subfolder, kwargs)
        pipe = load_pipeline(plain, cls, source, weight_name, adapter_name, kwargs)
        pipe._lorad_removed = False  # whatever it is: a one-step model, or the caller was told so
        pipe._repair_scheduler(given=kwargs.get("scheduler") is not None)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        r"""
        As [`DiffusionPipeline.from_pipe`], but in the dtype of `pipeline`, where the stock default casts the shared
        components, and with them the source, to float32. Of an optimized pipeline the new one gets the models themselves.
        """
        pipeline = as_it_was(pipeline)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        pipe = super().from_pipe(pipeline, **kwargs)
        pipe._lorad_removed = getattr(pipeline, "_lorad_removed", None)
        return pipe

    def to(self, *args: Any, **kwargs: Any) -> Any:
        r"""As [`DiffusionPipeline.to`]; LoRaD angles stay float32, since half precision rounds small ones away."""
        angles = [p for layer in self._lorad_layers() for p in (*layer.lorad_A.values(), *layer.lorad_B.values())]
        exact = [parameter.data for parameter in angles]
        pipe = super().to(*args, **kwargs)
        for parameter, data in zip(angles, exact):
            parameter.data = data.to(parameter.device)
        return pipe

    @property
    def is_one_step(self) -> bool:
        """Whether the denoiser is now the one-step generator: its adapter is on or fused, or it never had one."""
        # Every call may ask, so this looks no further than to the first layer that acts, and makes no list.
        optimization, model = self._optimization, self._present_model()
        if optimization is not None:
            model = optimization.originals.get(self.lorad_component, model)
        adapted = False
        for layer in () if model is None else lorad_layers(model):
            if _is_acting(layer):
                return True
            adapted = True
        return not (adapted or self._lorad_removed)

    def _repair_scheduler(self, given: bool) -> None:
        """Put a one-step scheduler in the place of one that would not do, unless the caller chose it knowingly."""
        try:
            check_one_step_scheduler(self.scheduler)
            reason = None
        except ValueError as error:
            reason = str(error).split(". ")[0]
        if reason is None and (given or self.terminal_alpha_cumprod is None or _is_made_for_one_step(self.scheduler)):
            return
        unfit, terminal = self.scheduler, self.terminal_alpha_cumprod
        self._replace_scheduler(one_step_scheduler(unfit, terminal))
        reason = reason or f"it was not made for one step, which takes alphas_cumprod[T-1] = {terminal} by default"
        _logger.warning(
            f"The scheduler of this checkpoint ({type(unfit).__name__}) was replaced by one_step_scheduler(...) "
            f"with its betas{'' if terminal is None else f' but for the last, which gives {terminal}'}, because {reason}."
        )

    def _replace_scheduler(self, ours: Any) -> None:
        """Use `ours` from now on, but for calls of several steps, which keep the checkpoint's own."""
        ours.stands_for = self._scheduler_of_many_steps()  # on the scheduler, so that `from_pipe` passes it on
        self.scheduler = ours

    def _scheduler_of_many_steps(self) -> Any:
        return getattr(self.scheduler, "stands_for", self.scheduler)

    def _scheduler_to_save(self) -> Any:
        return self.scheduler if self.is_one_step else self._scheduler_of_many_steps()

    @contextmanager
    def _ready(
        self, num_inference_steps: int, times: list | None, guidance_scale: float, has_negative: bool
    ) -> Iterator[None]:
        """Inside the block this pipeline is set up for one such call; what does not suit it is warned of once.

        Args:
            num_inference_steps: as asked for.
            times: timesteps or sigmas that the caller gives, None for the scheduler's.
            guidance_scale: as asked for.
            has_negative: whether there is a negative prompt.

        Raises:
            ValueError: one step of a one-step model with a scheduler that would not feed t = T-1.
        """
        steps = len(times or ()) or num_inference_steps
        self._before_call()
        self._warn_of_unsuitable(steps, guidance_scale, has_negative)
        original = self.scheduler
        if steps != 1:
            scheduler = self._scheduler_of_many_steps()
        else:
            scheduler = self._scheduler_of_one_step()
            if times is None:
                self._check_scheduler(scheduler)
            scheduler = self._with_own_step(scheduler, times is None)
        # Exchanged, so that pipelines that share it (`from_pipe`) do not notice and an exception leaves nothing behind.
        self.scheduler = scheduler
        try:
            with lorad_cache_in_call(self._lorad_model()):
                yield
        finally:
            self.scheduler = original

    def _check_scheduler(self, scheduler: Any) -> None:
        """Refuse one that would not do; only warn if nothing says that this pipeline is a one-step model."""
        tables = getattr(scheduler, "alphas_cumprod", None)
        state = (dict(scheduler.config), id(tables), getattr(tables, "_version", None))
        if self._checked_scheduler[0] is scheduler and self._checked_scheduler[1] == state:
            return
        try:
            check_one_step_scheduler(scheduler)
            self._checked_scheduler = scheduler, state
        except ValueError as error:
            if self.is_one_step and (self._lorad_layers() or self._lorad_removed is not None):
                raise
            self._warn_once("scheduler", f"This would not do for a one-step model: {error}")

    def _with_own_step(self, scheduler: Any, at_the_end: bool) -> Any:
        """`scheduler`, or a copy of it whose `step` computes in float32 or gives x0 where the pipeline looks for it."""
        weight = next(getattr(self, self.lorad_component).parameters())
        # 8 bits are for storage alone; only then is it worth to ask diffusers, which walks through all modules.
        dtype = weight.dtype if weight.dtype.itemsize > 1 else getattr(self, self.lorad_component).dtype
        is_known = at_the_end and weight.device.type != "cpu" and scheduler is self._checked_scheduler[0]
        last = _last_timestep(scheduler) if is_known else None
        if dtype not in LOW_PRECISION and self._step_index == 0 and last is None:
            return scheduler
        ours = copy.copy(scheduler)
        ours.step = _own_step(ours.step, dtype in LOW_PRECISION, self._step_index, last)
        return ours

    @property
    def _execution_device(self) -> torch.device:
        r"""As [`DiffusionPipeline._execution_device`], which searches all modules for hooks of offloading, slowly."""
        found = device_without_hooks(vars(self).get(name) for name in self.config)
        return super()._execution_device if found is None else found

    def _warn_of_unsuitable(self, steps: int, guidance_scale: float, has_negative: bool) -> None:
        off = "switch the adapter off (`pipe.disable_lora()`) for the multi-step teacher"
        if steps > 1 and self.is_one_step:
            self._warn_once(
                "steps",
                f"num_inference_steps={steps}: this model was trained for one step at t = T-1. Use 1, or {off}.",
            )
        if guidance_scale > 1 and self.is_one_step:
            self._warn_once(
                "guidance",
                f"guidance_scale={guidance_scale}: guidance is already in this one-step model; more doubles the cost "
                f"and burns colours. Use 1.0, or {off}.",
            )
        if has_negative and guidance_scale <= 1:
            self._warn_once(
                "negative",
                f"The negative prompt has no effect at guidance_scale={guidance_scale}; it needs more than 1.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned = self._warned | {kind}
            _logger.warning(message)


_logger = logging.get_logger(__name__)


def _last_timestep(scheduler: Any) -> int | None:
    """T-1, where the number alone will do for the step of a scheduler that passed the check.

    DDIM reads its tables, which are on the CPU, at the timestep: one on a GPU has to be waited for, and with it all that the
    GPU was given to do, before the decoder's work can be handed over.
    """
    return scheduler.config.num_train_timesteps - 1 if isinstance(scheduler, DDIMScheduler) else None


def _own_step(step: Callable, in_float32: bool, index: int, timestep_of_all: int | None = None) -> Callable:
    # wraps: the pipeline reads the signature of `step` to see which arguments it may pass.
    @functools.wraps(step)
    def own_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> tuple:
        dtype = model_output.dtype
        timestep = timestep if timestep_of_all is None else timestep_of_all
        if in_float32:
            model_output, sample = model_output.float(), sample.float()
        result = step(model_output, timestep, sample, **kwargs | {"return_dict": False})
        result = (*result, *result[:1] * (index + 1 - len(result)))  # some give the last sample only, which is x0
        return tuple(item.to(dtype) if isinstance(item, torch.Tensor) else item for item in result)

    return own_step


def _is_made_for_one_step(scheduler: Any) -> bool:
    config = scheduler.config
    return isinstance(scheduler, DDIMScheduler) and all(
        config[key] == ONE_STEP_SETTINGS[key] for key in ONE_STEP_SETTINGS
    )


def _is_acting(layer: BaseTunerLayer) -> bool:
    # Switched off counts even when merged: such a layer unmerges itself at its next call.
    active = layer.merged or any(name in layer.lorad_A for name in layer.active_adapters)
    return active and not layer.disable_adapters
