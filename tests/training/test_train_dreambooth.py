"""`training/train_dreambooth_lorad.py` end to end on a tiny random model."""

import copy
import inspect
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
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hub_server import READ, WRITE
from PIL import Image
from safetensors.torch import load_file
from wadi_script import TRAINING, assert_same, load_script

from diffusers_wadi import LoRaDConfig, LoRaDLayer, WaDiPipeline, load_lorad_adapter
from diffusers_wadi.customization import data
from diffusers_wadi.customization.model import SubjectModel
from diffusers_wadi.customization.trainer import DreamBoothTrainer
from diffusers_wadi.distillation import checkpoint
from diffusers_wadi.distillation import flags as common_flags
from diffusers_wadi.distillation.adapters import AdapterSpec
from diffusers_wadi.downstream.dreambooth import load_subject

PRIOR = "--with_prior_preservation --class_prompt blue --num_class_images 2 --class_num_inference_steps 1".split()


script = load_script("train_dreambooth_lorad")


@pytest.fixture
def instances(tmp_path):
    """A folder of four pictures of 64 x 64 pixels."""
    folder = tmp_path / "instances"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(base_folder, instances, tmp_path):
    """Parse flags for a tiny run; `name` is the output folder."""

    def arguments(name, *flags):
        given = f"--pretrained_model_name_or_path {base_folder} --instance_data_dir {instances} --instance_prompt red"
        sizes = f"--output_dir {tmp_path / name} --rank 2 --max_train_steps 2 --learning_rate 0.05"
        return script.parse_args(f"{given} {sizes}".split() + [str(flag) for flag in flags])

    return arguments


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- what comes out ---


