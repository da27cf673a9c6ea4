"""Each objective: one update against the plain implementation, its preset, and where its student starts."""

import argparse

import pytest
import reference_objectives as plain
import torch
from conftest import SD_BETAS
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from plain_steps import SHAPE, TABLE, B, PlainRole, assert_gradients, make_steps
from wadi_script import train_wadi

from diffusers_wadi.distillation import losses, objectives
from diffusers_wadi.distillation.data import PromptOrder
from diffusers_wadi.distillation.noise import SampleDraws
from diffusers_wadi.distillation.trainer import WaDiTrainer

SMALL = "--student_adapter lorad --student_rank 4 --fake_adapter lorad --fake_rank 2".split()
# What the sources say, typed a second time: timesteps of student and fake, guidance of teacher and fake, whether single
# samples lose their captions and how often, where the student starts, updates in their order.
SOURCES = {
    "wadi": ((20, 980), (0, 999), 1.5, 1.5, "batch", 0.1, None, ["student", "fake"]),
    "swiftbrush": ((20, 980), (0, 999), 4.5, 4.5, "batch", 0.1, None, ["student", "fake"]),
    "pg_sb": ((20, 980), (0, 999), (2.0, 7.0), None, "batch", 0.1, None, ["student", "fake"]),
    "dmd2": ((20, 980), (0, 999), 1.75, 1.0, "batch", 0.0, None, ["fake"] * 9 + ["student", "fake"]),
    "sid_lsg": ((20, 979), (20, 979), 1.5, 1.5, "sample", 0.1, 625, ["fake", "student"]),
}


@pytest.mark.parametrize("name, per", [*((name, "sample") for name in SOURCES), ("pg_sb", "batch")])
def test_one_update_agrees_with_the_source(tmp_path, name, per):
    t_range, fake_range, guidance, fake_guidance, dropping, share, start, order = SOURCES[name]
    flags = (
        ["--guidance_scale_min", 2, "--guidance_scale_max", 7, "--guidance_scale_per", per] if name == "pg_sb" else []
    )
    share = 0.5 if share else share  # as flag: a tenth would be too seldom to see
    flags += ["--proportion_empty_prompts", share] if share else []
    steps = make_steps(tmp_path, "--objective", name, *SMALL, *flags)
    steps.vsd_update()
    assert [role for role, _ in steps.taken] == order

    teacher, student, fake = (PlainRole(steps.networks, role) for role in ("teacher", "student", "fake"))
    draws, prompts = SampleDraws(0, B), PromptOrder(len(steps.embeddings), B, 0)
    empty, texts = steps.embeddings.empty[0], steps.embeddings.texts
    images = None
    for role, gradients in steps.taken:
        if images is None or role == "student":  # fresh ones
            draws.next_round()
            words = texts[prompts.next_batch()]
            z = draws.normal("z", SHAPE).double()
            images = [plain.one_step(student.predict, z[i], words[i], TABLE, start) for i in range(B)]
        if role == "student":
            scales = [guidance] * B
            if per_sample := isinstance(guidance, tuple):
                scales = draws.uniform("guidance", per, *guidance).tolist()
                assert (scales[0] == scales[1]) == (per == "batch")
            fake_scales = scales if per_sample else [fake_guidance] * B
            t, noise = draws.integers("t", *t_range).tolist(), draws.normal("noise", SHAPE).double()
            networks = (teacher.predict, fake.predict)
            loss = plain.student_loss(name, images, *networks, TABLE, words, empty, t, noise, scales, fake_scales)
            assert_gradients(gradients, student.gradients(loss))
            continue
        draws.next_round()
        dropped = draws.uniform("drop", dropping) < share
        known = [empty if dropped[i] else words[i] for i in range(B)]
        t, noise = draws.integers("fake_t", *fake_range).tolist(), draws.normal("fake_noise", SHAPE).double()
        loss = plain.fake_loss(name, images, fake.predict, TABLE, known, empty, t, noise)
        assert_gradients(gradients, fake.gradients(loss))
        images = None


def test_roles_do_not_leak_into_one_another(tmp_path):
    """SiD's student is differentiated through the fake, which must not learn from it."""
    steps = make_steps(tmp_path, "--objective", "sid_lsg", *SMALL)
    steps.student_update()
    networks = steps.networks
    assert all(parameter.grad is None for parameter in networks.fake_parameters())
    assert all(parameter.requires_grad for parameter in networks.fake_parameters())
    trained = {id(p) for p in networks.student_parameters() + networks.fake_parameters()}
    assert all(p.grad is None for p in networks.model.parameters() if id(p) not in trained)


def parse(tmp_path, *flags: str) -> argparse.Namespace:
    given = f"--pretrained_teacher_model t --train_prompts p --output_dir {tmp_path}"
    return train_wadi.parse_args([*given.split(), *(str(flag) for flag in flags)])


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_presets_name_flags_that_exist(tmp_path, name):
    range_ = "--guidance_scale_min 2 --guidance_scale_max 7".split() if name == "pg_sb" else []
    args, plain_ = parse(tmp_path, "--objective", name, *range_), vars(parse(tmp_path))
    chosen = objectives.OBJECTIVES[name]
    for flag, value in {**chosen.flags, **chosen.student, **chosen.fake}.items():
        assert getattr(args, flag) == value and plain_[flag] != value or flag == "guidance_scale", flag
        assert f"--{flag} {value}" in objectives.describe(args)


