"""PeftType.LORAD is a member like PEFT's own."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from diffusers_wadi.lorad import LoRaDConfig, LoRaDModel
from diffusers_wadi.lorad.registration import lorad_peft_type, register_lorad


def test_the_member_behaves_as_one():
    member = PeftType.LORAD
    assert member == "LORAD" and member.value == "LORAD" and member.name == "LORAD"
    assert isinstance(member, PeftType) and member in list(PeftType) and "LORAD" in PeftType.__members__
    assert PeftType("LORAD") is PeftType["LORAD"] is member
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert hash(member) == hash("LORAD") and repr(member) == "<PeftType.LORAD: 'LORAD'>"
    assert len({m.value for m in PeftType}) == len(PeftType)


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register_lorad()
    assert list(PeftType) == before and lorad_peft_type() is PeftType.LORAD
    for mapping, value in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, LoRaDConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, LoRaDModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, "lorad_"),
    ):
        assert mapping["LORAD"] is mapping[PeftType.LORAD] is value or mapping["LORAD"] == value


@pytest.mark.parametrize("first", ["import diffusers_wadi, peft", "import diffusers_wadi.lorad.config, peft"])
def test_importing_the_package_registers(first):
    code = f"{first}; print(peft.utils.PeftType.LORAD, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['LORAD'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PeftType.LORAD", "LoRaDConfig"], done.stderr


def test_config_round_trip_through_files(tmp_path):
    config = LoRaDConfig(r=5, target_modules=["a", "b"], rank_pattern={"a": 2}, init_lorad_weights="xavier")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORAD" and sorted(stored["target_modules"]) == ["a", "b"]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LoRaDConfig) and loaded.to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "at least 1, got 0 for `r`.*Set `r`"),
        ({"r": -3}, "at least 1, got -3"),
        ({"r": 1.5}, "integer of at least 1, got 1.5"),
        ({"rank_pattern": {"to_q": 0}}, "got 0 for `to_q`"),
        ({"bias": "some"}, "`bias` has to be one of .*got 'some'"),
        ({"init_lorad_weights": "gauss"}, "`init_lorad_weights` has to be one of .*got 'gauss'"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "Pass a list"),
        ({"target_modules": ["a"], "layers_pattern": "layers"}, "needs `layers_to_transform`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRaDConfig(**settings)
