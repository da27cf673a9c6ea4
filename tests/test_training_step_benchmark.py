"""`benchmarks/training_step.py`: the release it compares with computes LoRaD, and every row can be measured."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SD_BETAS, tiny_unet
from diffusers import DDIMScheduler

from diffusers_wadi.distillation import WaDiNetworks
from diffusers_wadi.distillation.adapters import AdapterSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import release_recipe
import training_step

sys.path.pop(0)

TINY = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
    "text": (5, 16),
    "ranks": (4, 2),
    "precision": "no",
}


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([999, 3]),
        torch.randn(2, 5, 16, generator=generator),
    )


def test_the_release_computes_the_same_networks():
    unet = tiny_unet()
    release = release_recipe.ReleaseStep(unet, 4, 2, torch.linspace(0.99, 0.0047, 1000), nullcontext)
    networks = WaDiNetworks(tiny_unet(), AdapterSpec(rank=4), AdapterSpec(rank=2))
    networks.model.load_state_dict(
        {**networks.model.state_dict(), **{_adapted(networks.model, k): v for k, v in unet.state_dict().items()}}
    )
    for role, factors in (("student", release.student_factors), ("fake", release.fake_factors)):
        ours = list(networks.role_state(role).values())
        assert [p.shape for p in ours] == [p.shape for p in factors]
        for theirs, mine in zip(factors, ours):
            torch.nn.init.normal_(theirs, std=0.5)
            mine.data.copy_(theirs.data)
        with torch.no_grad():
            expected = release.predict(getattr(release, role), *inputs())
            assert torch.allclose(getattr(networks, role)(*inputs()), expected, atol=1e-5)
            assert not torch.allclose(networks.teacher(*inputs()), expected, atol=1e-2)


def _adapted(model, key: str) -> str:
    """The name of a weight of the plain model in one with adapters."""
    module, _, name = key.rpartition(".")
    base = f"{module}.base_layer.{name}"
    return base if base in model.state_dict() else key


def test_the_release_trains_both_networks():
    release = release_recipe.ReleaseStep(tiny_unet(), 4, 2, DDIMScheduler(**SD_BETAS).alphas_cumprod, nullcontext)
    before = [p.detach().clone() for p in release.student_factors + release.fake_factors]
    text = torch.randn(2, 5, 16)
    logs = [release.step(text, torch.randn(1, 5, 16), (4, 8, 8)) for _ in range(2)]
    moved = [not torch.equal(p, old) for p, old in zip(release.student_factors + release.fake_factors, before)]
    assert all(moved[::2]) and set(logs[0]) == {"student_loss", "gradient", "fake_loss", "fake_eps"}


@pytest.mark.parametrize("contender", training_step.CONTENDERS)
def test_rows_are_measured(contender):
    row = training_step.measure(contender, TINY, {"batch": 2, "checkpointing": True}, steps=2, threads=None)
    assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["device"]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_ratios_are_to_the_same_setting():
    rows = [
        {"contender": "release", "batch": 1, "seconds": 4.0, "images_per_second": 0.25, "peak": 10.0},
        {"contender": "ours", "batch": 1, "compile": True, "seconds": 1.0, "images_per_second": 1.0, "peak": 5.0},
        {"contender": "ours", "batch": 1, "checkpointing": True, "error": "out of memory"},
    ]
    table = training_step.markdown(rows, "a machine").splitlines()
    assert table[4].endswith("| 1.00 | 1.00 |  |  |") and "| 0.25 | 0.50 |  |  |" in table[5]
    assert "out of memory" in table[6]
