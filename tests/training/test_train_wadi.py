"""`training/train_wadi.py` end to end on a tiny random teacher."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from wadi_script import PROMPTS, assert_same, train_wadi

from diffusers_wadi import LoRaDConv2d, WaDiPipeline, load_lorad_adapter
from diffusers_wadi.distillation import checkpoint, regression, steps, trainer
from diffusers_wadi.distillation.trainer import WaDiTrainer


@pytest.fixture
def run(tiny_run):
    """Parse flags for a tiny run; `name` is the output folder."""
    return lambda name, *flags: tiny_run("--validation_steps", 0, *flags, name=name)


def state_of(trainer: WaDiTrainer) -> dict:
    """Everything that has to be the same after a resume."""
    networks, parts = trainer.networks, checkpoint.collect_state(trainer._parts())
    adapters = {f"{role}.{k}": v for role in ("student", "fake") for k, v in networks.role_state(role).items()}
    return {"adapters": adapters, "parts": parts}


RESUMED_RUNS = {
    "release": ("--max_train_steps", 4),
    "ema, several fakes": "--max_train_steps 4 --use_ema --fake_updates_per_step 3 --score_weighting dmd2".split(),
    "in the warm start": "--warmup_regression_steps 3 --max_train_steps 1 --use_ema".split(),
    "fake alone": "--fake_warmup_steps 3 --max_train_steps 1".split(),
    "after it": "--warmup_regression_steps 1 --max_train_steps 3 --regression_weight 0.5 --lr_scheduler cosine".split(),
    "in an epoch, accumulating": "--max_train_steps 4 --gradient_accumulation_steps 2 --train_batch_size 3".split(),
    "other adapters": "--max_train_steps 3 --student_adapter dora --fake_adapter lora --use_ema".split(),
    "networks of their own": "--max_train_steps 3 --student_adapter full --fake_adapter cayley".split(),
}


@pytest.mark.parametrize("flags", RESUMED_RUNS.values(), ids=RESUMED_RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(run, flags):
    pairs = ("--warmup_regression_pairs", 6, "--warmup_num_inference_steps", 2)
    flags = (*flags, *pairs, "--checkpointing_steps", 2)
    whole = WaDiTrainer(run("whole", *flags))
    whole.train()
    torch.manual_seed(123)  # whatever happened between the two runs must not matter
    resumed = WaDiTrainer(run("whole", *flags, "--resume_from_checkpoint", "checkpoint-2"))
    assert resumed.step == 2
    while resumed.step < resumed.total_steps:
        resumed.update()
    assert_same(state_of(whole), state_of(resumed))


def test_the_fake_warms_up_alone(run):
    trained = WaDiTrainer(run("out", "--fake_warmup_steps", 2, "--max_train_steps", 1))
    before = [{n: p.clone() for n, p in trained.networks.role_state(role).items()} for role in ("student", "fake")]
    for _ in range(2):
        trained.update()
    student, fake = (trained.networks.role_state(role) for role in ("student", "fake"))
    assert all(torch.equal(p, before[0][n]) for n, p in student.items())
    assert any(not torch.equal(p, before[1][n]) for n, p in fake.items())
    trained.update()
    assert any(not torch.equal(p, before[0][n]) for n, p in student.items())


def test_resuming_with_other_flags_is_refused(run):
    WaDiTrainer(run("a", "--max_train_steps", 1)).train()
    resume = ("--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="--use_ema"):
        WaDiTrainer(run("a", *resume, "--use_ema"))
    with pytest.raises(ValueError, match=r"checkpoint-1 was written by a run with --student_rank 4 \(now 3\)"):
        WaDiTrainer(run("a", *resume, "--student_rank", 3))
    with pytest.raises(ValueError, match="--seed"):
        WaDiTrainer(run("a", *resume, "--seed", 5))
    with pytest.raises(ValueError, match="--student_adapter lorad .now full.*--use_ema"):
        WaDiTrainer(run("a", *resume, "--student_adapter", "full", "--use_ema"))
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        WaDiTrainer(run("a", "--resume_from_checkpoint", "checkpoint-7"))
    args = run("a", *resume)
    Path(args.train_prompts).write_text("\n".join([*PROMPTS[:-1], "another"]))
    with pytest.raises(ValueError, match="SHA-256 of the prompts"):
        WaDiTrainer(args)
    assert WaDiTrainer(run("fresh", *resume)).step == 0  # "latest" where there is none yet


@pytest.mark.parametrize("kind, decay", [("constant", 1.0), ("cosine", 0.5)])
def test_resuming_with_another_learning_rate(run, caplog, kind, decay):
    """The first update takes the new rate at the schedule's present point, and the schedule goes on from it."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--lr_scheduler", kind)
    WaDiTrainer(run("a", *flags, "--learning_rate", 0.1)).train()
    caplog.set_level(logging.INFO, logger=trainer.logger.name)
    moves = []
    for rate in (0.1, 0.01):
        caplog.clear()
        resume = ("--resume_from_checkpoint", "checkpoint-2", "--learning_rate", rate)
        training = WaDiTrainer(run("a", *flags, *resume))
        student, fake = training.steps.student, training.steps.fake
        assert student.optimizer.param_groups[0]["lr"] == pytest.approx(rate * decay)
        assert fake.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * decay)
        before = torch.cat([p.detach().flatten() for p in student.parameters])
        training.update()
        moves.append(torch.cat([p.detach().flatten() for p in student.parameters]) - before)
        later = 1 if kind == "constant" else (1 - 0.5**0.5) / 2
        assert student.lr_scheduler.get_last_lr() == pytest.approx([rate * later])
    assert torch.allclose(moves[0], 10 * moves[1], rtol=1e-3, atol=1e-5) and moves[1].abs().max() > 1e-3
    assert "learning rate of student: 0.01 instead of the checkpoint's 0.1" in caplog.text
    assert "of fake" not in caplog.text


