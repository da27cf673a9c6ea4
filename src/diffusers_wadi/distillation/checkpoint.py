"""Checkpoints of a distillation run: whole or absent, and enough to go on bit for bit.

``checkpoint-<step>/`` holds ``student/`` and ``fake/`` (LoRaD as native adapter folders, loadable by themselves),
``student_ema/`` where an average is kept, ``settings.json`` with the flags of the run, and ``training_state.pt``:
optimisers, schedules, average, data order, step and the random states of every process.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._adapter_files import LORAD_WEIGHT_NAME, read_lorad_file
from ..loaders import save_lorad_adapter
from .networks import FAKE, STUDENT, WaDiNetworks

_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.[\w-]+-[a-z0-9_]{8}\.(safetensors|json|png|bin)")  # as `written_beside` names them
STATE_FILE = "training_state.pt"
ROLE_FILE = "role.safetensors"
# A full disk, as Python, `torch.save` and safetensors report it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def checkpoint_step(folder: str | Path) -> int | None:
    """The step in a checkpoint folder's name, ``None`` for any other folder."""
    match = _NAME.fullmatch(Path(folder).name)
    return int(match.group(1)) if match else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Finished checkpoints in ``output_dir``, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if checkpoint_step(path) is not None]
    return sorted(folders, key=checkpoint_step)


