"""`training/train_wadi.py` as a module, the flags of a tiny run of it, and whether two runs came to the same."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TRAINING = Path(__file__).parents[1] / "training"
SCRIPT = TRAINING / "train_wadi.py"
PROMPTS = ["red", "blue", "red blue", "blue red", "a red r"]
SIZES = "--student_rank 4 --fake_rank 2 --train_batch_size 2".split()
SOURCES = {"--dataset_name", "--shapes_captions", "--train_prompts"}


def load_script(name: str) -> ModuleType:
    """A script of `training/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_wadi = load_script("train_wadi")


def tiny_run(teacher: str | Path, folder: Path, *flags: Any, name: str = "out") -> argparse.Namespace:
    """Checked flags of a run on `teacher` into `folder / name`; `flags` may name another source than PROMPTS."""
    given = ["--pretrained_teacher_model", teacher, "--output_dir", folder / name, *SIZES]
    if not SOURCES & set(flags):
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        given += ["--train_prompts", prompts]
    return train_wadi.parse_args([str(flag) for flag in (*given, *flags)])


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Equal to the bit, of the same types, all the way down."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert one == other, where
