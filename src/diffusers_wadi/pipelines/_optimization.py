"""`optimize()` and `unoptimize()` of the one-step pipelines.

An optimized pipeline draws with copies of its models (see `_fast_copies`) and keeps the models themselves. Whoever saves or
asks for adapters is shown those; whoever changes adapters or places changes those, and new copies are made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging

from diffusers_wadi._offloading import pause_offloading
from diffusers_wadi.pipelines import _fast_copies as fast
from diffusers_wadi.pipelines._fast_images import NoBar, without_fast_images
from diffusers_wadi.pipelines._optimization_steps import (
    OptimizationReport,
    compile_or_say_why,
    copies_of,
    device_of,
    models_of,
    set_up,
)
from diffusers_wadi.pipelines._prompt_cache import PromptCache

READING = ("save_pretrained", "push_to_hub", "save_lorad_weights", "push_lorad_to_hub", "get_active_adapters",
           "get_list_adapters", "_lorad_layers")  # fmt: skip
CHANGING = (
    "load_lorad_weights", "set_adapters", "disable_lora", "enable_lora", "delete_adapters", "fuse_lorad", "unfuse_lorad",
    "unload_lorad_weights", "load_lora_weights", "fuse_lora", "unfuse_lora", "unload_lora_weights", "set_lora_device",
    "enable_lora_hotswap", "enable_lorad_cache", "disable_lorad_cache", "load_textual_inversion",
    "unload_textual_inversion", "load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale", "enable_scalecrafter",
    "disable_scalecrafter", "enable_freeu", "disable_freeu", "fuse_qkv_projections", "unfuse_qkv_projections", "enable_attention_slicing", "disable_attention_slicing",
    "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention", "to",
    "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "remove_all_hooks",
)  # fmt: skip
OF_PLACES = ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload",
             "remove_all_hooks")  # fmt: skip
HOWS = (False, "regional", "full")


@dataclass
class _Optimization:
    settings: dict[str, Any]
    copies: dict[str, torch.nn.Module]  # component -> what is drawn with
    originals: dict[str, torch.nn.Module]  # component -> what that stands for
    report: OptimizationReport
    cache: PromptCache | None = None


class OptimizationMixin:
    """For a pipeline with `lorad_component`; to be named before the classes whose methods it has to know of."""

    _optimization: _Optimization | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for names, wrap in ((READING, _reading), (CHANGING, _changing), (["encode_prompt"], _remembering)):
            for name in names:
                method = getattr(cls, name, None)
                # What a subclass puts before a cached `encode_prompt` may depend on more than its arguments.
                again = wrap is _remembering and any(
                    hasattr(vars(base).get(name), "knows_optimization") for base in cls.__mro__[1:]
                )
                if method is not None and not again and not hasattr(method, "knows_optimization"):
                    setattr(cls, name, wrap(name, method))
                    getattr(cls, name).knows_optimization = True

    def optimize(
        self,
        *,
        fuse: bool = True,
        fuse_qkv: bool | None = None,
        channels_last: bool = True,
        dtype: torch.dtype | None = None,
        compile: bool | str = False,
        compile_options: Mapping[str, Any] | None = None,
        vae: str | torch.nn.Module | None = None,
        prompt_cache: float = 64,
        keep_original: bool | str = True,
    ) -> Any:
        r"""
        Draw faster from now on. Each call says all: what it does not name gets its default. Adapters may be loaded,
        scaled, fused and switched, the pipeline moved, offloaded and saved after it as before it; where this needs new
        copies of models they are made. What is saved is the pipeline without its optimization.

        Args:
            fuse (`bool`, *optional*, defaults to `True`):
                Draw with the active adapters in the weights. Takes one more copy of the weights that they turn.
            fuse_qkv (`bool`, *optional*):
                One matrix product for queries, keys and values. By default on accelerators only: on a CPU there was
                nothing to gain.
            channels_last (`bool`, *optional*, defaults to `True`):
                Convolutions with the channels side by side in memory. Takes one more copy of them.
            dtype (`torch.dtype`, *optional*):
                Number format of all models. By default float16 on CUDA if the pipeline is in float32, else left as it is.
                The one step is computed in float32 all the same. Prefer float16 to bfloat16.
            compile (`bool` or `str`, *optional*, defaults to `False`):
                `"regional"`: `torch.compile` of the repeated blocks of the denoiser, done within a minute. `"full"` (or
                `True`): of the whole denoiser and the decoder. Three images are drawn at once, so that the wait is here
                and not at the first call; each further size or batch waits again. Where it fails, with a warning, the
                pipeline draws without.
            compile_options (`dict`, *optional*):
                For `torch.compile`, as `{"mode": "reduce-overhead"}`, which is CUDA graphs.
            vae (`str` or a VAE, *optional*):
                Decoder in the place of the pipeline's own: `"taesd"`, the name or folder of another `AutoencoderTiny`, or a
                model. Small decoders lose detail.
            prompt_cache (`float`, *optional*, defaults to 64):
                Megabytes of text embeddings kept, for prompts that come again. 0: none.
            keep_original (`bool` or `"cpu"`, *optional*, defaults to `True`):
                Keep the models themselves where they are, or on the CPU, which pipelines that share them notice. `False`:
                give them up, for the least memory; what needs them is then refused, saving and adapters above all.

        Returns:
            This pipeline. `pipe.optimization` says what was done, and what was left out and why.

        Raises:
            ValueError: unknown settings, a VAE for other latents, or models on several devices (`device_map`).
            OSError: the VAE is not to be found.
        """
        settings = {name: value for name, value in locals().items() if name in _SETTINGS}
        self._refuse_to_optimize(settings)
        if vae is not None:
            settings["vae"] = fast.find_vae(vae, self._original("vae"))
        self.unoptimize()
        self._optimize(settings)
        return self

    def unoptimize(self) -> Any:
        r"""
        Undo `optimize`, to the bit. Does nothing to a pipeline that is not optimized.

        Returns:
            This pipeline.

        Raises:
            ValueError: it was optimized with `keep_original=False`.
        """
        state = self._optimization
        if state is None:
            return self
        self._refuse_without_originals("unoptimize")
        self._optimization = None
        with self._whole():
            without_fast_images(getattr(self, "image_processor", None))
            for name, model in self._replaced(state):
                fast.carry_settings(getattr(self, name), model)
                device = device_of(getattr(self, name))
                setattr(self, name, model if device is None else model.to(device))
        return self

    @property
    def optimization(self) -> OptimizationReport | None:
        """What `optimize` did and left out; None for a pipeline that is not optimized."""
        return None if self._optimization is None else self._optimization.report

    def clear_prompt_cache(self) -> None:
        """Forget the text embeddings that `optimize` keeps."""
        if self._optimization is not None and self._optimization.cache is not None:
            self._optimization.cache.clear()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        r"""As [`DiffusionPipeline.progress_bar`]; an optimized pipeline has none for a single step."""
        if self._optimization is not None and iterable is None and total == 1:
            return NoBar()
        return super().progress_bar(iterable, total)

    def _original(self, name: str) -> Any:
        return getattr(self._as_it_was(), name, None)

    def _replaced(self, state: _Optimization) -> list[tuple[str, torch.nn.Module]]:
        """The models that copies stand for, without those in whose place somebody has put others since."""
        kept = state.originals.items()
        return [(name, model) for name, model in kept if getattr(self, name, None) is state.copies[name]]

    def _as_it_was(self) -> Any:
        """This pipeline with the models that it was given, for whoever reads: itself, or another one if optimized."""
        if self._optimization is None:
            return self
        view = copy.copy(self)
        view._optimization = None
        for name, model in self._replaced(self._optimization):
            setattr(view, name, model)
        return view

    def _refuse_to_optimize(self, settings: dict[str, Any]) -> None:
        if settings["compile"] is True:
            settings["compile"] = "full"
        if settings["compile"] not in HOWS:
            raise ValueError(f"compile={settings['compile']!r}, expected False, 'regional' or 'full' (True)")
        if settings["keep_original"] not in (True, False, "cpu"):
            raise ValueError(f"keep_original={settings['keep_original']!r}, expected True, False or 'cpu'")
        if isinstance(settings["prompt_cache"], bool) or not settings["prompt_cache"] >= 0:
            raise ValueError(f"prompt_cache={settings['prompt_cache']}, expected megabytes, 0 for none")
        if settings["vae"] is not None and self._original("vae") is None:
            raise ValueError(f"this {type(self).__name__} has no VAE for another one to stand for")
        self._refuse_without_originals("optimize")
        for name, model in models_of(self).items():
            if getattr(self, "hf_device_map", None) or getattr(model, "hf_device_map", None):
                raise ValueError(
                    f"the {name} is spread by device_map; load without it, or call pipe.reset_device_map()"
                )
            if hasattr(model, "_orig_mod"):
                raise ValueError(f"the {name} is compiled; set pipe.{name} = pipe.{name}._orig_mod and pass compile=")

    def _refuse_without_originals(self, what: str) -> None:
        if self._optimization is not None and self._optimization.settings["keep_original"] is False:
            raise ValueError(
                f"{what} needs the models that optimize(keep_original=False) gave up; load the pipeline again, and do it "
                "before, or call optimize(keep_original='cpu')"
            )

    def _optimize(self, settings: dict[str, Any]) -> None:
        report, device = OptimizationReport(), self._execution_device
        with self._whole():
            before = models_of(self)
            copies = copies_of(self, before, settings, device, report)
            for name, model in copies.items():
                setattr(self, name, model)
            originals = {name: before[name] for name in copies}
            self._optimization = _Optimization(settings, copies, originals, report)
            self._optimization.cache = set_up(self, settings, report)
        if settings["compile"]:
            compile_or_say_why(self, settings, report)
        self._let_go(settings["keep_original"])
        _logger.info(f"Optimized: {report}")

    def _let_go(self, keep_original: bool | str) -> None:
        originals, was_one_step = self._optimization.originals, self.is_one_step
        if keep_original == "cpu":
            for model in originals.values():
                model.to("cpu")
        elif keep_original is False:
            self._optimization.originals = {}
            self._optimization.settings["vae"] = None  # of which there is a copy
            if self.is_one_step != was_one_step:  # its adapter was off, and is not there any more
                self._lorad_removed = True

    def _refuse_scale(self, cross_attention_kwargs: Mapping[str, Any] | None) -> None:
        """Refuse a factor on adapters for one call where they are in the weights."""
        state = self._optimization
        if state is None or "fuse" not in state.report.done:
            return
        if getattr(self, self.lorad_component) is not state.copies.get(self.lorad_component):
            return
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        if scale != 1.0:
            raise ValueError(
                f"cross_attention_kwargs={{'scale': {scale}}}, but optimize() has put the adapters into the weights. Use "
                f"pipe.set_adapters(pipe.get_active_adapters(), {scale}), or pipe.optimize(fuse=False)."
            )

    def _before_call(self) -> None:
        """Tell CUDA graphs that the tensors of the call before may be written over."""
        if self._optimization is not None and self._optimization.settings["compile"] and torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()

    def _try_compiled(self) -> None:
        """Draw three small batches: to compile, to record a CUDA graph, and to run it."""
        if getattr(self, "text_encoder", None) is None or getattr(self, "vae", None) is None:
            return
        for seed in range(3):
            self("", generator=torch.Generator().manual_seed(seed), output_type="pt", **self._trial_arguments())

    def _trial_arguments(self) -> dict[str, Any]:
        """What one image needs beside its prompt."""
        return {"num_inference_steps": 1, "guidance_scale": 1.0}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Inside the block nothing is offloaded; the models that stand here afterwards are what those before were."""
        state, self._optimization = self._optimization, None
        by_model = bool(getattr(self, "_all_hooks", None))
        if by_model:
            self.remove_all_hooks()
        resume = {name: pause_offloading(model) for name, model in models_of(self).items()}
        self._optimization = state
        try:
            yield
        finally:
            state, self._optimization = self._optimization, None
            for name, again in resume.items():
                again(getattr(self, name))
            if by_model:
                self.enable_model_cpu_offload(device=self._offload_device)
            self._optimization = state


