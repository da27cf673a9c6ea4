"""Where a one-step pipeline comes from: a complete checkpoint, an adapter and the base model that it names, or a file of
the paper's authors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

from diffusers_wadi._adapter_files import ADAPTER_CONFIG_NAME, read_adapter_config
from diffusers_wadi._files import NotCachedError, find_file, folder_inside, hub_options, probe_file
from diffusers_wadi.authors_files import (
    AUTHORS_FILES,
    AUTHORS_REPOSITORY,
    AUTHORS_TERMINAL_ALPHA_CUMPROD,
    AuthorsFile,
    authors_contents,
    convert_authors_state_dict_to_lorad,
    fitting_weights,
    read_authors_file,
    split_authors_state_dict,
)
from diffusers_wadi.loaders import LoRaDLoaderMixin
from diffusers_wadi.pipelines._adapter_scheduler import own_scheduler
from diffusers_wadi.pipelines._weights import refuse_incomplete
from diffusers_wadi.schedulers import one_step_scheduler


@dataclass(frozen=True)
class Source:
    """What was asked for: with `authors_file` that, with `adapter_config` an adapter, else a complete pipeline."""

    location: str
    subfolder: str | None
    adapter_config: dict[str, Any] | None = None
    base: str | None = None
    authors_file: Path | None = None


# Component of an authors' file -> the pipeline for it.
LABELS = {"unet": "UNet", "transformer": "transformer"}
PIPELINE_NAMES = {"unet": "WaDiPipeline", "transformer": "WaDiPixArtPipeline"}


def resolve_source(
    cls: type | None,
    location: str | os.PathLike,
    base_model: str | os.PathLike | None,
    weight_name: str | None,
    subfolder: str | None,
    options: dict[str, Any],
) -> Source:
    """Tell a complete checkpoint from an adapter by the files it has; `base_model` says that it is an adapter.

    A file, given as such or by `weight_name`, is first looked into for what the authors' files hold. `cls` is the
    pipeline class that the files are for, None for any.

    Raises:
        OSError: neither kind, or not to be found.
        ValueError: an adapter without a base model, or a file for another kind of pipeline.
    """
    location, hub = str(location), hub_options(options)
    if authors := _authors_source(cls, location, base_model, weight_name, subfolder, hub):
        return authors
    if base_model is None and Path(location).is_file():
        raise ValueError(f"{location} is a file; pass base_model= to load it as a LoRaD adapter, or give its folder")
    unknown = None
    try:
        if base_model is None and find_file(location, "model_index.json", subfolder, **hub):
            return Source(location, subfolder)
    except NotCachedError as error:  # of an adapter that was used before only the adapter's files are cached
        unknown = error
    config = None if Path(location).is_file() else read_adapter_config(location, subfolder, **hub)
    if config is None and base_model is None:
        if unknown is not None:
            raise NotCachedError(f"{unknown} Nor is there an {ADAPTER_CONFIG_NAME}.") from unknown
        raise FileNotFoundError(
            f"{location!r} holds neither model_index.json (a complete pipeline) nor {ADAPTER_CONFIG_NAME} (a LoRaD "
            f"adapter). Name the folder that does, with subfolder= if it lies deeper, or pass base_model=."
        )
    base = base_model or _base_of(config or {}, location, subfolder, hub)
    return Source(location, subfolder, config or {}, str(base))


def _base_of(config: dict[str, Any], location: str, subfolder: str | None, hub: dict[str, Any]) -> str:
    """The base that a config names: inside the adapter's folder or repository first, else a path or Hub name."""
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"the {ADAPTER_CONFIG_NAME} in {location} names no base model; pass base_model=")
    return str(folder_inside(location, name, "model_index.json", subfolder, **hub) or name)