def find_checkpoint(output_dir: str | Path, wanted: str) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint wanted`` means.

    Args:
        wanted: ``"latest"``, the name of a folder in ``output_dir``, or a path.

    Returns:
        The folder; ``None`` for ``"latest"`` where there is none yet.

    Raises:
        FileNotFoundError: a named checkpoint is not there, or holds no training state.
    """
    if wanted == "latest":
        folders = list_checkpoints(output_dir)
        return folders[-1] if folders else None
    for folder in (Path(output_dir) / wanted, Path(wanted)):
        if (folder / STATE_FILE).is_file():
            return folder
    known = [path.name for path in list_checkpoints(output_dir)]
    raise FileNotFoundError(
        f"No checkpoint {wanted!r} (a folder with {STATE_FILE}) in {str(output_dir)!r}, which holds {known}. "
        "Name one of these, or 'latest'."
    )


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a sibling of ``folder``, flush it to disk and rename it: ``folder`` is whole or absent.

    A folder that is there already is moved aside first and removed at the end; if the process dies in between,
    :func:`clean_up` moves it back.

    Raises:
        OSError: the disk is full or refuses; nothing is left behind, and other checkpoints are as they were.
    """
    folder = Path(folder)
    partial, replaced = (_hidden(folder, state) for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        _flush(partial)
    except WRITE_ERRORS as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(_not_written(folder, error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():  # a non-empty folder cannot be renamed onto
        folder.rename(replaced)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _not_written(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(folder.parent).free / 1e9
    whole = list_checkpoints(folder.parent)
    left = (
        f"{whole[-1].name} is whole: then go on with --resume_from_checkpoint latest" if whole else "None is there yet"
    )
    return (
        f"{folder} could not be written ({error}); {free:.2f} GB are free there. Make room, for instance with a lower "
        f"--checkpoints_total_limit. {left}."
    )


def clean_up(output_dir: str | Path) -> None:
    """Undo what a killed process left half done in ``output_dir``: replaced checkpoints come back, the rest goes.

    Nobody else may be writing there; with several processes the main one calls it.
    """
    for path in Path(output_dir).glob(".checkpoint-*"):
        name, _, state = path.name[1:].rpartition(".")
        if checkpoint_step(name) is None or state not in ("partial", "replaced", "removed"):
            continue
        if state == "replaced" and not path.with_name(name).exists():
            path.rename(path.with_name(name))
        else:
            shutil.rmtree(path)
    for folder in (Path(output_dir), Path(output_dir, "samples")):
        for path in folder.glob(".*"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()


def save_role(networks: WaDiNetworks, role: str, folder: Path, base: str) -> None:
    """Write what ``role`` trains, exactly: LoRaD as an adapter folder that names ``base``, others as plain tensors."""
    state, model = networks.role_state(role), networks.network(role)
    if all(name.endswith((".lorad_A", ".lorad_B")) for name in state):
        component = "unet" if isinstance(model, UNet2DConditionModel) else "transformer"
        save_lorad_adapter(model, folder, role, component, base_model_name_or_path=base)
        return
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in state.items()}
    save_file(tensors, folder / ROLE_FILE, metadata={"format": "pt"})


def load_role(networks: WaDiNetworks, role: str, folder: Path) -> None:
    """Read what :func:`save_role` wrote into the parameters of ``role``.

    Raises:
        ValueError: it does not fit.
    """
    if (folder / LORAD_WEIGHT_NAME).is_file():
        state, _ = read_lorad_file(folder / LORAD_WEIGHT_NAME)
        state = {name.removeprefix("unet.").removeprefix("transformer."): t for name, t in state.items()}
    else:
        state = load_file(folder / ROLE_FILE)
    networks.load_role_state(role, state)


def load_checkpoint(folder: Path, networks: WaDiNetworks, parts: dict[str, Any]) -> dict[str, Any]:
    """Load both roles and ``parts`` out of ``folder``.

    Returns:
        The content of ``training_state.pt``, on the CPU: ``parts`` and, one per process, ``randoms``.

    Raises:
        ValueError: the roles do not fit ``networks``, or see :func:`restore_state`.
    """
    saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    for role in (STUDENT, FAKE):
        load_role(networks, role, folder / role)
    restore_state(parts, saved["parts"])
    return saved


def lasting_name(pipeline: str) -> str:
    """What an adapter's config has to call ``pipeline``: a local folder by its absolute path, a Hub id as it is.

    A relative path would hold only for the working directory of the training.
    """
    return str(Path(pipeline).resolve()) if Path(pipeline).is_dir() else pipeline


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old_checkpoints(output_dir: str | Path, total_limit: int | None) -> None:
    """Keep the newest ``total_limit`` checkpoints; ``None`` keeps all. Called after a new one is whole."""
    if total_limit is None:
        return
    folders = list_checkpoints(output_dir)
    for folder in folders[: max(0, len(folders) - total_limit)]:
        removed = _hidden(folder, "removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)  # out of sight in one move, so that no half of it is ever taken for a checkpoint
        shutil.rmtree(removed)


def set_aside_later(output_dir: str | Path, step: int) -> list[Path]:
    """Rename checkpoints beyond ``step`` to ``abandoned-checkpoint-<step>``, and return where they are now.

    They belong to a run that was resumed from an earlier point and now goes another way: "latest" must not find
    them. Abandoned ones of the same step are replaced.
    """
    moved = []
    for folder in list_checkpoints(output_dir):
        if checkpoint_step(folder) > step:
            target = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(folder.rename(target))
    return moved


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, of types that ``torch.load(weights_only=True)`` reads."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what :func:`random_states` returned; CUDA states only where the same number of devices is there."""
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def collect_state(parts: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` of each part that has one (generators: ``get_state``), numbers as they are, ``None`` left out."""
    return {name: _state_of(part) for name, part in parts.items() if part is not None}


def _state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict() if hasattr(part, "state_dict") else part


def restore_state(parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Load ``state`` into ``parts``; plain values in ``parts`` are skipped.

    Raises:
        ValueError: the checkpoint was written by a run with other parts (e.g. with ``--use_ema``); nothing has
            been loaded then.
    """
    wanted = {name for name, part in parts.items() if part is not None}
    if wanted != set(state):
        raise ValueError(
            f"The checkpoint holds {sorted(state)}, this run needs {sorted(wanted)}. Resume with the flags of the run "
            "that wrote it (--use_ema, --warmup_regression_steps, --regression_weight, --mixed_precision)."
        )
    for name in sorted(wanted):
        part = parts[name]
        if isinstance(part, torch.Generator):
            part.set_state(state[name])
        elif hasattr(part, "load_state_dict"):
            part.load_state_dict(state[name])
