"""The scheduler that an adapter was trained with travels with it: into its folder, and from there into a pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from diffusers_wadi._files import hub_options, probe_file, writable_folder, written_beside
from diffusers_wadi.schedulers import check_one_step_scheduler, one_step_scheduler

SCHEDULER_FILE = "scheduler/scheduler_config.json"


class AdapterSchedulerMixin:
    """To be named before `LoRaDLoaderMixin`."""

    def load_lorad_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As [`LoRaDLoaderMixin.load_lorad_weights`].

        A `scheduler/` folder beside the adapter, as training and `save_lorad_weights` write it, takes the place of this
        pipeline's scheduler for calls of one step, if no LoRaD adapter was there before: which alphas_cumprod[T-1] the
        step takes is a part of what the adapter learned. Further adapters leave the scheduler alone.

        Raises:
            ValueError: also if that folder holds no scheduler of diffusers.
        """
        source, first = pretrained_model_name_or_path_or_dict, not self._lorad_layers()
        own = None
        if first and not isinstance(source, Mapping):
            with suppress(OSError):  # loading says it better
                own = own_scheduler(source, subfolder, hub_options(kwargs))
        super().load_lorad_weights(source, weight_name, adapter_name, subfolder, **kwargs)
        if first:
            self._use_scheduler_of_adapter(own)

    def _use_scheduler_of_adapter(self, own: SchedulerMixin | None) -> None:
        if own is not None:
            own.of_adapter = True
        elif getattr(self.scheduler, "of_adapter", False):  # of one that was taken out before
            own = one_step_scheduler(self._scheduler_of_many_steps(), self.terminal_alpha_cumprod)
        else:
            return
        self._replace_scheduler(own)

    def _scheduler_of_one_step(self) -> Any:
        """This pipeline's, but not one that belongs to an adapter which is off: then the base's, set up for one step."""
        if getattr(self.scheduler, "of_adapter", False) and not self.is_one_step:
            return one_step_scheduler(self._scheduler_of_many_steps(), self.terminal_alpha_cumprod)
        return self.scheduler

    def _save_beside_adapter(self, folder: Path) -> list[str]:
        """The scheduler of the one step, if this pipeline has one. Returns the files, relative to `folder`."""
        try:
            check_one_step_scheduler(self.scheduler)
        except ValueError:
            return []
        target = writable_folder((folder / SCHEDULER_FILE).parent) / Path(SCHEDULER_FILE).name
        with written_beside(target) as temporary:
            temporary.write_text(self.scheduler.to_json_string(), encoding="utf-8")
        return [SCHEDULER_FILE]


def own_scheduler(location: str | os.PathLike, subfolder: str | None, hub: dict[str, Any]) -> SchedulerMixin | None:
    """The scheduler that lies beside an adapter or an authors' file, None if there is none.

    Raises:
        ValueError: what lies there is no config of a scheduler of diffusers.
    """
    location = Path(location).parent if Path(location).is_file() else location
    path = probe_file(location, SCHEDULER_FILE, subfolder, **hub)
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