_logger = logging.get_logger(__name__)
_SETTINGS = tuple(OptimizationMixin.optimize.__kwdefaults__)


def _reading(name: str, method: Callable) -> Callable:
    """The method, which on an optimized pipeline sees the models themselves."""

    @functools.wraps(method)
    def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._optimization is None:
            return method(self, *args, **kwargs)
        if not name.startswith(("get_", "_")):
            self._refuse_without_originals(name)
        return method(self._as_it_was(), *args, **kwargs)

    return reading


def _changing(name: str, method: Callable) -> Callable:
    """The method, which on an optimized pipeline changes the models themselves, of which new copies are made."""

    @functools.wraps(method)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._optimization
        if state is None or (name in OF_PLACES and state.settings["keep_original"] is False):
            return method(self, *args, **kwargs)
        self._refuse_without_originals(name)
        self.unoptimize()
        asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        if name == "to" and asked:
            state.settings["dtype"] = asked[-1]
        try:
            return method(self, *args, **kwargs)
        finally:
            self._optimize(state.settings)

    return changing


def _remembering(name: str, method: Callable) -> Callable:
    """`encode_prompt`, by way of the cache of an optimized pipeline."""

    @functools.wraps(method)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._optimization is None or self._optimization.cache is None:
            return method(self, *args, **kwargs)
        return self._optimization.cache.result(self, method, args, kwargs)

    return remembering


def as_it_was(pipe: Any) -> Any:
    """Any pipeline with the models that it was given: itself unless it is optimized."""
    return pipe._as_it_was() if isinstance(pipe, OptimizationMixin) else pipe
