"""`training/train_wadi.py --push_to_hub` against the stand-in Hub."""

import io
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import READ, WRITE
from PIL import Image

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.distillation.trainer import WaDiTrainer


@pytest.fixture
def parse(tiny_run):
    return partial(tiny_run, "--max_train_steps", 1, "--push_to_hub")


def test_the_student_is_uploaded_with_its_card(parse, hub, base_folder):
    hub.add("org/teacher", base_folder)
    flags = "--hub_model_id org/student --hub_private --hub_license apache-2.0 --base_model_name_or_path org/teacher"
    args = parse(*flags.split(), "--hub_token", WRITE, "--checkpointing_steps", 1, "--validation_steps", 1)
    WaDiTrainer(args).train()
    repository = hub.repositories["org/student"]
    weights = "pytorch_lorad_weights.safetensors"
    wanted = {"README.md", "adapter_config.json", weights, "scheduler/scheduler_config.json", "samples.png"}
    assert set(repository.files) == wanted | {".gitattributes"} and repository.private
    _, header, body = repository.files["README.md"].decode().split("---\n", 2)
    data = yaml.safe_load(header)
    assert (data["base_model"], data["license"]) == ("org/teacher", "apache-2.0")
    for part in ("rank 4", "Training steps | 1 ", "5 prompts, no images", "Learning rate | 0.0001", '"red"; "blue"'):
        assert part in body, part
    grid = Path(args.output_dir) / "samples" / "step-000001.png"
    assert repository.files["samples.png"] == grid.read_bytes()
    assert Image.open(io.BytesIO(repository.files["samples.png"])).size == (5 * 64, 64)
    assert not any(WRITE.encode() in content for content in repository.files.values())
    student = WaDiPipeline.from_pretrained("org/student", token=READ)
    local = WaDiPipeline.from_pretrained(args.output_dir, base_model=base_folder)
    for one, other in zip(student.unet.parameters(), local.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_would_fail_at_the_end_is_refused_at_the_start(parse, hub):
    with pytest.raises(ValueError, match="--push_to_hub: .* a folder of this machine.*--base_model_name_or_path"):
        WaDiTrainer(parse("--hub_token", WRITE))
    assert not hub.requests
    with pytest.raises(OSError, match="cannot upload to 'out': .*no right to write"):
        WaDiTrainer(parse("--hub_token", READ, "--base_model_name_or_path", "org/teacher"))
    assert not hub.repositories


def test_the_token_is_not_told_to_trackers(parse, hub, monkeypatch):
    told = {}
    trainer = WaDiTrainer(parse("--hub_token", WRITE, "--base_model_name_or_path", "org/teacher"))
    trainer.accelerator.log_with = ["tracker"]
    monkeypatch.setattr(trainer.accelerator, "init_trackers", lambda name, config: told.update(config))
    trainer._announce()
    assert told["hub_model_id"] == "None" and WRITE not in told.values()