def test_a_resumed_average_is_put_on_the_device(run, monkeypatch):
    """EMAModel.load_state_dict leaves it on the CPU."""
    WaDiTrainer(run("a", "--max_train_steps", 1, "--use_ema")).train()
    devices = []
    monkeypatch.setattr(trainer.EMAModel, "to", lambda average, device: devices.append(device))
    resumed = WaDiTrainer(run("a", "--max_train_steps", 2, "--use_ema", "--resume_from_checkpoint", "latest"))
    assert devices == [resumed.device]


def base_named_in(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_checkpoints_name_the_teacher_by_a_path_that_holds_anywhere(run, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    relative = ("--pretrained_teacher_model", base_folder.name, "--max_train_steps", 1, "--learning_rate", 0.1)
    trained = WaDiTrainer(run("out", *relative, "--base_model_name_or_path", "some/hub-id", "--use_ema"))
    trained.train()
    assert base_named_in(trained.output_dir) == "some/hub-id"
    plain = WaDiTrainer(run("plain", *relative))
    plain.export()
    assert base_named_in(plain.output_dir) == str(base_folder.resolve())

    monkeypatch.chdir(tmp_path)
    for role in ("fake", "student", "student_ema"):
        assert base_named_in(Path("out/checkpoint-1", role)) == str(base_folder.resolve())
    pipe = WaDiPipeline.from_pretrained("out/checkpoint-1/student")
    z, text = torch.randn(2, 4, 8, 8), trained.embeddings.at(torch.tensor([1, 2]))
    with torch.no_grad():
        x0 = trainer.losses.student_x0(trained.networks.student, z, text, trained.schedule)
    latents = pipe(PROMPTS[1:3], latents=z, output_type="latent").images
    assert torch.allclose(latents, x0, rtol=1e-3, atol=1e-3)


def test_exported_student_runs_in_the_pipeline(run, base_folder):
    """What training validates is what a user gets, with the averaged weights."""
    args = run("out", *"--max_train_steps 2 --use_ema --learning_rate 0.1 --validation_steps 1".split())
    trained = WaDiTrainer(args)
    trained.train()
    output = Path(args.output_dir)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder) and config["r"] == 4
    assert sorted(path.name for path in (output / "samples").iterdir()) == [f"step-{i:06d}.png" for i in range(3)]
    assert Image.open(output / "samples" / "step-000002.png").size == (5 * 64, 64)

    z = torch.randn(2, 4, 8, 8)
    text = trained.embeddings.at(torch.tensor([1, 2]))
    with torch.no_grad(), trained.averaged_student():
        x0 = trainer.losses.student_x0(trained.networks.student, z, text, trained.schedule)
        x0_raw_base = trainer.losses.student_x0(trained.networks.teacher, z, text, trained.schedule)
    pipe = WaDiPipeline.from_pretrained(output)
    latents = pipe(PROMPTS[1:3], latents=z, output_type="latent").images
    assert torch.allclose(latents, x0, rtol=1e-3, atol=1e-3) and not torch.allclose(x0, x0_raw_base, atol=0.1)


def test_checkpoint_adapters_load_by_themselves(run):
    args = run("out", "--max_train_steps", 1, "--use_ema")
    trained = WaDiTrainer(args)
    trained.train()
    folder = Path(args.output_dir) / "checkpoint-1"
    names = ["fake", "settings.json", "student", "student_ema", checkpoint.STATE_FILE]
    assert sorted(path.name for path in folder.iterdir()) == names
    for role in ("fake", "student", "student_ema"):
        load_lorad_adapter(tiny_unet(), folder / role, "default")


def test_rotation_and_a_finished_run(run):
    flags = "--max_train_steps 4 --checkpointing_steps 1 --checkpoints_total_limit 2".split()
    train_wadi.main(run("out", *flags))
    args = run("out", *flags, "--resume_from_checkpoint", "latest")
    assert [path.name for path in checkpoint.list_checkpoints(args.output_dir)] == ["checkpoint-3", "checkpoint-4"]
    (Path(args.output_dir) / "adapter_config.json").unlink()
    train_wadi.main(args)  # nothing left to do but the export
    assert (Path(args.output_dir) / "adapter_config.json").is_file()


# samples through the UNet for each caption of a step: student 1, teacher 2, fake 2, fake's training 1
PASSES = {
    "release": ((), 4, 6),
    "fake unguided": (("--fake_guidance_scale", 1), 4, 5),
    "three fakes": (("--fake_updates_per_step", 3), 8, 10),
    "with regression": (("--regression_weight", 1), 5, 7),
}


@pytest.mark.parametrize("flags, calls, passes", PASSES.values(), ids=PASSES)
def test_a_step_makes_no_needless_passes(run, flags, calls, passes):
    small = ("--warmup_regression_pairs", 2, "--warmup_num_inference_steps", 1)
    training = WaDiTrainer(run("out", "--max_train_steps", 1, *small, *flags))
    sizes = []
    training.networks.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    training.update()
    assert (len(sizes), sum(sizes)) == (calls, 2 * passes)


def test_the_fake_trains_on_the_images_of_the_student_before_its_update(run, monkeypatch):
    training = WaDiTrainer(run("out", *"--max_train_steps 1 --fake_updates_per_step 2 --learning_rate 1".split()))
    events = []
    for name in ("student_loss", "fake_loss"):
        original = getattr(steps.WaDiSteps, name)

        def recorded(self, x0, text, name=name, original=original):
            events.append((name, x0.detach().clone(), text))
            return original(self, x0, text)

        monkeypatch.setattr(steps.WaDiSteps, name, recorded)
    training.update()
    assert [event[0] for event in events] == ["fake_loss", "student_loss", "fake_loss"]
    assert torch.equal(events[1][1], events[2][1]) and torch.equal(events[1][2], events[2][2])
    assert not torch.equal(events[0][1], events[1][1]) and not torch.equal(events[0][2], events[1][2])


def test_accumulation_takes_further_prompts(run):
    training = WaDiTrainer(run("out", *"--max_train_steps 2 --gradient_accumulation_steps 2".split()))
    training.update()
    assert training.steps.order.position == 4


def test_low_precision_and_memory_options_train(run):
    flags = (
        "--max_train_steps 2 --mixed_precision bf16 --gradient_checkpointing --channels_last --embedding_dtype fp16"
    )
    training = WaDiTrainer(run("out", *flags.split(), "--precompute_text_embeddings", "--empty_prompts_per", "sample"))
    before = [parameter.detach().clone() for parameter in training.networks.student_parameters()]
    training.train()
    after = training.networks.student_parameters()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in after)
    assert any(not torch.equal(*pair) for pair in zip(before, after))