def _authors_source(
    cls: type | None,
    location: str,
    base_model: str | os.PathLike | None,
    weight_name: str | None,
    subfolder: str | None,
    hub: dict,
) -> Source | None:
    known = AUTHORS_FILES.get(Path(location).name if Path(location).is_file() else weight_name or "")
    if known is not None:
        _refuse_other_component(cls, known, location)
    path: Path | None = None
    if Path(location).is_file():
        path = Path(location)
    elif known is not None:
        path = find_file(location, weight_name, subfolder, **hub)
        if path is None:
            raise FileNotFoundError(f"no {weight_name} in {location!r}; {AUTHORS_REPOSITORY!r} on the Hub has it")
    elif weight_name is not None:
        path = probe_file(location, weight_name, subfolder, **hub)
    elif location == AUTHORS_REPOSITORY:
        raise ValueError(f"{location!r} holds several models; pass weight_name=, one of {', '.join(AUTHORS_FILES)}")
    contents = None if path is None else authors_contents(path)
    if contents is None:
        return None
    _refuse_other_component(cls, contents, str(path))
    base = base_model or contents.base_model or (_pipeline_around(path) if contents.kind == "training" else None)
    if base is None:
        what = "training weights" if contents.kind == "training" else f"a whole {LABELS[contents.component]}"
        raise ValueError(
            f"{path} holds {what} in the authors' layout and names no base model; pass base_model=, the pipeline that it "
            "was trained on"
        )
    return Source(location, subfolder, base=str(base), authors_file=path)


def _refuse_other_component(cls: type | None, contents: AuthorsFile, origin: str) -> None:
    if cls is not None and contents.component != cls.lorad_component:
        what = {"unet": "a Stable Diffusion UNet", "transformer": "a PixArt transformer"}[contents.component]
        raise ValueError(
            f"{origin!r}: this is {what}, and {cls.__name__} has a {cls.lorad_component}. Load it with "
            f"diffusers_wadi.{PIPELINE_NAMES[contents.component]}.from_pretrained, or into a model of its own with "
            "load_authors_weights."
        )


def _pipeline_around(path: Path) -> Path | None:
    """The pipeline in whose component folder the file lies, as in what their training leaves."""
    folder = path.absolute().parent.parent
    return folder if (folder / "model_index.json").is_file() else None


def load_pipeline(
    load: Callable,
    cls: type,
    source: Source,
    weight_name: str | None,
    adapter_name: str | None,
    options: dict[str, Any],
) -> Any:
    """The pipeline of class `cls` that `source` stands for; `load` is the stock `from_pretrained`."""
    _refuse_other_kind(cls, source, options)
    if source.authors_file is not None:
        return load_authors_pipeline(load, cls, source, adapter_name, options)
    if source.adapter_config is not None:
        return load_adapter_pipeline(load, source, weight_name, adapter_name, options)
    return load_complete_pipeline(load, source, options)


def _refuse_other_kind(cls: type, source: Source, options: dict[str, Any]) -> None:
    """Refuse a complete or base pipeline without the component of `cls`."""
    try:
        path, origin = index_of(source, hub_options(options))
    except OSError:  # loading says it better
        return
    index = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    if not index:
        return
    if index.get(cls.lorad_component) or options.get(cls.lorad_component) is not None:
        for component, remedy in cls.further_components.items():
            if (index.get(component) or (None,))[0] is None and options.get(component) is None:
                raise ValueError(f"{origin!r} holds no {component}; pass {remedy}")
        return
    other = next((name for component, name in PIPELINE_NAMES.items() if index.get(component)), None)
    raise ValueError(
        f"{origin!r} is a {index.get('_class_name')} without a {cls.lorad_component}, so it is not for {cls.__name__}."
        + (f" Load it with diffusers_wadi.{other}." if other else "")
        + (
            f" diffusers has no ControlNet pipeline for a {index.get('_class_name')}."
            if cls.further_components
            else ""
        )
    )


def index_of(source: Source, hub: dict[str, Any]) -> tuple[Path | None, str]:
    """The `model_index.json` of the complete or base pipeline, None if there is none, and whose it is."""
    if source.base is None:
        return find_file(source.location, "model_index.json", source.subfolder, **hub), source.location
    # A revision names a state of the repository that was asked for, which is the adapter's.
    hub = {key: value for key, value in hub.items() if key != "revision"}
    return find_file(source.base, "model_index.json", **hub), source.base


def load_complete_pipeline(load: Callable, source: Source, options: dict[str, Any]) -> Any:
    """`load` is the stock `from_pretrained`; its errors on files become one that says what to do."""
    location = source.location
    if source.subfolder:
        location = str(_local_folder(location, source.subfolder, options))
    pipe = _explain(location, lambda: load(location, **options))
    refuse_incomplete(pipe, options)
    return pipe


