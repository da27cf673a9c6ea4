"""`training/train_wadi.py` as a module."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "training" / "train_wadi.py"


def load_script():
    spec = importlib.util.spec_from_file_location("train_wadi", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_wadi = load_script()
