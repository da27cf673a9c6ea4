"""An adapter that was trained by two processes and saved by the first is that of one process."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from backbones import tiny_unet, unet_inputs
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from diffusers_wadi import LoRaDConfig, save_lorad_adapter


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


def worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train(folder, DistributedDataParallel)
    dist.barrier()
    dist.destroy_process_group()


def test_rank_0_of_two_saves_what_one_process_saves(tmp_path):
    threads = torch.get_num_threads()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (port, str(tmp_path / "two")), nprocs=2, start_method="spawn")
    try:
        train(str(tmp_path / "one"))
    finally:
        torch.set_num_threads(threads)
    files = [Path(tmp_path, name, "pytorch_lorad_weights.safetensors") for name in ("one", "two")]
    one, two = map(load_file, files)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert all(tensor.any() for key, tensor in one.items() if key.endswith("lorad_A"))  # it was trained
    configs = [(file.parent / "adapter_config.json").read_bytes() for file in files]
    assert configs[0] == configs[1]
