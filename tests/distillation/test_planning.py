"""The plan of a run: counted from shapes, it has to agree with the run itself."""

from functools import partial

import pytest
import torch
from wadi_script import train_wadi

from diffusers_wadi.distillation import checkpoint, planning
from diffusers_wadi.distillation.trainer import WaDiTrainer


@pytest.fixture
def run(tiny_run):
    return partial(tiny_run, *"--validation_steps 0 --attention plain".split())


def test_live_memory():
    with planning.LiveMemory() as memory:
        a = torch.ones(1000)  # 4 kB
        b = a * 2
        view = b[:10]
        del a
        b += 1
        c = torch.empty(500, device="meta")
        assert memory.now == 6000 and memory.peak == 8000
        del b
        assert memory.now == 6000  # the view keeps it
        del view
        assert memory.now == 2000
        del c
    assert memory.now == 0


KINDS = {
    "release, accumulating": "--gradient_accumulation_steps 2",
    "with regression, an average, other adapters": "--warmup_regression_steps 1 --warmup_regression_pairs 2 "
    "--warmup_num_inference_steps 1 --use_ema --student_adapter lora --fake_adapter full",
    "SiD, checkpointing": "--score_loss sid --gradient_checkpointing",
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_the_plan_is_what_the_run_takes(run, flags):
    images = 4 if "accumulation" in flags else 2
    flags = f"{flags} --max_train_steps 3 --checkpointing_steps 2".split()
    plan = planning.make_plan(run(*flags, "--dry_run"))
    trained = WaDiTrainer(run(*flags))
    roles = {role: sum(p.numel() for p in trained.networks.role_state(role).values()) for role in ("student", "fake")}
    assert plan.trainable == roles
    assert sum(plan.updates.values()) == trained.total_steps
    assert (plan.images, plan.prompts, plan.images_per_update) == (3 * images, 5, images)
    updates = [trained.steps.vsd_update]
    if "--warmup_regression_steps" in flags:
        updates.insert(0, trained.steps.warmup_update)
    for update in updates:  # Adam's moments are there from now on, and have a line of their own in the plan
        update()
    with planning.LiveMemory() as real:
        for update in updates:
            update()
    assert plan.memory["activations and gradients"] == pytest.approx(real.peak, rel=0.15)
    folder = trained.save_checkpoint()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt"))
    assert plan.checkpoint_bytes < size < 1.5 * plan.checkpoint_bytes + 200_000  # names and headers
    assert len(checkpoint.list_checkpoints(trained.output_dir)) == 1


def test_a_dry_run_prints_and_writes_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(WaDiTrainer, "__init__", lambda *arguments: pytest.fail("set up"))
    train_wadi.main(run("--dry_run", "--num_train_epochs", 3, "--checkpoints_total_limit", 1))
    shown = capsys.readouterr().out
    assert "8 of score distillation" not in shown and "9 of score distillation" in shown
    assert "18 (2 an update), 5 prompts: 3.60 epochs" in shown
    assert "student" in shown and "frozen base" in shown and "1 kept" in shown and "GB are free" in shown
    assert not (tmp_path / "out").exists()


def test_what_autocast_would_do_to_memory(run):
    """Half precision nearly halves the activations, but norms keep float32."""
    sizes = {}
    for precision in ("no", "bf16"):
        flags = ("--mixed_precision", precision, "--base_dtype", "fp32" if precision == "no" else "bf16")
        sizes[precision] = planning.make_plan(run("--dry_run", "--gradient_checkpointing", *flags)).memory
    assert sizes["bf16"]["frozen base"] * 2 == sizes["no"]["frozen base"]
    ratio = sizes["bf16"]["activations and gradients"] / sizes["no"]["activations and gradients"]
    assert 0.5 < ratio < 1
    own = "--dry_run --mixed_precision bf16 --base_dtype fp32 --student_adapter full --fake_adapter lora"
    mixed = planning.make_plan(run(*own.split())).memory
    assert mixed["frozen base"] == sizes["no"]["frozen base"] and mixed["student and Adam"] == 3 * mixed["frozen base"]
