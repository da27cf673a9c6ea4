"""Defects of the authors' release that concern training, and the test that holds each of them off.

The numbers are those of the project's list of the release's defects. What no test can hold:

- 9 in half (a layer computed twice is held; the time it costs is in `benchmarks/training_step.py`),
- 23 (requirements that cannot be installed): `training/requirements_*.txt` are resolved by users' pip,
- 31 (an attribute on a frozen config): nothing of the kind is there; roles are known by the names of adapters.
"""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from wadi_script import train_wadi

from diffusers_wadi.distillation import losses, noise
from diffusers_wadi.distillation.trainer import WaDiTrainer

ROOT = Path(__file__).parents[2]
# Defect -> where it is held off.
HELD = {
    "1 checkpoints contain no adapter": "training/test_train_wadi.py::test_checkpoint_adapters_load_by_themselves",
    "2 resume crashes, roles crossed": "training/test_train_wadi.py::test_resumed_equals_uninterrupted_bit_for_bit",
    "3 the final pipeline is the teacher": "training/test_train_wadi.py::test_exported_student_runs_in_the_pipeline",
    "4 nothing merges rotations": "test_export.py::test_adapters_are_fused_in_the_file_and_left_in_the_pipeline",
    "5 text masked in training only": "distillation/test_data.py::test_embeddings_are_those_of_the_stock_pipeline",
    "5 the same for PixArt": "distillation/test_backbones.py::test_masks_of_pixart_are_those_of_inference_and_matter",
    "6 gradient checkpointing inactive": "training/test_release_defects.py::test_gradient_checkpointing_is_active",
    "7 half-precision angles": "training/test_release_defects.py::test_small_angles_survive_half_precision",
    "8 half-precision schedule": "training/test_release_defects.py::test_schedules_stay_float32",
    "9 layers computed twice": "training/test_release_defects.py::test_adapted_layers_are_computed_once",
    "10 passes not batched": "training/test_train_wadi.py::test_a_step_makes_no_needless_passes",
    "11 text encoded one by one": "distillation/test_data.py::test_text_is_encoded_in_one_batch",
    "12 prompt files by their names": "distillation/test_prompts.py::test_files_are_read",
    "13 a global seed in the data": "training/test_release_defects.py::test_a_second_run_is_the_first_again",
    "14 prompts dropped per batch only": "training/test_release_defects.py::test_prompts_can_be_dropped_per_sample",
    "15 ranks draw the same": "training/test_release_defects.py::test_processes_draw_different_noise",
    "16 flags without effect": "training/test_train_wadi_flags.py::test_every_flag_is_explained_and_used",
    "17 PixArt's layers": "lorad/test_targets.py::test_counts_of_the_paper",
    "18 PixArt's last alpha": "distillation/test_backbones.py::test_terminal_value_of_pixart_can_be_given",
    "19 PixArt's data": "training/test_train_wadi_backbones.py::test_a_pixart_student_runs_in_the_stock_pipeline",
    "20 the average keeps graphs": "training/test_release_defects.py::test_the_average_keeps_no_graph",
    "21 average and resume": "training/test_train_wadi.py::test_resumed_equals_uninterrupted_bit_for_bit",
    "22 no precision but half": "training/test_train_wadi.py::test_low_precision_and_memory_options_train",
    "24 attention needs xformers": "training/test_release_defects.py::test_fused_attention_needs_no_package",
    "25 the teacher is trained along": "training/test_release_defects.py::test_only_the_roles_can_be_trained",
    "26 defaults that crash": "training/test_release_defects.py::test_defaults_are_enough",
    "26 seed 0 is none": "training/test_release_defects.py::test_a_second_run_is_the_first_again",
    "27 v-prediction taken for epsilon": "distillation/test_backbones.py::test_eps_is_what_the_stock_scheduler_computes",
    "28 odd layers and convolutions": "lorad/test_targets.py::test_linear_and_convolutions_of_the_paper",
    "29 the order restarts": "distillation/test_data.py::test_order_resumes_anywhere",
    "29 the first samples by chance": "distillation/test_prompts.py::test_the_first_samples_only",
    "30 host and device wait": "training/test_watching.py::test_an_update_does_not_wait_for_the_device",
    "32 a script that cannot be imported": "training/test_release_defects.py::test_the_script_is_a_module",
    "33 no licence": "training/test_release_defects.py::test_there_is_a_licence",
}