def load_adapter_pipeline(
    load: Callable, source: Source, weight_name: str | None, adapter_name: str | None, options: dict[str, Any]
) -> Any:
    """The base pipeline with the adapter loaded and active."""
    # A revision names a state of the repository that was asked for, which is the adapter's.
    of_base = {key: value for key, value in options.items() if key != "revision"}
    pipe = load_complete_pipeline(load, Source(source.base, None), of_base)
    # A scheduler that was given is used: the one beside the adapter, whatever it is, is not looked at then.
    load_adapter = (
        type(pipe).load_lorad_weights if options.get("scheduler") is None else LoRaDLoaderMixin.load_lorad_weights
    )
    load_adapter(pipe, source.location, weight_name, adapter_name, source.subfolder, **hub_options(options))
    return pipe


def load_authors_pipeline(
    load: Callable, cls: type, source: Source, adapter_name: str | None, options: dict[str, Any]
) -> Any:
    """The base pipeline with the file's model in the place of its own, or with the file's angles as an adapter.

    A whole model is checked before the rest of the pipeline is loaded. Unless there is a scheduler beside the file or
    in the options, that of the base gets the authors' terminal alpha, but not for a model of another name than theirs.
    """
    component = cls.lorad_component
    of_base = {key: value for key, value in options.items() if key != "revision"}
    thetas, weights = split_authors_state_dict(read_authors_file(source.authors_file))
    adapter = convert_authors_state_dict_to_lorad(thetas) if thetas else None
    if weights:  # beside angles: the base that these turn, as it was trained with
        if options.get(component) is not None:
            raise ValueError(
                f"{source.authors_file} holds a whole {LABELS[component]}, and {component}= was given too; leave one of "
                "them out"
            )
        of_base[component] = _denoiser_of(weights, cls, source, of_base)
    pipe = load_complete_pipeline(load, Source(source.base, None), of_base)
    if adapter is not None:
        pipe.load_lorad_weights(adapter, adapter_name=adapter_name)
    theirs = adapter is not None or source.authors_file.name.startswith("rotated_")
    if options.get("scheduler") is None:
        if own := own_scheduler(source.location, source.subfolder, hub_options(options)):
            pipe._replace_scheduler(own)
        elif theirs:
            pipe._replace_scheduler(one_step_scheduler(pipe.scheduler, AUTHORS_TERMINAL_ALPHA_CUMPROD))
    if (kind := pipe.scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
        raise ValueError(
            f"{source.authors_file}: the authors' models predict epsilon, and the scheduler has prediction_type={kind!r}. "
            "Pass the scheduler of a base that predicts epsilon (Stable Diffusion 1.5, 2.1-base, PixArt-alpha)."
        )
    return pipe


def _denoiser_of(
    weights: dict[str, torch.Tensor], cls: type, source: Source, options: dict[str, Any]
) -> torch.nn.Module:
    """A UNet or transformer of the base's config with these weights; the base's own are not even downloaded."""
    from accelerate import init_empty_weights

    kind, component, hub = cls.denoiser_class, cls.lorad_component, hub_options(options)
    config = _explain(source.base, lambda: kind.load_config(source.base, subfolder=component, **hub))
    with init_empty_weights():
        model = kind.from_config(config)
    weights = fitting_weights(model, weights, str(source.authors_file))
    dtype = options.get("dtype") or options.get("torch_dtype")
    dtype = dtype.get(component, dtype.get("default")) if isinstance(dtype, dict) else dtype
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    # Copies, since the tensors of a safetensors file are the file itself, mapped into memory.
    model.load_state_dict({key: weights.pop(key).to(dtype, copy=True) for key in list(weights)}, assign=True)
    return model.eval()


def _local_folder(location: str, subfolder: str, options: dict[str, Any]) -> Path:
    if Path(location).is_dir():
        return Path(location, subfolder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(location, allow_patterns=f"{subfolder}/*", **hub_options(options)), subfolder)


def _explain(location: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, SafetensorError, httpx.HTTPError) as error:
        summary = " ".join(str(error).split())
        raise OSError(
            f"cannot load the pipeline {location!r}: {summary} A file is missing or damaged; copy, download or save it "
            f"again."
        ) from error
