"""Updates that are not finite are left out, whichever way the optimiser allows."""

import pytest
import torch
from accelerate import Accelerator

from diffusers_wadi.distillation.guard import StepGuard, poisoned_if_broken


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def guarded(request):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=request.param)
    return parameter, StepGuard(Accelerator(cpu=True).prepare_optimizer(optimizer)), optimizer


def update(parameter, guard, scale):
    poisoned_if_broken(scale * parameter.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    guard.step(norm)
    guard.optimizer.zero_grad()


def test_a_broken_step_changes_nothing(guarded):
    parameter, guard, optimizer = guarded
    update(parameter, guard, 1.0)
    weights, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    for scale in (float("nan"), float("inf")):
        update(parameter, guard, scale)
    assert torch.equal(parameter, weights)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[parameter].items())
    update(parameter, guard, 1.0)
    assert not torch.equal(parameter, weights)
    update(parameter, guard, float("nan"))
    assert guard.counts.tolist() == [3, 2]  # three in all, two of them in a row


def test_a_broken_loss_with_finite_gradients_counts_as_broken(guarded):
    parameter, guard, _ = guarded
    loss = parameter.sum() + torch.tensor(float("inf"))
    (plain,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    assert plain.isfinite().all()
    poisoned_if_broken(loss).backward()
    assert parameter.grad.isnan().all()


def test_a_schedule_goes_on_without_a_warning(guarded, recwarn):
    parameter, guard, optimizer = guarded
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    update(parameter, guard, float("nan"))
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_sound_loss_is_left_as_it_is():
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = x.square().sum()
    (one,), (other,) = (torch.autograd.grad(y, x, retain_graph=True) for y in (loss, poisoned_if_broken(loss)))
    assert torch.equal(one, other) and torch.equal(loss, poisoned_if_broken(loss))


def test_a_fused_optimiser_that_loaded_a_state_of_the_cpus(guarded):
    parameter, guard, optimizer = guarded
    optimizer.param_groups[0]["fused"] = None
    update(parameter, guard, float("nan"))
    update(parameter, guard, 1.0)
    assert not torch.equal(parameter, torch.ones(3)) and guard.counts.tolist() == [1, 1]
