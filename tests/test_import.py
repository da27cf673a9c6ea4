"""What importing the package does, in fresh processes."""

import subprocess
import sys

import pytest

PACKAGE_FIRST = """
import importlib.util, sys, diffusers
import diffusers_wadi
assert not {"peft", "transformers", "accelerate"} & set(sys.modules)  # what would make it slow
importlib.util.find_spec("peft")  # only asking must not use up the registration
import peft
assert peft.PeftType("LORAD").value == "LORAD"
assert peft.get_peft_config({"peft_type": "LORAD"}).r == 64
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as known
assert known["wadi"] is diffusers_wadi.WaDiPipeline
for name in diffusers_wadi.__all__:
    assert getattr(diffusers_wadi, name) is not None, name
assert set(diffusers_wadi.__all__) <= set(dir(diffusers_wadi))
"""
PEFT_FIRST = """
import peft, diffusers_wadi
assert peft.get_peft_config({"peft_type": "LORAD"}).r == 64
"""
PARTS_FIRST = """
from diffusers_wadi.lorad import LoRaDConfig
from diffusers_wadi.pipelines import WaDiPipeline
import peft
assert peft.get_peft_config({"peft_type": "LORAD"}).r == 64
from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING as known
assert known["wadi"].__name__ == "StableDiffusionImg2ImgPipeline"
"""


@pytest.mark.parametrize("code", [PACKAGE_FIRST, PEFT_FIRST, PARTS_FIRST], ids=["package", "peft", "parts"])
def test_import_registers_in_any_order_and_brings_nothing_slow(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_name():
    import diffusers_wadi

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = diffusers_wadi.nothing_here


def test_require_names_the_extra():
    from diffusers_wadi._optional import require

    assert require("json", extra="demo").dumps([]) == "[]"
    with pytest.raises(ImportError, match=r'pip install "diffusers-wadi\[demo\]"'):
        require("no_such_package_here", extra="demo")
