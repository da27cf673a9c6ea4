"""Two processes train what one process trains, and what the first of them saves is that."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from backbones import tiny_unet, unet_inputs
from killable_run import forkserver
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from wadi_script import train_wadi

from diffusers_wadi import LoRaDConfig, save_lorad_adapter
from diffusers_wadi.distillation.distributed import RoleModule, refuse_sharding
from diffusers_wadi.distillation.trainer import WaDiTrainer

PROMPTS = ["red", "blue", "red blue", "blue red", "a red r"]
RATE = 0.01
RATES = f"--learning_rate {RATE} --fake_learning_rate {RATE} --validation_steps 0 --max_train_steps 3"
# Updates of student and fake with dropped prompts, and of SiD's kind: through both networks, one of them a full copy.
RUNS = {
    "wadi": "--student_rank 4 --fake_rank 2 --proportion_empty_prompts 0.5 --regression_weight 0.5 "
    "--warmup_regression_pairs 8 --warmup_num_inference_steps 1 --fake_updates_per_step 2",
    "sid_lsg": "--objective sid_lsg --student_adapter lora --student_rank 4 --fake_adapter full --no-use_ema "
    "--proportion_empty_prompts 0.5 --gradient_checkpointing",
}


def train(folder: str, wrap=lambda unet: unet) -> torch.nn.Module:
    torch.set_num_threads(1)
    unet = tiny_unet()
    torch.manual_seed(5)
    unet.add_adapter(LoRaDConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"]), "student")
    model = wrap(unet)
    optimiser = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=100.0)
    for step in range(2):
        # Every process sees the same batch, so that their mean is exactly the gradient of one.
        model(**unet_inputs(seed=step)).sample.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_lorad_adapter(unet, folder, "student")
    return unet


def distil(name: str, teacher: str, folder: Path, batch: int, accumulation: int = 1) -> dict[str, torch.Tensor]:
    """What both roles are after three updates of eight samples each; and, as "start.", what they were."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    given = f"--pretrained_teacher_model {teacher} --train_prompts {folder / 'prompts.txt'} --output_dir {folder}"
    sizes = f"--train_batch_size {batch} --gradient_accumulation_steps {accumulation}"
    trainer = WaDiTrainer(train_wadi.parse_args(f"{given} {sizes} {RATES} {RUNS[name]}".split()))
    states = {role: trainer.networks.role_state(role) for role in ("student", "fake")}
    start = {f"start.{role}.{n}": p.detach().clone() for role, s in states.items() for n, p in s.items()}
    for _ in range(3):
        trainer.update()
    return start | {f"{role}.{n}": p.detach().clone() for role, s in states.items() for n, p in s.items()}


def worker(rank: int, port: int, folder: str, teacher: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"ACCELERATE_USE_CPU": "true"}
    for name in RUNS:
        state = distil(name, teacher, Path(folder, name), batch=4)
        save_file(state, Path(folder, f"{name}-{rank}.safetensors"))
    train(str(Path(folder, "two")), DistributedDataParallel)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, base_folder) -> Path:
    """The folder into which two processes have written what they made; one start for all tests, since it is slow."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in RUNS:
        Path(folder, name).mkdir()
    forkserver()  # which has imported everything
    mp.start_processes(worker, (port, str(folder), str(base_folder)), nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_same_numbers_however_a_batch_is_cut(two_processes, base_folder, tmp_path, name):
    """8 samples in one batch, on two processes, and accumulated: gradients are averaged by DistributedDataParallel."""
    try:
        whole = distil(name, base_folder, tmp_path / "whole", batch=8)
        accumulated = distil(name, base_folder, tmp_path / "accumulated", batch=4, accumulation=2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    ranks = [load_file(two_processes / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in whole)
    for role in ("student", "fake"):
        keys = [key for key in whole if key.startswith(role)]
        moved = norm(whole[key] - whole[f"start.{key}"] for key in keys)
        for other in (ranks[0], accumulated):
            # Adam divides by the gradient's size, which makes rounding errors of small ones visible.
            assert norm(whole[key] - other[key] for key in keys) < 2e-3 * moved
        assert moved > RATE


def norm(tensors) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


def test_rank_0_of_two_saves_what_one_process_saves(two_processes, tmp_path):
    threads = torch.get_num_threads()
    try:
        train(str(tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    files = [Path(folder, "pytorch_lorad_weights.safetensors") for folder in (tmp_path / "one", two_processes / "two")]
    one, two = map(load_file, files)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert all(tensor.any() for key, tensor in one.items() if key.endswith("lorad_A"))  # it was trained
    configs = [(file.parent / "adapter_config.json").read_bytes() for file in files]
    assert configs[0] == configs[1]


def test_a_role_module_owns_what_the_role_trains_alone(base_folder, tmp_path):
    given = f"--pretrained_teacher_model {base_folder} --shapes_captions 3 --output_dir {tmp_path} --student_rank 2"
    try:
        networks = WaDiTrainer(train_wadi.parse_args(given.split())).networks
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for role in ("student", "fake"):
        module = RoleModule(networks, role)
        assert [id(p) for p in module.parameters()] == [id(p) for p in networks.role_state(role).values()]
        assert not list(module.buffers())


@pytest.mark.parametrize(
    "variable, name", [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_sharding_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, variable, name):
    monkeypatch.setenv(variable, "true")
    args = train_wadi.parse_args(
        f"--pretrained_teacher_model nowhere --shapes_captions 1 --output_dir {tmp_path}".split()
    )
    with pytest.raises(ValueError, match=f"asks for {name} .*--multi_gpu"):
        WaDiTrainer(args)
    monkeypatch.setenv(variable, "false")
    refuse_sharding()