def test_warm_start_learns_the_teachers_samples(run):
    flags = "--warmup_regression_steps 40 --warmup_regression_pairs 2 --warmup_num_inference_steps 3"
    args = run("out", *flags.split(), "--max_train_steps", 0, "--warmup_learning_rate", 0.03)
    training = WaDiTrainer(args)
    first, last = training.update(), [training.update() for _ in range(39)][-1]
    assert last["regression_loss"] < 0.9 * first["regression_loss"]
    assert training.steps.warmup.lr_scheduler.get_last_lr()[0] < 1e-3  # cosine, down to 0


def test_pairs_are_made_once_for_the_same_settings(run, monkeypatch):
    flags = "--warmup_regression_steps 1 --warmup_regression_pairs 3 --warmup_num_inference_steps 2".split()
    pairs = WaDiTrainer(run("out", *flags)).steps.pairs
    monkeypatch.setattr(regression, "make_pairs", lambda *args, **kwargs: pytest.fail("sampled again"))
    again = WaDiTrainer(run("out", *flags)).steps.pairs
    assert torch.equal(pairs.target, again.target) and torch.equal(pairs.noise, again.noise)
    with pytest.raises(pytest.fail.Exception):
        WaDiTrainer(run("out", *flags, "--warmup_guidance_scale", 2))