@pytest.mark.parametrize("defect", HELD)
def test_the_named_test_exists(defect):
    file, name = HELD[defect].split("::")
    functions = [node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")]
    assert name in functions


@pytest.fixture
def run(tiny_run):
    """Parse flags for a tiny run; `name` is the output folder."""
    small = "--train_batch_size 4 --validation_steps 0 --max_train_steps 2".split()
    return lambda name, *flags: tiny_run(*small, *flags, name=name)


def test_gradient_checkpointing_is_active(run):
    """The student's blocks are computed again in its backward pass."""
    calls = {}
    for name, flags in {"off": (), "on": ("--gradient_checkpointing",)}.items():
        trained = WaDiTrainer(run(name, *flags))
        resnet = trained.networks.model.up_blocks[0].resnets[0]
        resnet.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        trained.update()
    assert calls == {"off": 4, "on": 6}  # student, teacher, fake, fake's training; the two that train once more


def test_small_angles_survive_half_precision(run):
    """At 1e-3 rad the release's bfloat16 change of the weight is all error (100 %)."""
    trained = WaDiTrainer(run("out", "--mixed_precision", "bf16", "--base_dtype", "bf16"))
    layer = next(m for m in trained.networks.model.modules() if "student" in getattr(m, "lorad_A", ()))
    with torch.no_grad():
        layer.lorad_A["student"].normal_(std=5e-4)
    assert layer.lorad_A["student"].dtype == torch.float32
    with trained.accelerator.autocast():
        theta = layer.get_angles(["student"])
        expected = layer.lorad_A["student"].double() @ layer.lorad_B["student"].double()
    assert 1e-4 < expected.abs().mean() < 2e-3
    assert theta.dtype == torch.float32 and (theta - expected).norm() < 1e-5 * expected.norm()


def test_schedules_stay_float32(run, monkeypatch):
    seen, original = [], losses.vsd_gradient

    def spied(x0, x_t, teacher_eps, fake_eps, alpha, sigma, weighting):
        seen.extend((x0, x_t, teacher_eps, fake_eps, alpha, sigma))
        return original(x0, x_t, teacher_eps, fake_eps, alpha, sigma, weighting)

    monkeypatch.setattr(losses, "vsd_gradient", spied)
    trained = WaDiTrainer(run("out", "--mixed_precision", "bf16", "--base_dtype", "bf16"))
    trained.update()
    assert len(seen) == 6 and {tensor.dtype for tensor in seen} == {torch.float32}
    alphas = trained.backbone.scheduler.alphas_cumprod.double().sqrt()
    assert (trained.schedule.alphas.double() - alphas).abs().max() < 1e-7


def test_adapted_layers_are_computed_once(run, monkeypatch):
    """One matrix product with the layer's input, where the release has two."""
    trained = WaDiTrainer(run("out"))
    layer = next(m for m in trained.networks.model.modules() if "student" in getattr(m, "lorad_A", ()))
    calls, original = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or original(*args))
    layer(torch.randn(2, layer.in_features))
    assert len(calls) == 1


def test_a_second_run_is_the_first_again(run):
    """With the files that the first left behind, and with seed 0; another seed differs."""
    ends = []
    for seed in (0, 0, 1):
        trained = WaDiTrainer(run("out", "--seed", seed, "--learning_rate", 0.1, "--precompute_text_embeddings"))
        trained.update(), trained.update()
        ends.append(torch.cat([p.detach().flatten() for p in trained.networks.student_parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("per, mixed", [("batch", False), ("sample", True)])
def test_prompts_can_be_dropped_per_sample(run, monkeypatch, per, mixed):
    dropped, original = [], losses.fake_score_loss

    def spied(fake, x0, text, *rest):
        dropped.append([torch.equal(one, trained.embeddings.empty[0]) for one in text])
        return original(fake, x0, text, *rest)

    monkeypatch.setattr(losses, "fake_score_loss", spied)
    chances = ("--proportion_empty_prompts", 0.5, "--empty_prompts_per", per)
    trained = WaDiTrainer(run("out", *chances, "--max_train_steps", 12))
    for _ in range(12):
        trained.update()
    flat = [flag for batch in dropped for flag in batch]
    assert any(flat) and not all(flat)
    assert any(len(set(batch)) == 2 for batch in dropped) == mixed


def test_processes_draw_different_noise():
    first, second = (noise.SampleDraws(0, 2, rank, 2) for rank in (0, 1))
    for draws in (first, second):
        draws.next_round()
    shape = (4, 8, 8)
    drawn = torch.cat([first.normal("noise", shape), second.normal("noise", shape)])
    assert len({tuple(sample.flatten()[:4].tolist()) for sample in drawn}) == 4
    t = torch.cat([draws.integers("t", 0, 10**9) for draws in (first, second)])
    assert len(set(t.tolist())) == 4


def test_the_average_keeps_no_graph(run):
    trained = WaDiTrainer(run("out", "--use_ema", "--learning_rate", 0.1))
    before = [p.clone() for p in trained.ema.shadow_params]
    trained.update(), trained.update()
    assert all(p.grad_fn is None and not p.requires_grad for p in trained.ema.shadow_params)
    assert any(not torch.equal(p, old) for p, old in zip(trained.ema.shadow_params, before))


def test_fused_attention_needs_no_package(run, monkeypatch):
    calls, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    WaDiTrainer(run("out", "--attention", "sdpa")).update()
    assert calls


def test_only_the_roles_can_be_trained(run):
    trained = WaDiTrainer(run("out"))
    roles = {id(p) for role in ("student", "fake") for p in trained.networks.role_state(role).values()}
    trainable = {id(p) for p in trained.networks.model.parameters() if p.requires_grad}
    assert trainable == roles
    assert not any(p.requires_grad for p in trained.painter.pipe.vae.parameters())
    before = {n: p.clone() for n, p in trained.networks.model.named_parameters() if id(p) not in roles}
    trained.update()
    after = dict(trained.networks.model.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())


def test_defaults_are_enough(base_folder, tmp_path, monkeypatch):
    """No validation prompts, no output folder, no tracker: samples are named by steps, and not every step has one."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red / \\ blue?\nred")
    flags = f"--pretrained_teacher_model {base_folder} --train_prompts prompts.txt --max_train_steps 2"
    train_wadi.main(train_wadi.parse_args([*flags.split(), *"--student_rank 4 --fake_rank 2".split()]))
    assert sorted(p.name for p in Path("wadi-model/samples").iterdir()) == ["step-000000.png", "step-000002.png"]


def test_the_script_is_a_module():
    """What it does lies in functions and in the package; importing it ran nothing."""
    tree = ast.parse(Path(train_wadi.__file__).read_text())
    assert callable(train_wadi.main) and not [node for node in tree.body if isinstance(node, (ast.For, ast.With))]
    assert max(n.end_lineno - n.lineno for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)) < 80


def test_there_is_a_licence():
    assert (ROOT / "LICENSE").is_file() and "icense" in (ROOT / "LICENSE").read_text()[:400]
