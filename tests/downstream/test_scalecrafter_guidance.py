"""Noise-damped guidance against its formula from three explicit predictions."""

import copy

import pytest
import torch
from conftest import SD_BETAS
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_wadi.downstream.scalecrafter import disable_scalecrafter, enable_scalecrafter, scalecrafter

FACTORS = {"mid_block": 3.0, "up_blocks.0": 2.5}
WEAK = {"mid_block": 2.0}
CALL = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def teacher(components):
    scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False)
    pipe = StableDiffusionPipeline(**{**components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def spied(teacher, monkeypatch):
    """(the teacher, inputs of its UNet at each call, noise given to the scheduler at each step)"""
    calls, noises = [], []
    step = teacher.scheduler.step
    monkeypatch.setattr(teacher.scheduler, "step", lambda n, *a, **k: noises.append(n) or step(n, *a, **k))
    handle = teacher.unet.conv_in.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[0]))
    yield teacher, calls, noises
    handle.remove()


def draw(pipe, w, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("red", guidance_scale=w, generator=generator, **CALL, **options).images


def test_the_noise_is_that_of_the_formula(spied):
    pipe, calls, noises = spied
    seen = []
    keep = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)) if args[0].shape[0] == 2 else None, with_kwargs=True
    )
    enable_scalecrafter(pipe, factors=FACTORS, weak_factors=WEAK, noise_damped=True)
    draw(pipe, 4.0)
    keep.remove()
    assert calls == [2, 1, 2, 1]  # the weaker pass only for the unconditional half
    disable_scalecrafter(pipe)
    for ((z, t), kwargs), noise in zip(copy.deepcopy(seen), noises):
        text = kwargs["encoder_hidden_states"]
        with torch.no_grad():
            with scalecrafter(pipe, factors=FACTORS):
                unconditional = pipe.unet(z[:1], t, text[:1]).sample
                conditional = pipe.unet(z[1:], t, text[1:]).sample
            with scalecrafter(pipe, factors=WEAK):
                weak = pipe.unet(z[:1], t, text[:1]).sample
        expected = weak + 4.0 * (conditional - unconditional)
        torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(noise, unconditional + 4.0 * (conditional - unconditional), atol=1e-3)


def test_without_guidance_it_changes_nothing(spied):
    pipe, calls, _ = spied
    enable_scalecrafter(pipe, factors=FACTORS)
    expected = draw(pipe, 1.0)
    calls.clear()
    enable_scalecrafter(pipe, factors=FACTORS, weak_factors=WEAK, noise_damped=True)
    assert torch.equal(draw(pipe, 1.0), expected)
    assert calls == [1, 1]


def test_it_ends_with_the_dilation(spied):
    pipe, calls, _ = spied
    enable_scalecrafter(pipe, factors=FACTORS, weak_factors=WEAK, noise_damped=True, until=0.5)
    draw(pipe, 4.0)
    assert calls == [2, 1, 2]


def test_the_weaker_pass_is_never_the_wider_one(spied):
    """The factors of large sizes come down with the steps, and take the weaker ones along."""
    pipe, calls, _ = spied
    seen, layer = [], pipe.unet.mid_block.resnets[0].conv1
    keep = layer.register_forward_hook(lambda module, args, output: seen.append(module.dilation[0]))
    enable_scalecrafter(pipe, 256, 256, noise_damped=True, until=0.7)
    call = CALL | {"height": 256, "width": 256, "num_inference_steps": 4}
    pipe("red", guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **call)
    keep.remove()
    assert list(zip(calls, seen)) == [(2, 3), (1, 3), (2, 2), (1, 2), (2, 1), (2, 1)]


def test_one_step_is_refused_before_the_unet_runs(spied):
    pipe, calls, _ = spied
    enable_scalecrafter(pipe, factors=FACTORS, weak_factors=WEAK, noise_damped=True)
    with pytest.raises(ValueError, match="one step: .*never saw an empty prompt"):
        pipe("red", **CALL | {"num_inference_steps": 1})
    assert not calls


def test_a_copied_unet_in_another_pipeline_has_to_be_enabled_there(teacher):
    enable_scalecrafter(teacher, factors=FACTORS, weak_factors=WEAK, noise_damped=True)
    other = StableDiffusionPipeline(**{**teacher.components, "unet": copy.deepcopy(teacher.unet)})
    with pytest.raises(RuntimeError, match="enable_scalecrafter on the pipeline in use"):
        draw(other, 4.0)


def test_weak_factors_come_from_the_rule_where_none_are_given(teacher):
    enable_scalecrafter(teacher, 256, 256, noise_damped=True)
    assert teacher.unet._scalecrafter.weak_factors == {
        f"mid_block.resnets.{i}.conv{j}": 4.0 for i in (0, 1) for j in (1, 2)
    }
    enable_scalecrafter(teacher, 256, 256, noise_damped=True, strength=0.5)
    assert set(teacher.unet._scalecrafter.weak_factors.values()) == {2.5}
    with pytest.raises(ValueError, match="height and width of a larger image, or weak_factors="):
        enable_scalecrafter(teacher, factors=FACTORS, noise_damped=True)
