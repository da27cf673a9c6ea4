"""LoRaD while weights are offloaded: by model, sequentially, by groups in memory or on the disk.

Without an accelerator the computing device is the CPU. Sequential offload still takes the weights away between calls
(to the meta device), and so does group offload to the disk (it leaves empty tensors), so a weight that is read without
its hook is an error or noise here too.
"""

import copy
import shutil

import accelerate
import pytest
import torch
from conftest import add_random_adapter
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_wadi import WaDiPipeline, save_lorad_adapter
from diffusers_wadi.loaders import lorad_layers
from diffusers_wadi.lorad.offload import onloaded

CPU = torch.device("cpu")


def sequentially(pipe, folder):
    # pipe.enable_sequential_cpu_offload refuses to run without an accelerator; this is what it does.
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def leaves_on_disk(pipe, folder):
    apply_group_offloading(pipe.unet, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def blocks_on_disk(pipe, folder):
    apply_group_offloading(
        pipe.unet, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


OFFLOADS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequentially,
    "leaves": lambda pipe, folder: apply_group_offloading(pipe.unet, CPU, offload_type="leaf_level"),
    "leaves on disk": leaves_on_disk,
    "blocks on disk": blocks_on_disk,
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    """Switch on one kind of offload; with `check=True` only see whether it is on."""

    def switch(pipe, check=False):
        if not check:
            return OFFLOADS[request.param](pipe, tmp_path / "groups")
        weights = [layer.get_base_layer().weight for layer in lorad_layers(pipe.unet)] or [pipe.unet.conv_in.weight]
        if request.param == "model":
            return hasattr(pipe.unet, "_hf_hook")
        if request.param == "sequential":
            return all(weight.is_meta for weight in weights)
        return _is_group_offload_enabled(pipe.unet)

    return switch


def predict(pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return pipe.unet(z, 999, text).sample


def second_adapter(components, folder):
    unet = add_random_adapter(copy.deepcopy(components["unet"]), "b", r=2, seed=7)
    save_lorad_adapter(unet, folder, "b")
    return folder


STAGES = {
    "two loaded": lambda pipe, b: pipe.load_lorad_weights(b, adapter_name="b"),
    "both": lambda pipe, b: pipe.set_adapters(["a", "b"], [1.0, 0.5]),
    "fused": lambda pipe, b: pipe.fuse_lorad(lorad_scale=0.7),
    "off": lambda pipe, b: pipe.unfuse_lorad() or pipe.disable_lora(),
    "on": lambda pipe, b: pipe.enable_lora(),
    "one deleted": lambda pipe, b: pipe.delete_adapters("a"),
    "swapped": lambda pipe, b: pipe.load_lorad_weights(b, adapter_name="b", hotswap=True),
    "unloaded": lambda pipe, b: pipe.unload_lorad_weights(),
}


def test_every_operation_gives_the_same_and_leaves_the_offload_on(components, adapter_folder, tmp_path, offload):
    plain, pipe = WaDiPipeline(**copy.deepcopy(components)), WaDiPipeline(**components)
    b = second_adapter(components, tmp_path / "b")
    offload(pipe)
    for one in (plain, pipe):
        one.load_lorad_weights(adapter_folder, adapter_name="a")
    seen = [predict(plain)]
    torch.testing.assert_close(predict(pipe), seen[0])
    for name, stage in STAGES.items():
        for one in (plain, pipe):
            stage(one, b)
        seen.append(predict(plain))
        for _ in range(2):  # the second call needs what the first has put away
            torch.testing.assert_close(
                predict(pipe), seen[-1], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
        assert offload(pipe, check=True), name
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(seen[1:4], seen))  # the stages do differ


def test_offload_that_is_switched_on_later(components, adapter_folder, offload):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="a")
    expected = predict(pipe)
    offload(pipe)
    torch.testing.assert_close(predict(pipe), expected)


def test_saving_is_bit_exact_and_the_checkpoint_whole(components, adapter_folder, tmp_path, offload):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder, adapter_name="a")
    offload(pipe)
    pipe.save_lorad_weights(tmp_path / "adapter")
    name = "pytorch_lorad_weights.safetensors"
    saved, given = load_file(tmp_path / "adapter" / name), load_file(adapter_folder / name)
    assert saved.keys() == given.keys() and all(torch.equal(saved[key], given[key]) for key in saved)
    pipe.save_pretrained(tmp_path / "whole")
    fused = WaDiPipeline.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(predict(fused), predict(pipe), rtol=1e-4, atol=1e-5)
    assert offload(pipe, check=True)


def test_a_failed_load_leaves_the_offload_on(components, adapter_folder, offload, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk on fire")

    pipe = WaDiPipeline(**components)
    expected = predict(pipe)
    offload(pipe)
    monkeypatch.setattr("diffusers_wadi._adapter_io.set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        pipe.load_lorad_weights(adapter_folder)
    torch.testing.assert_close(predict(pipe), expected)
    assert offload(pipe, check=True)


@pytest.mark.parametrize("lora_first", [False, True])
def test_a_lora_beside_it_in_sequential_offload(components, adapter_folder, lora_first):
    torch.manual_seed(0)
    pipe = WaDiPipeline(**components)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    if lora_first:
        pipe.unet.add_adapter(lora, "plain")
    pipe.load_lorad_weights(adapter_folder, adapter_name="rotation")
    if not lora_first:
        pipe.unet.add_adapter(lora, "plain")
    pipe.set_adapters(["rotation", "plain"])
    expected = predict(pipe)
    sequentially(pipe, None)
    torch.testing.assert_close(predict(pipe), expected)


def test_the_model_s_own_methods_fuse_in_sequential_offload(components, adapter_folder):
    """Without the pipeline's help, also where a switched-off layer unfuses itself in the middle of a call."""
    pipe = WaDiPipeline(**components)
    base = predict(pipe)
    pipe.load_lorad_weights(adapter_folder)
    expected = predict(pipe)
    sequentially(pipe, None)
    pipe.unet.fuse_lora()
    torch.testing.assert_close(predict(pipe), expected, rtol=1e-4, atol=1e-5)
    pipe.disable_lora()
    for _ in range(2):
        torch.testing.assert_close(predict(pipe), base, rtol=1e-4, atol=1e-5)
    assert all(p.is_meta for p in pipe.unet.parameters())


def test_weights_on_the_disk_are_not_changed_there(components, adapter_folder, tmp_path):
    pipe = WaDiPipeline(**components)
    pipe.load_lorad_weights(adapter_folder)
    expected = predict(pipe)
    leaves_on_disk(pipe, tmp_path)
    with pytest.raises(ValueError, match="offloaded to a disk.* Fuse or unfuse before"):
        pipe.unet.fuse_lora()
    torch.testing.assert_close(predict(pipe), expected)


def test_a_model_dispatched_to_the_disk_is_refused(components, adapter_folder, tmp_path):
    pipe = WaDiPipeline(**components)
    accelerate.disk_offload(pipe.unet, tmp_path / "weights", execution_device=CPU)
    expected = predict(pipe)
    with pytest.raises(ValueError, match="dispatched to the disk"):
        pipe.load_lorad_weights(adapter_folder)
    torch.testing.assert_close(predict(pipe), expected)


def test_onloading_is_undone_by_an_error():
    model = torch.nn.Sequential(layer := torch.nn.Linear(4, 4))
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(RuntimeError), onloaded(layer):
        assert not layer.weight.is_meta
        raise RuntimeError
    assert layer.weight.is_meta


def test_the_groups_files_are_written_anew(components, adapter_folder, tmp_path):
    """diffusers leaves a group's file alone if there is one, also when its tensors are others now."""
    pipe = WaDiPipeline(**components)
    leaves_on_disk(pipe, tmp_path)
    before = {file.name for file in tmp_path.iterdir()}
    pipe.load_lorad_weights(adapter_folder)
    assert {file.name for file in tmp_path.iterdir()} - before  # the layers have other names below an adapter
    pipe.unload_lorad_weights()
    left = {file.name for file in tmp_path.iterdir()}
    assert left == before
    shutil.rmtree(tmp_path)