def test_students_can_start_from_an_adapter(run):
    first = WaDiTrainer(run("first", "--max_train_steps", 1, "--learning_rate", 0.1))
    first.train()
    second = WaDiTrainer(run("second", "--init_student", first.args.output_dir))
    pairs = zip(first.networks.student_parameters(), second.networks.student_parameters())
    assert all(torch.equal(*pair) for pair in pairs)
    with pytest.raises(ValueError, match="--student_rank 4"):
        WaDiTrainer(run("third", "--init_student", first.args.output_dir, "--student_rank", 8))


def test_velocity_teachers_take_no_terminal_value(run, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="v-prediction teacher"):
        WaDiTrainer(run("out", "--pretrained_teacher_model", tmp_path / "v", "--terminal_alpha_cumprod", 0.0047))


def test_bad_settings_that_need_the_teacher(run):
    with pytest.raises(ValueError, match="max_timestep is 1000.*ends at 999"):
        WaDiTrainer(run("out", "--max_timestep", 1000))
    with pytest.raises(ValueError, match="fake_min_timestep is 1000.*ends at 999"):
        WaDiTrainer(run("out", "--fake_min_timestep", 1000))
    with pytest.raises(ValueError, match="multiple of 8"):
        WaDiTrainer(run("out", "--resolution", 100))


def test_divergence_stops_the_run(run):
    training = WaDiTrainer(run("out", *"--max_train_steps 3 --logging_steps 1 --max_bad_steps 2".split()))
    training.networks.student_parameters()[0].data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        training.train()


def test_convolutions_of_the_student_are_trained_and_come_back(run, tmp_path):
    args = run("convs", "--student_convolutions", "--warmup_regression_steps", 2, "--warmup_regression_pairs", 2,
               "--warmup_num_inference_steps", 1, "--max_train_steps", 1)  # fmt: skip
    trained = WaDiTrainer(args)
    trained.train()
    layers = dict(trained.networks.unet.named_modules())
    convolutions = [n for n, m in layers.items() if isinstance(m, LoRaDConv2d) and "student" in m.lorad_A]
    assert convolutions and all(layers[name].lorad_A["student"].abs().max() > 0 for name in convolutions)
    assert not any("fake" in layers[name].lorad_A for name in convolutions)

    loaded = WaDiPipeline.from_pretrained(tmp_path / "convs").unet
    found = [name for name, module in loaded.named_modules() if isinstance(module, LoRaDConv2d)]
    assert found == convolutions
    for name in found:
        angles = loaded.get_submodule(name).get_angles()
        torch.testing.assert_close(angles, layers[name].get_angles(["student"]), rtol=0, atol=0)


def test_a_stopped_run_says_how_to_go_on(run, monkeypatch, caplog):
    args, update = run("out", "--max_train_steps", 5), WaDiTrainer.update

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self)

    monkeypatch.setattr(WaDiTrainer, "update", interrupted)
    assert WaDiTrainer(args).train() == signal.SIGTERM
    assert f"stopped by SIGTERM after step 1 of 5; {args.output_dir}/checkpoint-1 is saved" in caplog.text
    assert "Go on with the same command and --resume_from_checkpoint latest" in caplog.text