def test_given_flags_win_over_the_preset(tmp_path):
    args = parse(tmp_path, *"--objective swiftbrush --guidance_scale 3 --no-use_ema".split())
    assert args.guidance_scale == 3 and not args.use_ema and args.fake_alpha == 108
    assert "--guidance_scale 3.0 (preset 4.5)" in objectives.describe(args)
    # Rank, alpha, layers and rate belong to the adapter that is not chosen any more.
    args = parse(tmp_path, *"--objective swiftbrush --fake_adapter lorad --student_adapter=lora".split())
    assert (args.fake_rank, args.fake_alpha, args.fake_layers, args.fake_learning_rate) == (32, None, "paper", 1e-2)
    assert args.learning_rate == 1e-4 and args.guidance_scale == 4.5


REFUSED = {
    "--objective pg_sb": "needs both",
    "--guidance_scale_min 2": "needs both",
    "--guidance_scale_min 2 --guidance_scale_max 1": "above",
    "--objective sid_lsg --terminal_alpha_cumprod 0.0047": "--t_init 625",
    "--student_adapter full --student_layers qv": "'full' trains every parameter",
    "--student_alpha 4": "alpha is 4.0",
    "--fake_adapter lora --fake_init xavier": "--fake_adapter lora: init 'xavier'",
    "--student_convolutions --student_layers qkv": "--student_layers linear_conv",
    "--fake_adapter householder --adam_weight_decay 0.01": "householder",
    "--student_adapter full --base_dtype bf16": "--mixed_precision",
    "--student_adapter lora --push_to_hub": "--push_to_hub is for LoRaD",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_go_together_is_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=REFUSED[flags]):
        parse(tmp_path, *flags.split())


def test_a_rank_that_does_nothing_is_said(tmp_path, caplog):
    parse(tmp_path, *"--student_adapter full --student_rank 8 --fake_adapter lora --fake_rank 8".split())
    assert [r.getMessage() for r in caplog.records] == [
        "--student_adapter full has no rank: --student_rank 8 does nothing"
    ]


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_a_student_that_starts_earlier_runs_in_the_stock_pipeline(components, scheduler_class, betas):
    scheduler = scheduler_class(**{**SD_BETAS, "beta_schedule": betas})
    schedule = losses.NoiseSchedule.from_scheduler(DDIMScheduler.from_config(scheduler.config)).starting_at(625)
    components["scheduler"] = objectives.start_scheduler(scheduler, schedule)
    pipe = StableDiffusionPipeline(**components)
    z, text = torch.randn(2, *SHAPE), torch.randn(2, 24, 16)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    latents = pipe(prompt_embeds=text, latents=z.clone(), height=64, width=64, **call).images
    unet = components["unet"]
    with torch.no_grad():
        x0 = losses.student_x0(lambda x, t, c: unet(x, t, c).sample, z, text, schedule)
    assert torch.allclose(latents, x0, rtol=1e-4, atol=1e-4) and x0.std() > 0.5


def test_start_of_the_student(tmp_path):
    schedule = losses.NoiseSchedule.from_scheduler(DDIMScheduler(**SD_BETAS))
    assert schedule.starting_at(625).terminal_alpha == pytest.approx(0.3712, abs=1e-4)
    assert schedule.starting_at(999) is schedule
    with pytest.raises(ValueError, match="t_init is 1000, expected a timestep from 1 to 999"):
        schedule.starting_at(1000)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_run_of_each_objective_is_exported_as_it_was_trained(tmp_path, base_folder, name):
    """With the preset's own adapters; the exported denoiser and scheduler, in the stock pipeline, draw what it drew."""
    own = {"pg_sb": "--guidance_scale_min 2 --guidance_scale_max 7", "dmd2": "--fake_updates_per_step 2"}.get(name, "")
    rates = "--learning_rate 0.01 --fake_learning_rate 0.01 --lr_scheduler constant --student_adapter full"
    given = (
        f"--pretrained_teacher_model {base_folder} --shapes_captions 5 --output_dir {tmp_path} --train_batch_size 2"
    )
    args = f"{given} --objective {name} {own} {rates} --max_train_steps 2 --validation_steps 2 --no-use_ema"
    trained = WaDiTrainer(train_wadi.parse_args(args.split()))
    trained.train()
    assert len(list((tmp_path / "samples").iterdir())) == 2

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    scheduler = (DDIMScheduler if name != "sid_lsg" else EulerDiscreteScheduler).from_pretrained(
        tmp_path / "scheduler"
    )
    pipe = StableDiffusionPipeline.from_pretrained(base_folder, unet=unet, scheduler=scheduler)
    z, text = torch.randn(2, *SHAPE), trained.embeddings.at(torch.tensor([1, 2]))
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    latents = pipe(prompt_embeds=text, latents=z.clone(), **call).images
    networks = trained.networks
    with torch.no_grad():
        x0, before = (
            losses.student_x0(role, z, text, trained.schedule) for role in (networks.student, networks.teacher)
        )
    assert torch.allclose(latents, x0, rtol=1e-3, atol=1e-3) and not torch.allclose(before, x0, atol=0.1)
