"""`--attention auto`: fused wherever it was measured to be the faster one."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_wadi.distillation.setup import plain_attention


@pytest.mark.parametrize(
    "attention, mixed_precision, base_dtype, device, plain",
    [
        ("auto", "no", None, "cpu", False),
        ("auto", "bf16", None, "cpu", True),  # the base stays float32, autocast is bfloat16
        ("auto", "no", "bf16", "cpu", True),
        ("auto", "bf16", None, "cuda", False),
        ("plain", "no", None, "cuda", True),
        ("sdpa", "bf16", None, "cpu", False),
    ],
)
def test_which_attention(attention, mixed_precision, base_dtype, device, plain):
    args = SimpleNamespace(attention=attention, mixed_precision=mixed_precision, base_dtype=base_dtype)
    assert plain_attention(args, torch.device(device)) is plain