def test_a_lorad_turns_weights_and_nothing_else(run, base_folder):
    """D2, and the files: names, base, rank."""
    args = run("out", *PRIOR, "--max_train_steps", 3)
    trained = DreamBoothTrainer(args)
    trained.train()
    base = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet").state_dict()
    layers = {name: m for name, m in trained.model.pipe.unet.named_modules() if isinstance(m, LoRaDLayer)}
    linears = AdapterSpec("lorad", 2, layers="linear").targets(
        UNet2DConditionModel.from_config(trained.model.pipe.unet.config), "student"
    )
    assert set(layers) == set(linears)
    moved = 0
    for name, layer in layers.items():
        layer.merge()
        weight, before = layer.get_base_layer().weight, base[f"{name}.weight"]
        assert torch.allclose(weight.norm(dim=1), before.norm(dim=1), rtol=1e-5)
        moved += not torch.allclose(weight, before, atol=1e-4)
        layer.unmerge()
    assert moved > len(layers) / 2
    for name, tensor in trained.model.pipe.unet.state_dict().items():
        name = name.replace("base_layer.", "")
        if name in base and not any(name == f"{layer}.weight" for layer in layers):
            assert torch.equal(tensor, base[name]), name
    config = json.loads((Path(args.output_dir) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder) and config["r"] == 2
    assert files_in(Path(args.output_dir) / "class_images") == ["class-00000.png", "class-00001.png"]


def test_a_lorad_of_rank_64_is_of_the_size_that_the_paper_says():
    """D1: 182 layers, 20.95 M parameters; and an untrained one is the base."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    args = script.argparse.Namespace(method="lorad", rank=64, layers="linear", train_text_encoder=False)
    model = SubjectModel.__new__(SubjectModel)
    model.args = args
    unet.requires_grad_(False)
    model._adapt("unet", unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 20_948_992 and len(trained) == 2 * 182


def test_an_untrained_run_changes_no_image(run, base_folder):
    args = run("out", "--max_train_steps", 0)
    DreamBoothTrainer(args).train()
    pipe = StableDiffusionPipeline.from_pretrained(base_folder)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    before = pipe("red", generator=torch.Generator().manual_seed(0), **call).images
    load_lorad_adapter(pipe.unet, args.output_dir)
    assert torch.equal(before, pipe("red", generator=torch.Generator().manual_seed(0), **call).images)


def prediction_of(model, latents):
    """The UNet's output and the text states of a trainer or pipeline, for the same latents and prompt."""
    with torch.no_grad():
        ids = model.tokenizer("red", padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = model.text_encoder(ids)[0]
        return model.unet(latents, 500, text.expand(len(latents), -1, -1)).sample, text


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text encoder"])
@pytest.mark.parametrize("method", ["lorad", "lora", "full"])
def test_what_is_written_is_what_was_trained(run, base_folder, method, text):
    args = run("out", "--method", method, *["--train_text_encoder"] * text)
    trained = DreamBoothTrainer(args)
    trained.train()
    latents = torch.randn(2, 4, 8, 8)
    wanted, states = prediction_of(trained.model.pipe, latents)
    if method == "lora":
        assert {model.peft_config["subject"].lora_alpha for model in trained.model.trained.values()} == {args.rank}
    pipe = StableDiffusionPipeline.from_pretrained(base_folder if method != "full" else args.output_dir)
    base_states = pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0]
    untrained, base_text = prediction_of(StableDiffusionPipeline.from_pretrained(base_folder), latents)
    if method != "full":
        load_subject(pipe, args.output_dir)
    found, found_states = prediction_of(pipe, latents)
    assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(found_states, states, atol=1e-5)
    assert not torch.allclose(wanted, untrained, atol=1e-3)
    assert torch.allclose(states, base_text, atol=1e-6) != text
    if method != "full" and text:
        pipe.set_adapters("subject", 0.0)
        assert torch.allclose(pipe.text_encoder(torch.tensor([[1, 2, 3]]))[0], base_states, atol=1e-5)


def test_a_whole_pipeline_keeps_its_own_scheduler(run, base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    own = DDIMScheduler.from_pretrained(base, subfolder="scheduler", timestep_spacing="leading")
    own.save_pretrained(base / "scheduler")
    flags = ("--pretrained_model_name_or_path", base, "--method", "full", "--max_train_steps", 0)
    trainer = DreamBoothTrainer(run("out", *flags))
    trainer.train()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config == own.config
    assert trainer.model.pipe.scheduler.config.timestep_spacing == "trailing"  # what it goes on sampling with


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text encoder"])
def test_the_wadi_pipeline_draws_it_in_one_step(run, adapter_folder, text):
    args = run("out", *["--train_text_encoder"] * text)
    DreamBoothTrainer(args).train()

    def draw():
        return np.asarray(pipe("red", generator=torch.Generator().manual_seed(0), output_type="np").images[0])

    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    (student,) = pipe.get_active_adapters()
    plain = draw()
    load_subject(pipe, args.output_dir, 0.7)
    assert np.abs(draw() - plain).max() > 1e-3
    pipe.set_adapters([student, "subject"], [1.0, 0.0])
    assert np.abs(draw() - plain).max() < 1e-4

    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    pipe.load_lorad_weights(args.output_dir, adapter_name="subject")
    pipe.set_adapters([student, "subject"], [1.0, 0.7])
    assert np.abs(draw() - plain).max() > 1e-3


# --- resume ---


def state_of(trainer):
    return dict(trainer.model.parameters) | {"optimizer": trainer.trainee.optimizer.state_dict()["state"]}


RUNS = {
    "lorad, prior, accumulating": [*PRIOR, "--gradient_accumulation_steps", 2, "--train_batch_size", 2],
    "lora and text encoder": "--method lora --train_text_encoder --lr_scheduler cosine --random_flip".split(),
    "full": "--method full --cache_latents".split(),
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(run, flags):
    flags = (*flags, "--max_train_steps", 4, "--checkpointing_steps", 2)
    whole = DreamBoothTrainer(run("out", *flags))
    whole.train()
    torch.manual_seed(123)  # whatever happened between the two runs must not matter
    resumed = DreamBoothTrainer(run("out", *flags, "--resume_from_checkpoint", "checkpoint-2"))
    assert resumed.step == 2
    while resumed.step < resumed.total_steps:
        resumed.update()
    assert_same(state_of(whole), state_of(resumed))


def test_checkpoints_are_of_use_limited_and_checked(run):
    flags = "--max_train_steps 3 --checkpointing_steps 1 --checkpoints_total_limit 2".split()
    args = run("out", *flags)
    DreamBoothTrainer(args).train()
    folders = checkpoint.list_checkpoints(args.output_dir)
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3"]
    unet = UNet2DConditionModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet")
    load_lorad_adapter(unet, folders[0], "subject")
    with pytest.raises(ValueError, match=r"--rank 2 \(now 3\)"):
        DreamBoothTrainer(run("out", *flags, "--rank", 3, "--resume_from_checkpoint", "latest"))
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        DreamBoothTrainer(run("out", "--resume_from_checkpoint", "checkpoint-7"))
    resumed = DreamBoothTrainer(run("out", *flags, "--learning_rate", 0.5, "--resume_from_checkpoint", "latest"))
    assert resumed.step == 3 and resumed.trainee.optimizer.param_groups[0]["lr"] == 0.5


def test_ctrl_c_saves_and_the_run_can_go_on(run, monkeypatch, caplog):
    args, update = run("out", "--max_train_steps", 5), DreamBoothTrainer.update

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    monkeypatch.setattr(DreamBoothTrainer, "update", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(args)
    assert stopped.value.code == 130 and not (Path(args.output_dir) / "adapter_config.json").exists()
    assert f"stopped by SIGINT after step 2 of 5; {args.output_dir}/checkpoint-2 is saved" in caplog.text
    assert "Go on with the same command and --resume_from_checkpoint latest" in caplog.text
    monkeypatch.setattr(DreamBoothTrainer, "update", update)
    resumed = DreamBoothTrainer(run("out", "--max_train_steps", 5, "--resume_from_checkpoint", "latest"))
    assert resumed.step == 2
    resumed.train()
    assert (Path(args.output_dir) / "adapter_config.json").exists()


def test_a_full_disk_leaves_no_half_checkpoint(run, monkeypatch):
    trainer = DreamBoothTrainer(run("out"))
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="Make room"):
        trainer.save_checkpoint()
    assert not [path for path in Path(trainer.output_dir).iterdir() if "checkpoint" in path.name]


# --- the batch ---


def test_a_batch_holds_the_subject_and_then_its_class(run, base_folder, monkeypatch):
    trainer = DreamBoothTrainer(run("out", *PRIOR, "--train_batch_size", 2))
    fed = {}
    monkeypatch.setattr(
        trainer.module, "forward", lambda x, t, text: fed.update(x=x, text=text) or torch.zeros_like(x)
    )
    trainer.data.draws.next_round()
    loss, logs = trainer.loss()
    assert set(logs) == {"loss", "instance_loss", "prior_loss"} and fed["x"].shape == (4, 4, 8, 8)
    red, blue = trainer.data.text
    assert torch.equal(fed["text"], torch.stack([red, red, blue, blue])) and not torch.equal(red, blue)


@pytest.mark.parametrize("flags", [[], ["--cache_latents"]], ids=["encoded", "kept"])
def test_latents_are_scaled_samples_of_the_posterior_with_a_noise_of_their_own(run, flags):
    trainer = DreamBoothTrainer(run("out", *PRIOR, "--train_batch_size", 2, *flags))
    fed, scale = trainer.data, trainer.model.pipe.vae.config.scaling_factor
    orders = copy.deepcopy(fed.orders)
    fed.draws.next_round()
    latents, noise, t = fed.next_latents(), fed.noise("noise"), fed.timesteps()
    pixels = [images.at(order.next_batch(), torch.zeros(2, 3)) for images, order in zip(fed.images, orders)]
    with torch.no_grad():
        posterior = trainer.model.pipe.vae.encode(torch.cat(pixels)).latent_dist
    sampled = (latents / scale - posterior.mean) / posterior.std
    torch.testing.assert_close(sampled, fed.noise("latents"), rtol=0, atol=1e-4)
    for one in (sampled, noise):  # nobody shares, neither samples nor subject and class nor the two kinds of noise
        assert one.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.3
    assert abs(torch.stack([sampled.flatten(), noise.flatten()]).corrcoef()[0, 1]) < 0.2
    assert len(set(t.tolist())) == 4


def test_accumulated_batches_are_one_batch_and_the_schedule_goes_on(run):
    trained = []
    for batch, count in ((2, 1), (1, 2)):
        flags = ("--train_batch_size", batch, "--gradient_accumulation_steps", count, "--lr_scheduler", "linear")
        trainer = DreamBoothTrainer(run(f"{batch}", *PRIOR, *flags))
        logs = trainer.update()
        assert trainer.trainee.lr_scheduler.get_last_lr() == [pytest.approx(0.025)]  # after one update of two
        trained.append({name: logs[name] for name in ("loss", "grad")} | dict(trainer.model.parameters))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_class_images_are_drawn_as_the_flags_say(run, monkeypatch):
    seen = {}

    def draw(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs).arguments
        seen.update(bound)
        real(**bound)

    real = data.draw_class_images
    monkeypatch.setattr(data, "draw_class_images", draw)
    flags = "--class_batch_size 3 --class_guidance_scale 1.5 --class_num_inference_steps 2 --seed 7 --resolution 56"
    args = run("out", *PRIOR, *flags.split())
    DreamBoothTrainer(args)
    wanted = {"prompt": "blue", "folder": Path(args.output_dir) / "class_images", "indices": [0, 1], "resolution": 56}
    wanted |= {"batch_size": 3, "num_inference_steps": 2, "guidance_scale": 1.5, "seed": 7}
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_network_learns_what_it_predicts(run, base_folder, tmp_path, monkeypatch, kind):
    base = shutil.copytree(base_folder, tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))
    trainer = DreamBoothTrainer(run("out", "--pretrained_model_name_or_path", base))
    latents, noise, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([600])
    for name, value in (("next_latents", latents), ("timesteps", t)):
        monkeypatch.setattr(trainer.data, name, lambda value=value: value)
    monkeypatch.setattr(trainer.data, "noise", lambda name: noise)
    fed = []
    monkeypatch.setattr(trainer.module, "forward", lambda x, t, text: fed.append(x) or torch.zeros_like(x))
    alpha_bar = trainer.model.pipe.scheduler.alphas_cumprod[600]
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    target = noise if kind == "epsilon" else v
    assert trainer.loss()[0].item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(fed[0], alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise)


def test_timesteps_stay_within_their_bounds(run):
    trainer = DreamBoothTrainer(run("out", *PRIOR, "--min_timestep", 900, "--max_timestep", 902))
    seen = set()
    for _ in range(20):
        trainer.data.draws.next_round()
        seen |= set(trainer.data.timesteps().tolist())
    assert seen == {900, 901, 902}
    with pytest.raises(ValueError, match="--min_timestep 5 and --max_timestep 4 .* 999"):
        DreamBoothTrainer(run("out", "--min_timestep", 5, "--max_timestep", 4))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(run, tmp_path):
    flags = [*PRIOR, "--random_flip", "--num_class_images", 3, "--checkpointing_steps", 1000]
    whole = run("one", *flags, "--train_batch_size", 2)
    DreamBoothTrainer(whole).train()
    half = run("two", *flags, "--train_batch_size", 1)
    given = {k: v for k, v in vars(half).items() if v not in (None, False) and k != "with_prior_preservation"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [TRAINING / "train_dreambooth_lorad.py"]
    command += [str(part) for k, v in given.items() for part in ([f"--{k}"] if v is True else [f"--{k}", v])]
    subprocess.run(
        [*map(str, command), "--with_prior_preservation"], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
    )
    assert files_in(tmp_path / "two" / "class_images") == files_in(tmp_path / "one" / "class_images")
    one, two = (load_file(Path(a.output_dir) / "pytorch_lorad_weights.safetensors") for a in (whole, half))
    assert one.keys() == two.keys() and any(tensor.abs().max() > 0.05 for tensor in one.values())
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-3), name


def test_kept_latents_are_those_of_the_encoder(run):
    kept, fresh = (DreamBoothTrainer(run(n, *f)) for n, f in (("a", ["--cache_latents"]), ("b", [])))
    for trainer in (kept, fresh):
        trainer.data.draws.next_round()
    assert torch.allclose(kept.data.next_latents(), fresh.data.next_latents(), atol=1e-5)


def test_gradient_checkpointing_changes_nothing(run):
    flags = ("--train_text_encoder", "--max_train_steps", 1)
    losses = []
    for name, more in (("a", []), ("b", ["--gradient_checkpointing"])):
        trainer = DreamBoothTrainer(run(name, *flags, *more))
        losses.append(trainer.update())
    assert torch.allclose(losses[0]["grad"], losses[1]["grad"], rtol=1e-4)


def test_validation_and_trackers(run):
    flags = "--validation_prompt red --num_validation_images 2 --validation_steps 1 --validation_num_inference_steps 1"
    args = run("out", *flags.split(), "--report_to", "tensorboard", "--logging_steps", 1)
    trainer = DreamBoothTrainer(args)
    trainer.train()
    assert files_in(Path(args.output_dir) / "samples") == ["step-000001.png", "step-000002.png"]
    assert Image.open(Path(args.output_dir) / "samples" / "step-000001.png").size == (128, 64)
    assert list(Path(args.output_dir, "logs").rglob("events*"))


def test_validation_follows_its_own_flags_and_leaves_the_mode_as_it_was(run, monkeypatch):
    flags = "--validation_prompt blue --num_validation_images 2 --validation_num_inference_steps 1 --validation_seed 3"
    guidance = "--validation_guidance_scale 2.5 --class_guidance_scale 3.5 --gradient_checkpointing"
    trainer = DreamBoothTrainer(run("out", *flags.split(), *guidance.split()))
    unet, call, seen = trainer.model.pipe.unet, StableDiffusionPipeline.__call__, []

    def spy(pipe, prompt, **options):
        seen.append((prompt, options["guidance_scale"], options["generator"].initial_seed(), unet.training))
        return call(pipe, prompt, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", spy)
    assert unet.training  # without which there is no checkpointing
    trainer.validate()
    assert seen == [("blue", 2.5, 3, False), ("blue", 2.5, 4, False)] and unet.training


def test_broken_updates_are_left_out_and_end_the_run(run, monkeypatch):
    args = run("out", "--max_bad_steps", 2, "--logging_steps", 1)
    trainer = DreamBoothTrainer(args)
    before = {name: p.detach().clone() for name, p in trainer.model.parameters.items()}
    monkeypatch.setattr(trainer.data, "noise", lambda name: torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(FloatingPointError, match="2 updates in a row"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.parameters.items())


# --- what is refused ---


def wrong_folder(tmp_path, kind):
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "text":
        (folder / "readme.md").write_text("no image")
    return folder


BAD_FLAGS = {
    "rank": (["--rank", 0], "--rank is 0, expected at least 1"),
    "rate": (["--learning_rate", -1], "--learning_rate is -1"),
    "both lengths": (["--num_train_epochs", 1], "--max_train_steps and --num_train_epochs"),
    "no class prompt": (["--with_prior_preservation"], "needs --class_prompt"),
    "empty prompt": (["--instance_prompt", " "], "--instance_prompt is empty"),
    "tracker": (["--report_to", "nobody"], "--report_to names 'nobody'"),
    "hub": (["--method", "lora", "--push_to_hub"], "--push_to_hub is for --method lorad"),
    "8 bit": (["--use_8bit_adam"], "bitsandbytes"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused_at_once(run, monkeypatch, flags, message):
    monkeypatch.setattr(
        common_flags.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else True
    )
    with pytest.raises(ValueError, match=message):
        run("out", *flags)


def test_bad_data_is_refused_before_training(run, tmp_path, instances):
    with pytest.raises(FileNotFoundError, match="--instance_data_dir.*does not exist"):
        run("out", "--instance_data_dir", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is empty"):
        run("out", "--instance_data_dir", wrong_folder(tmp_path, "empty"))
    with pytest.raises(ValueError, match="readme.md cannot be read as an image"):
        DreamBoothTrainer(run("out", "--instance_data_dir", wrong_folder(tmp_path, "text")))
    with pytest.raises(ValueError, match="the same folder"):
        run("out", *PRIOR, "--class_data_dir", instances)
    with pytest.raises(ValueError, match="--resolution is 60.*56 or 64"):
        DreamBoothTrainer(run("out", "--resolution", 60))
    with pytest.raises(ValueError, match="--cache_latents is for images that always look the same"):
        DreamBoothTrainer(run("out", "--cache_latents", "--random_flip"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to the folder"):
        DreamBoothTrainer(run("out", *PRIOR, "--class_data_dir", tmp_path / "file" / "inside"))
    with pytest.raises(ValueError, match="--output_dir"):
        run("file/inside")


def test_pixart_is_refused(run, tmp_path):
    from tiny_pixart import pixart_pipeline

    pixart_pipeline().save_pretrained(tmp_path / "pixart")
    with pytest.raises(ValueError, match="PixArtAlphaPipeline, expected Stable Diffusion 1.x or 2.x"):
        DreamBoothTrainer(run("out", "--pretrained_model_name_or_path", tmp_path / "pixart"))


# --- defaults, the Hub ---


def test_defaults_are_those_of_the_paper(base_folder, instances, tmp_path):
    given = f"--pretrained_model_name_or_path {base_folder} --instance_data_dir {instances} --instance_prompt red"
    trainers = {}
    for method in ("lorad", "full"):
        args = script.parse_args(f"{given} --output_dir {tmp_path / method} --method {method}".split())
        trainers[method] = trainer = DreamBoothTrainer(args)
        group = trainer.trainee.optimizer.param_groups[0]
        wanted = (1e-4, 1500) if method == "lorad" else (5e-6, 800)
        assert (group["lr"], trainer.total_steps) == wanted
        assert group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999)
    assert (args.num_class_images, args.prior_loss_weight) == (200, 1.0)
    config = trainers["lorad"].model.pipe.unet.peft_config["subject"]
    assert isinstance(config, LoRaDConfig) and config.r == 64
    assert set(trainers["full"].model.parameters) == {
        f"unet.{name}" for name, _ in trainers["full"].model.pipe.unet.named_parameters()
    }


def test_epochs_and_scaled_rate(run):
    """An epoch is the four instance images, however many there are of the class."""
    args = run("out", *PRIOR)
    args.max_train_steps, args.num_train_epochs, args.train_batch_size, args.scale_lr = None, 3, 3, True
    trainer = DreamBoothTrainer(args)
    assert trainer.total_steps == 6 and trainer.trainee.rate == pytest.approx(0.15)


def test_other_layers_can_be_trained(run):
    names = DreamBoothTrainer(run("out", "--layers", "qv", "--max_train_steps", 0)).model.parameters
    assert {name.split(".lorad_")[0].rpartition(".")[2] for name in names} == {"to_q", "to_v"}


def test_the_subject_is_uploaded_with_its_card(run, hub, base_folder):
    hub.add("org/base", base_folder)
    flags = "--push_to_hub --hub_model_id org/subject --base_model_name_or_path org/base --train_text_encoder"
    with pytest.raises(ValueError, match="--base_model_name_or_path"):
        DreamBoothTrainer(run("out", *flags.split()[:3], "--hub_token", WRITE))
    with pytest.raises(OSError, match="no right to write"):
        DreamBoothTrainer(run("out", *flags.split(), "--hub_token", READ))
    shown = "--validation_prompt red --num_validation_images 1 --validation_steps 1 --validation_num_inference_steps 1"
    args = run("out", *flags.split(), *shown.split(), "--hub_token", WRITE)
    DreamBoothTrainer(args).train()
    files = hub.repositories["org/subject"].files
    pair = {"pytorch_lorad_weights.safetensors", "adapter_config.json"}
    further = {"README.md", ".gitattributes", "samples.png"}
    assert set(files) == pair | {f"text_encoder/{name}" for name in pair} | further
    first, last = sorted((Path(args.output_dir) / "samples").iterdir())
    assert files["samples.png"] == last.read_bytes() != first.read_bytes()
    _, header, body = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == "org/base"
    for part in ("rank 2", "4 instance images", "Learning rate | 0.05", 'load_subject(pipe, "org/subject")', '"red"'):
        assert part in body, part
    assert body.count("## Use it") == 1 and WRITE not in body
    pipe = StableDiffusionPipeline.from_pretrained(base_folder)
    load_subject(pipe, "org/subject", token=READ)
    assert "subject" in pipe.text_encoder.peft_config
