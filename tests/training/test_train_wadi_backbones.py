"""`training/train_wadi.py` on PixArt and on a v-prediction teacher, and what it does with prompts."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline
from tiny_pixart import pixart_pipeline
from wadi_script import PROMPTS, train_wadi

from diffusers_wadi import load_lorad_adapter
from diffusers_wadi.distillation import losses, setup
from diffusers_wadi.distillation.trainer import WaDiTrainer


@pytest.fixture
def arguments(tiny_run):
    """Checked flags of a tiny run on `teacher`."""
    few = "--validation_steps 0 --max_train_steps 2 --learning_rate 0.1".split()
    return lambda teacher, *flags, name="out": tiny_run(*few, *flags, teacher=teacher, name=name)


def one_step(trained: WaDiTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and what the trained student makes of it for the first three prompts."""
    z = torch.randn(3, *trained.latent_shape, generator=torch.Generator().manual_seed(0))
    text = trained.embeddings.at(torch.arange(3))
    with torch.no_grad():
        return z, losses.student_x0(trained.networks.student, z, text, trained.schedule)


def stock_latents(pipeline, output: Path, module: str, z: torch.Tensor, **call) -> torch.Tensor:
    """The same by the stock pipeline with what the run exported."""
    pipeline.scheduler = DDIMScheduler.from_pretrained(output / "scheduler")
    call |= dict(latents=z, num_inference_steps=1, guidance_scale=0, output_type="latent")
    before = pipeline(PROMPTS[:3], **call)
    load_lorad_adapter(getattr(pipeline, module), output, "default", component=module)
    after = pipeline(PROMPTS[:3], **call)
    assert not torch.allclose(before.images, after.images, atol=0.1)
    return after.images


@pytest.mark.parametrize("flags", [(), ("--max_sequence_length", 24, "--precompute_text_embeddings")])
def test_a_pixart_student_runs_in_the_stock_pipeline(arguments, tmp_path, flags):
    pixart_pipeline().save_pretrained(tmp_path / "teacher")
    trained = WaDiTrainer(arguments(tmp_path / "teacher", *flags))
    assert trained.schedule.terminal_alpha**2 == pytest.approx(0.0047)
    trained.train()
    assert trained.embeddings.empty.shape == (1, 24 if flags else 120, 13)
    z, x0 = one_step(trained)
    pipeline = PixArtAlphaPipeline.from_pretrained(tmp_path / "teacher")
    call = {"use_resolution_binning": False}
    assert torch.allclose(
        stock_latents(pipeline, tmp_path / "out", "transformer", z, **call), x0, rtol=1e-3, atol=1e-3
    )


def test_a_pixart_student_can_start_from_an_adapter(arguments, tmp_path):
    pixart_pipeline().save_pretrained(tmp_path / "teacher")
    first = WaDiTrainer(arguments(tmp_path / "teacher", "--max_sequence_length", 24))
    first.train()
    second = WaDiTrainer(
        arguments(tmp_path / "teacher", "--max_sequence_length", 24, "--init_student", tmp_path / "out", name="second")
    )
    assert all(
        torch.equal(*pair) for pair in zip(first.networks.student_parameters(), second.networks.student_parameters())
    )


def test_a_v_prediction_student_runs_in_the_stock_pipeline(arguments, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    trained = WaDiTrainer(arguments(tmp_path / "v", "--warmup_regression_steps", 1, "--warmup_regression_pairs", 2,
                                    "--warmup_num_inference_steps", 2))  # fmt: skip
    trained.train()
    z, x0 = one_step(trained)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "v")
    assert torch.allclose(stock_latents(pipeline, tmp_path / "out", "unet", z), x0, rtol=1e-3, atol=1e-3)
    assert DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler").config.prediction_type == "v_prediction"


def test_a_precomputed_cache_is_made_once_and_trains_the_same(arguments, base_folder, tmp_path, monkeypatch):
    plain = WaDiTrainer(arguments(base_folder, name="plain"))
    flags = ("--precompute_text_embeddings", "--text_cache_dir", tmp_path / "cache")
    cached = WaDiTrainer(arguments(base_folder, *flags, name="cached"))
    for trainer in (plain, cached):
        trainer.update()
    pairs = zip(plain.networks.student_parameters(), cached.networks.student_parameters())
    assert all(torch.allclose(*pair, atol=1e-4) for pair in pairs)
    monkeypatch.setattr("diffusers_wadi.distillation.text_cache._write_shard", lambda *args: pytest.fail("again"))
    WaDiTrainer(arguments(base_folder, *flags, name="other"))
    with pytest.raises(pytest.fail.Exception):
        WaDiTrainer(arguments(base_folder, *flags, "--embedding_dtype", "fp16", name="other"))


def test_prompts_are_reported(arguments, base_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=setup.logger.name)
    (tmp_path / "p.jsonl").write_text('{"t": "red"}\n{"t": "red"}\n{"t": "red blue red r r e d"}\n{\n')
    flags = ("--train_prompts", tmp_path / "p.jsonl", "--caption_column", "t")
    with pytest.raises(ValueError, match="1 of 4 records.*line 4.*--skip_bad_lines"):
        WaDiTrainer(arguments(base_folder, *flags))
    trainer = WaDiTrainer(arguments(base_folder, *flags, "--skip_bad_lines"))
    assert len(trainer.embeddings) == 2
    assert "2 prompts of 4 records, 1 repeated, 1 unreadable; characters: mean 12" in caplog.text
    assert "skipped: line 4: is not valid JSON" in caplog.text
    again = WaDiTrainer(arguments(base_folder, *flags, "--skip_bad_lines", "--keep_repeated_prompts", name="again"))
    assert len(again.embeddings) == 3
    assert "tokens: mean 6, median 6, 95 % 9, max 9; 0.00% are longer than 24 and cut" in caplog.text


def test_prompts_from_a_data_set_and_the_first_of_them(arguments, base_folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("caption,n\nred,1\nblue,2\nred,3\nred blue,4\nblue red,5\n")
    flags = (
        "--dataset_name",
        tmp_path / "set",
        "--caption_column",
        "caption",
        "--streaming",
        "--max_train_samples",
        3,
    )
    assert list(WaDiTrainer(arguments(base_folder, *flags)).embeddings.prompts) == ["red", "blue", "red blue"]


def test_shapes_captions_as_prompts(arguments, base_folder):
    def prompts(name):
        return list(WaDiTrainer(arguments(base_folder, "--shapes_captions", 30, name=name)).embeddings.prompts)

    assert 10 < len(prompts("one")) <= 30 and prompts("one") == prompts("two")


BAD_SOURCES = {
    "--shapes_captions 5 --train_prompts p": "exactly one of .* not --train_prompts and --shapes_captions",
    "--shapes_captions 5 --streaming": "belong to --dataset_name",
    "--shapes_captions 5 --caption_column t": "--caption_column does not belong",
    "--shapes_captions 5 --text_cache_dir c": "is for --precompute_text_embeddings",
    "--shapes_captions 5 --max_train_samples 0": "max_train_samples is 0",
}


@pytest.mark.parametrize("flags", BAD_SOURCES)
def test_flags_that_do_not_go_together(arguments, flags):
    with pytest.raises(ValueError, match=BAD_SOURCES[flags]):
        arguments("teacher", *flags.split())


def test_a_source_is_needed(tmp_path):
    with pytest.raises(ValueError, match="exactly one of .* not none"):
        train_wadi.parse_args(["--pretrained_teacher_model", "t", "--output_dir", str(tmp_path)])
