"""`training/train_reversion.py`: resuming equals not stopping, only one row is learned, stock code reads it, bad input stops first."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_wadi import WaDiPipeline

SCRIPT = Path(__file__).parents[2] / "training" / "train_reversion.py"
SMALL = """--initializer_token red --positive_words a b c d e --train_batch_size 2 --gradient_accumulation_steps 2
--max_train_steps 4 --checkpointing_steps 2 --learning_rate 0.01 --logging_steps 2""".split()


def module_of(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return module_of(SCRIPT)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three exemplars of 64 pixels."""
    folder = tmp_path_factory.mktemp("exemplars")
    random = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    captions = {f"{k}.png": ["red {} blue", "z {} blue on red"] for k in range(3)}
    (folder / "text.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture(scope="module")
def flags(base_folder, images):
    return lambda folder, *more: [
        *("--pretrained_model_name_or_path", str(base_folder), "--train_data_dir", str(images)),
        *("--output_dir", str(folder), *SMALL, *more),
    ]


def run(script, flags, folder, *more):
    script.main(script.parse_args(flags(folder, *more)))
    return load_file(folder / "learned_embeds.safetensors")["<R>"]


@pytest.fixture(scope="module")
def learned(script, flags, tmp_path_factory):
    """(folder, row) of an uninterrupted run of four updates."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(script, flags, folder)


def state(folder):
    return torch.load(folder / "training_state.pt", weights_only=True)["parts"]


def test_the_file_is_one_row_and_leaves_nothing_beside(learned):
    folder, row = learned
    assert row.shape == (16,) and row.dtype == torch.float32
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "learned_embeds.safetensors",
    ]
    assert torch.equal(load_file(folder / "checkpoint-4" / "learned_embeds.safetensors")["<R>"], row)


def test_resumed_equals_uninterrupted_to_the_bit(script, flags, learned, tmp_path):
    shutil.copytree(learned[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    assert not torch.equal(load_file(tmp_path / "checkpoint-2" / "learned_embeds.safetensors")["<R>"], learned[1])
    assert torch.equal(run(script, flags, tmp_path, "--resume_from_checkpoint", "latest"), learned[1])
    whole, resumed = (state(folder / "checkpoint-4") for folder in (learned[0], tmp_path))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(whole["optimizer"]["state"][0][name], resumed["optimizer"]["state"][0][name])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_saves_and_goes_on_to_the_same_row(
    script, flags, learned, tmp_path, monkeypatch, caplog, number, code
):
    update = script.ReversionTrainer.update

    def interrupted(trainer):
        if trainer.step == 0:
            os.kill(os.getpid(), number)
        return update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(script.ReversionTrainer, "update", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(script, flags, tmp_path)
    assert stopped.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (
        f"stopped by {number.name} after step 1 of" in caplog.text and "--resume_from_checkpoint latest" in caplog.text
    )
    assert torch.equal(run(script, flags, tmp_path, "--resume_from_checkpoint", "latest"), learned[1])


def test_resuming_with_other_flags_or_images_is_refused(script, flags, learned, images, tmp_path):
    shutil.copytree(learned[0] / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"steer_loss_weight 0.01 \(now 0.5\)"):
        run(script, flags, tmp_path / "out", "--resume_from_checkpoint", "latest", "--steer_loss_weight", "0.5")
    shutil.copytree(images, tmp_path / "others")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "others" / "0.png")
    with pytest.raises(ValueError, match="exemplars"):
        run(
            script,
            flags,
            tmp_path / "out",
            *f"--resume_from_checkpoint latest --train_data_dir {tmp_path}/others".split(),
        )
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        run(script, flags, tmp_path / "out", "--resume_from_checkpoint", "checkpoint-7")


def test_accumulated_micro_batches_are_one_batch(script, flags, learned, tmp_path):
    whole = run(script, flags, tmp_path, "--train_batch_size", "4", "--gradient_accumulation_steps", "1")
    # Negatives and positives are pooled within a micro-batch, so only without steering are the two the same numbers.
    assert not torch.equal(whole, learned[1])
    plain = [
        run(script, flags, tmp_path / f"{n}", *f"--steer_loss_weight 0 --train_batch_size {n}".split(),
            "--gradient_accumulation_steps", str(4 // n))
        for n in (1, 4)
    ]  # fmt: skip
    torch.testing.assert_close(*plain, rtol=1e-3, atol=1e-4)


def test_accumulation_divides_the_gradient_and_the_schedule_goes_on(script, flags, tmp_path):
    norms = []
    for batch, count in ((4, 1), (1, 4)):
        more = f"--train_batch_size {batch} --gradient_accumulation_steps {count} --steer_loss_weight 0"
        trainer = script.ReversionTrainer(
            script.parse_args(flags(tmp_path, *more.split(), "--lr_scheduler", "linear"))
        )
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 4)  # scaled by what an update sees
        norms.append(trainer.update()["grad"])
        assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(0.03)]  # after one update of four
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


def test_batches_hold_noisy_latents_of_all_exemplars_and_captions(script, flags, images, tmp_path, monkeypatch):
    trainer = script.ReversionTrainer(script.parse_args(flags(tmp_path)))
    indices, captions, fed, made, drawn_noise = [], [], [], [], []
    caption_ids, target = trainer._caption_ids, script.reversion.training_target

    def spied_ids(index, uniform):
        indices.append(index)
        captions.append(caption_ids(index, uniform))
        return captions[-1]

    monkeypatch.setattr(trainer, "_caption_ids", spied_ids)
    monkeypatch.setattr(script.reversion, "training_target", lambda *args: made.append(args[1:]) or target(*args))
    trainer.unet.register_forward_pre_hook(lambda module, args: fed.append(args))
    for _ in range(24):
        trainer.draws.next_round()
        trainer.losses()
        drawn_noise.append(trainer.draws.normal("latents", (4, 8, 8)))
    index = torch.cat(indices)
    drawn = {(i, tuple(ids)) for i, ids in zip(index.tolist(), torch.cat(captions).tolist())}
    assert len(drawn) == 3 * 2  # every caption of every exemplar
    noisy, (latents, noise, t) = torch.cat([args[0] for args in fed]), map(torch.cat, zip(*made))
    alpha_bar = trainer.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise)
    with torch.no_grad():
        posterior = trainer.vae.encode(script.reversion.RelationImages(images, 64).pixels).latent_dist
    sampled = (latents / trainer.vae.config.scaling_factor - posterior.mean[index]) / posterior.std[index]
    torch.testing.assert_close(sampled, torch.cat(drawn_noise), rtol=0, atol=1e-4)
    assert abs(torch.stack([sampled.flatten(), noise.flatten()]).corrcoef()[0, 1]) < 0.05


def test_steering_is_weighted_and_gets_the_words_of_the_batch(script, flags, tmp_path, monkeypatch):
    words = "--positive_words a b c d e f z --temperature 0.3 --denoise_loss_weight 2 --steer_loss_weight 0.5"
    trainer = script.ReversionTrainer(script.parse_args(flags(tmp_path, *words.split())))
    seen, steering = [], script.reversion.steering_loss
    monkeypatch.setattr(script.reversion, "steering_loss", lambda *args: seen.append(args) or steering(*args))
    table = trainer.embedding.table.weight
    things = [script.reversion.word_id(trainer.tokenizer, word) for word in ("red", "blue")]

    def ids_of(rows):
        return torch.cdist(rows, table).argmin(1).tolist()

    chosen = []
    for _ in range(4):
        trainer.draws.next_round()
        loss, parts = trainer.losses()
        assert parts["steer_loss"] > 0
        assert loss.item() == pytest.approx(2 * parts["denoise_loss"].item() + 0.5 * parts["steer_loss"].item())
        row, positives, negatives, temperature = seen[-1]
        assert row is trainer.row and temperature == 0.3
        found = ids_of(positives)
        chosen += [found[:4], found[4:]]
        # Every caption names both things; "on" is a stop word, and so is "z" where it is a positive one.
        assert sorted(ids_of(negatives)) == sorted(2 * things)
    assert all(len(set(four)) == 4 and set(four) <= set(trainer.positives.tolist()) for four in chosen)
    assert all(set(one) != set(other) for one, other in zip(chosen[::2], chosen[1::2]))


def test_flags_of_sampling_and_cropping_are_heeded(script, flags, images, tmp_path):
    shutil.copytree(images, tmp_path / "wide")
    Image.open(images / "0.png").resize((128, 64)).save(tmp_path / "wide" / "0.png")
    more = ["--no-importance_sampling", "--center_crop", "--train_data_dir", str(tmp_path / "wide")]
    trainer = script.ReversionTrainer(script.parse_args(flags(tmp_path / "out", *more)))
    assert trainer.probabilities.unique().numel() == 1
    cropped, squeezed = (script.reversion.RelationImages(tmp_path / "wide", 64, crop).pixels for crop in (True, False))
    assert torch.equal(trainer.images.pixels, cropped) and not torch.equal(cropped, squeezed)


def test_networks_get_no_gradients_and_do_not_change(script, flags, base_folder, tmp_path):
    trainer = script.ReversionTrainer(script.parse_args(flags(tmp_path)))
    former = {name: p.clone() for part in (trainer.unet, trainer.vae) for name, p in part.state_dict().items()}
    table = trainer.embedding.table.weight.clone()
    trainer.train()
    for part in (trainer.unet, trainer.vae):
        assert all(p.grad is None for p in part.parameters())
        assert all(torch.equal(former[name], p) for name, p in part.state_dict().items())
    assert torch.equal(trainer.embedding.table.weight, table)
    saved = WaDiPipeline.from_pretrained(base_folder).text_encoder.get_input_embeddings().weight
    assert torch.equal(table, saved)


def one_step(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np").images[0]


def test_stock_loading_and_a_one_step_image(learned, adapter_folder, tmp_path):
    """safetensors and bin; the image differs from that of a common word; the saved pipeline draws the same."""
    folder, row = learned
    torch.save({"<R>": row}, tmp_path / "learned_embeds.bin")
    pictures = []
    for source in (folder, tmp_path / "learned_embeds.bin"):
        pipe = WaDiPipeline.from_pretrained(adapter_folder)
        pipe.load_textual_inversion(source)
        assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[-1], row)
        pictures.append(one_step(pipe, "red <R> blue"))
    assert np.array_equal(*pictures)
    assert np.array_equal(one_step(pipe, "red <r> blue"), pictures[0])
    assert np.abs(one_step(pipe, "red a blue") - pictures[0]).max() > 1e-3
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    pipe.save_pretrained(tmp_path / "saved")
    again = WaDiPipeline.from_pretrained(tmp_path / "saved")
    assert np.abs(one_step(again, "red <R> blue") - pictures[0]).max() < 1e-3
    with pytest.raises(ValueError, match="<R>"):
        again.load_textual_inversion(folder)
    save_file({"<S>": torch.zeros(3)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="shape|size|dimension"):
        again.load_textual_inversion(tmp_path / "narrow.safetensors")


def test_the_example_draws_a_row_for_each_prompt(learned, adapter_folder, tmp_path):
    example = module_of(SCRIPT.parents[1] / "examples" / "reversion.py")
    flags = ["--model", str(adapter_folder), "--embedding", str(learned[0]), "--num_images", "3", "--device", "cpu"]
    prompts = ["--prompt", "red <R> blue", "blue <R> red"]
    file = example.main([*flags, *prompts, "--output", str(tmp_path / "out" / "grid.png")])
    assert Image.open(file).size == (3 * 64, 2 * 64)


def test_validation_draws_its_prompts_and_changes_nothing(script, flags, learned, tmp_path):
    pytest.importorskip("tensorboard")
    shown = ["--validation_prompts", "red <R> blue", "a <R> b", "--num_validation_images", "2"]
    few = "--validation_steps 2 --validation_num_inference_steps 2 --report_to tensorboard".split()
    assert torch.equal(run(script, flags, tmp_path, *shown, *few), learned[1])
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"]
    grid = np.asarray(Image.open(tmp_path / "samples" / grids[0]))
    assert grid.shape == (64, 4 * 64, 3) and not np.array_equal(grid[:, :64], grid[:, 64:128])
    assert list((tmp_path / "logs").rglob("events*"))


def test_a_velocity_model_trains_on_velocity(script, flags, base_folder, learned, tmp_path):
    shutil.copytree(base_folder, tmp_path / "v")
    DDIMScheduler.from_pretrained(base_folder, subfolder="scheduler", prediction_type="v_prediction").save_pretrained(
        tmp_path / "v" / "scheduler"
    )
    row = run(script, flags, tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "v"))
    assert (row - learned[1]).abs().max() > 1e-3


def test_low_precision_trains_and_draws(script, flags, learned, tmp_path):
    shown = [
        "--validation_prompts",
        "red <R> blue",
        *"--validation_steps 4 --validation_num_inference_steps 2".split(),
    ]
    row = run(script, flags, tmp_path, "--mixed_precision", "bf16", "--max_grad_norm", "1", *shown)
    assert row.isfinite().all() and not torch.equal(row, learned[1])
    assert (tmp_path / "samples" / "step-000004.png").is_file()


def test_gradient_checkpointing_changes_nothing(script, flags, learned, tmp_path):
    row = run(script, flags, tmp_path, "--gradient_checkpointing")
    torch.testing.assert_close(row, learned[1], rtol=1e-4, atol=1e-5)


def test_the_norm_is_held_and_never_raised(script, flags, learned, tmp_path):
    row = run(script, flags, tmp_path, "--max_embedding_norm", "0.05")
    assert row.norm().item() == pytest.approx(0.05, rel=1e-5)
    assert torch.equal(run(script, flags, tmp_path, "--max_embedding_norm", "100"), learned[1])


def test_updates_that_are_not_finite_are_left_out_and_then_end_the_run(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(script.reversion, "training_target", lambda scheduler, latents, noise, t: noise * float("nan"))
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        run(script, flags, tmp_path, "--max_bad_steps", "2")
    assert not (tmp_path / "learned_embeds.safetensors").exists()


@pytest.mark.parametrize(
    "more, error, message",
    [
        (["--train_data_dir", "nowhere"], FileNotFoundError, "nowhere is no folder"),
        (["--initializer_token", "and"], ValueError, "'and' is 3 tokens"),
        (["--placeholder_token", "red"], ValueError, "'red' is in the tokenizer's vocabulary"),
        (["--positive_words", "a", "above"], ValueError, "1 of 2 positive words"),
        (["--validation_prompts", "red a blue"], ValueError, "does not hold <R>"),
        (["--max_train_steps", "0"], ValueError, "--max_train_steps is 0"),
        (["--importance_alpha", "2"], ValueError, "--importance_alpha is 2.0"),
        (["--resolution", "60"], ValueError, "--resolution is 60, expected a multiple of 8"),
        (["--report_to", "nothing"], ValueError, "--report_to names 'nothing'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_update(script, flags, tmp_path, monkeypatch, more, error, message):
    monkeypatch.setattr(script.ReversionTrainer, "update", lambda trainer: pytest.fail("training started"))
    with pytest.raises(error, match=message):
        run(script, flags, tmp_path, *more)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_pixart_is_refused(script, flags, tmp_path):
    (tmp_path / "pixart").mkdir()
    index = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "pixart" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="PixArtAlphaPipeline, which has no textual inversion"):
        run(script, flags, tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "pixart"))


def test_the_defaults_are_the_recipe(script, images, tmp_path):
    args = script.parse_args(
        ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(images), "--output_dir", str(tmp_path)]
    )
    batch = args.train_batch_size * args.gradient_accumulation_steps
    assert (args.max_train_steps, batch, args.seed) == (3000, 8, 2023)
    assert args.scale_lr and args.learning_rate * batch == pytest.approx(2e-3)
    assert args.importance_sampling and (args.importance_alpha, args.temperature) == (0.5, 0.07)
    assert (args.steer_loss_weight, args.denoise_loss_weight, args.num_positives) == (0.01, 1.0, 4)
    assert (args.placeholder_token, args.initializer_token, args.adam_weight_decay) == ("<R>", "and", 1e-2)
    assert (args.lr_warmup_steps, args.max_grad_norm, args.mixed_precision) == (0, None, "no")


# --- slow ---


@pytest.mark.slow
def test_two_processes_learn_what_one_does(flags, tmp_path):
    """Without steering, whose positives and negatives are pooled in a process."""
    plain = ["--steer_loss_weight", "0"]

    def start(folder, environment, *more):
        command = [sys.executable, str(SCRIPT), *flags(folder, *plain, *more)]
        return subprocess.Popen(command, env=os.environ | environment)

    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "ACCELERATE_USE_CPU": "true"}
    pair = [
        start(tmp_path / "two", common | {"RANK": rank, "LOCAL_RANK": rank}, "--train_batch_size", "1")
        for rank in "01"
    ]
    assert [process.wait(200) for process in pair] == [0, 0]
    assert start(tmp_path / "one", {}).wait(200) == 0
    rows = [load_file(tmp_path / name / "learned_embeds.safetensors")["<R>"] for name in ("two", "one")]
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)


def draw_side(side, n, generator):
    """(n, 4, 8, 8) latents whose left or right half is bright."""
    latents = 0.1 * torch.randn(n, 4, 8, 8, generator=generator)
    latents[:, :, :, slice(0, 4) if side == "left" else slice(4, 8)] += 1.5
    return latents


@pytest.mark.slow
def test_a_learned_relation_can_be_swapped_for_another(components):
    """R6: a tiny model of two relations; a row learned from the images of each draws the images of each."""
    from diffusers_wadi.downstream import reversion

    tokenizer, encoder, unet = (components[name] for name in ("tokenizer", "text_encoder", "unet"))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    generator = torch.Generator().manual_seed(0)

    def encode(words):
        captions = [f"red {word} blue" for word in words]
        return encoder(tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)[0]

    def loss_of(sides, words, probabilities):
        latents = torch.cat([draw_side(side, 1, generator) for side in sides])
        t = reversion.timesteps_at(torch.rand(len(sides), generator=generator), probabilities)
        noise = torch.randn(latents.shape, generator=generator)
        return torch.nn.functional.mse_loss(
            unet(scheduler.add_noise(latents, noise, t), t, encode(words)).sample, noise
        )

    def train(parameters, batches, rate, steps, probabilities):
        optimizer, found = torch.optim.AdamW(parameters, lr=rate), []
        for _ in range(steps):
            loss = loss_of(*batches(), probabilities)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return np.mean(found[:20]), np.mean(found[-20:])

    def both():
        sides = [("left", "right")[k] for k in torch.randint(0, 2, (16,), generator=generator).tolist()]
        return sides, [{"left": "x", "right": "y"}[side] for side in sides]

    @torch.no_grad()
    def heldout_loss(side):
        """Of "<R>" where the image is decided, always on the same noise."""
        fixed, t = torch.Generator().manual_seed(9), torch.linspace(500, 999, 64).long()
        latents, noise = draw_side(side, 64, fixed), torch.randn(64, 4, 8, 8, generator=fixed)
        predicted = unet(scheduler.add_noise(latents, noise, t), t, encode(["<R>"] * 64)).sample
        return torch.nn.functional.mse_loss(predicted, noise).item()

    uniform = reversion.importance_probabilities(1000, 0.0)
    start, end = train([*unet.parameters(), *encoder.parameters()], both, 3e-3, 700, uniform)
    assert end < 0.5 * start
    unet.requires_grad_(False)
    embedding = reversion.add_placeholder(tokenizer, encoder, "<R>", "z")
    rows, initial = {}, embedding.row.data.clone()
    for side in ("left", "right"):
        embedding.row.data.copy_(initial)
        probabilities, before = reversion.importance_probabilities(), heldout_loss(side)
        train([embedding.row], lambda side=side: ([side] * 16, ["<R>"] * 16), 2e-2, 150, probabilities)
        assert heldout_loss(side) < 0.97 * before
        rows[side] = embedding.row.data.clone()

    def lean(row):
        """Brightness of the right half above that of the left, of 8 samples."""
        embedding.row.data.copy_(row)
        sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        sampler.set_timesteps(20)
        x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for t in sampler.timesteps:
                x = sampler.step(unet(x, t, encode(["<R>"] * 8)).sample, t, x).prev_sample
        return (x[..., 4:].mean() - x[..., :4].mean()).item()

    leans = {side: lean(row) for side, row in rows.items()}
    assert leans["left"] < -0.7 and leans["right"] > 0.7, leans
