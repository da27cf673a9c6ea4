"""Where a one-step pipeline comes from: a complete checkpoint, or an adapter and the base model that it names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from safetensors import SafetensorError

from diffusers_wadi._adapter_files import ADAPTER_CONFIG_NAME, read_adapter_config
from diffusers_wadi._files import NotCachedError, find_file, hub_options, probe_file
from diffusers_wadi.pipelines._weights import refuse_incomplete


@dataclass(frozen=True)
class Source:
    """What was asked for; without `adapter_config` a complete pipeline."""

    location: str
    subfolder: str | None
    adapter_config: dict[str, Any] | None = None
    base: str | None = None


def resolve_source(
    location: str | os.PathLike, base_model: str | os.PathLike | None, subfolder: str | None, options: dict[str, Any]
) -> Source:
    """Tell a complete checkpoint from an adapter by the files it has; `base_model` says that it is an adapter.

    Raises:
        OSError: neither kind, or not to be found.
        ValueError: an adapter without a base model.
    """
    location, hub = str(location), hub_options(options)
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
    base = base_model or _base_of(config or {}, Path(location, subfolder or ""))
    return Source(location, subfolder, config or {}, str(base))


def _base_of(config: dict[str, Any], folder: Path) -> str:
    """The base that a config names: inside a local adapter folder first, else as it stands, a path or Hub name."""
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"the {ADAPTER_CONFIG_NAME} in {folder} names no base model; pass base_model=")
    inside = folder / name
    return str(inside) if inside.is_dir() else str(name)


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
    pipe.load_lorad_weights(source.location, weight_name, adapter_name, source.subfolder, **hub_options(options))
    if options.get("scheduler") is None and (scheduler := _own_scheduler(source, hub_options(options))):
        pipe.scheduler = scheduler
    return pipe


def _own_scheduler(source: Source, hub: dict[str, Any]) -> SchedulerMixin | None:
    """The scheduler that the adapter was trained with, where it lies beside the adapter."""
    location = Path(source.location).parent if Path(source.location).is_file() else source.location
    path = probe_file(location, "scheduler/scheduler_config.json", source.subfolder, **hub)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(diffusers, config["_class_name"], None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no scheduler config ({error}); get it again, or pass scheduler=") from error
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(
            f"{path} names {config['_class_name']!r}, which is no scheduler of diffusers; pass scheduler="
        )
    return kind.from_config(config)


def _local_folder(location: str, subfolder: str, options: dict[str, Any]) -> Path:
    if Path(location).is_dir():
        return Path(location, subfolder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(location, allow_patterns=f"{subfolder}/*", **hub_options(options)), subfolder)


def _explain(location: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, SafetensorError) as error:
        summary = " ".join(str(error).split())
        raise OSError(
            f"cannot load the pipeline {location!r}: {summary} A file is missing or damaged; copy, download or save it "
            f"again."
        ) from error
