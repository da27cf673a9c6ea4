"""The files of the paper's authors, made here in their layouts: whole rotated state dicts, and theta_a and theta_b."""

import copy
import math
import shutil

import pytest
import torch
from backbones import pixart_inputs, tiny_pixart
from conftest import SD_BETAS
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from diffusers_wadi import (
    WaDiPipeline,
    authors_files,
    convert_authors_state_dict_to_lorad,
    convert_lorad_state_dict_to_authors,
    load_authors_weights,
    load_lorad_adapter,
    one_step_scheduler,
    read_authors_file,
    save_authors_file,
    save_lorad_adapter,
)

SD15 = "rotated_unet-sdv1-5.safetensors"
SD21 = "rotated_unet-sdv2-1.safetensors"
PIXART = "rotated_transformer.safetensors"


# The release gives angles to every Linear of a UNet's blocks, and to every Linear of a transformer.
def trained_linears(model):
    blocks = ("down_blocks", "mid_block", "up_blocks")
    is_unet = hasattr(model, "down_blocks")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (not is_unet or any(block in name for block in blocks)):
            yield name, module


def training_state(model, rank=3, seed=5, size=0.4):
    """What their hook saves: {name: tensor for every "theta" in model.state_dict()}, float32."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in trained_linears(model):
        out_features, in_features = module.weight.shape
        state[f"{name}.theta_a"] = size * torch.randn(out_features, rank, generator=generator)
        state[f"{name}.theta_b"] = torch.randn(rank, in_features // 2, generator=generator)
    return state


def rotated_state(model, thetas):
    """The state dict with the rotation written into it, as the formula of the release says."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in trained_linears(model):
        theta = thetas[f"{name}.theta_a"] @ thetas[f"{name}.theta_b"]
        theta = (theta + math.pi) % (2 * math.pi) - math.pi
        even, odd = module.weight.detach()[:, 0::2], module.weight.detach()[:, 1::2]
        turned = torch.stack([even * theta.cos() - odd * theta.sin(), even * theta.sin() + odd * theta.cos()], dim=2)
        state[f"{name}.weight"] = turned.flatten(1)
    return state


@pytest.fixture
def unet(components):
    return components["unet"]


@pytest.fixture
def thetas(unet):
    return training_state(unet)


@pytest.fixture
def rotated(unet, thetas):
    return rotated_state(unet, thetas)


@pytest.fixture
def repository(rotated, base_folder, tmp_path, monkeypatch):
    """A folder with the UNet of their repository, whose usual base is the tiny one."""
    save_file(rotated, tmp_path / SD15)
    entry = authors_files.AuthorsFile("model", "unet", str(base_folder))
    monkeypatch.setitem(authors_files.AUTHORS_FILES, SD15, entry)
    return tmp_path


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)


def latents(pipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    return pipe("red blue", generator=generator, **options).images


def by_their_formula(components, state, seed=0):
    """One step as their inference script computes it, with its literal 0.0047."""
    unet, tokenizer = copy.deepcopy(components["unet"]), components["tokenizer"]
    unet.load_state_dict(state)
    ids = tokenizer("red blue", padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        eps = unet(noise, torch.tensor([999]), components["text_encoder"](ids)[0]).sample
    return (noise - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5


# -------------------------------------------------------------------------------------------------------- whole models


def test_the_known_files_have_bases():
    bases = {name: entry.base_model for name, entry in authors_files.AUTHORS_FILES.items()}
    assert bases[SD15].endswith("stable-diffusion-v1-5") and bases[SD21].endswith("stable-diffusion-2-1-base")
    assert authors_files.AUTHORS_FILES[PIXART].component == "transformer" and "PixArt-XL-2-256" in bases[PIXART]


def test_a_whole_unet_takes_the_place_of_the_bases(repository, rotated, components):
    pipe = WaDiPipeline.from_pretrained(repository, weight_name=SD15)
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, rotated[key]), key
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    assert pipe.is_one_step and not pipe.unet.training and not any(p.is_meta for p in pipe.unet.parameters())
    torch.testing.assert_close(latents(pipe), by_their_formula(components, rotated), rtol=1e-4, atol=1e-4)
    stock = StableDiffusionPipeline(**components)
    stock.unet.load_state_dict(rotated)
    stock.scheduler = one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=0.0047)
    assert torch.equal(latents(pipe), latents(stock))


def test_file_subfolder_base_and_dtype(repository, rotated, base_folder, components, tmp_path):
    expected = latents(WaDiPipeline.from_pretrained(repository, weight_name=SD15))
    assert torch.equal(latents(WaDiPipeline.from_pretrained(repository / SD15)), expected)
    deeper = tmp_path / "a" / "b"
    deeper.mkdir(parents=True)
    shutil.copy(repository / SD15, deeper / "rotated_unet.safetensors")  # the name in their inference script
    with pytest.raises(ValueError, match="holds a whole UNet .* pass base_model="):
        WaDiPipeline.from_pretrained(tmp_path / "a", weight_name="rotated_unet.safetensors", subfolder="b")
    pipe = WaDiPipeline.from_pretrained(
        tmp_path / "a", base_model=base_folder, weight_name="rotated_unet.safetensors", subfolder="b"
    )
    assert torch.equal(latents(pipe), expected)
    pipe = WaDiPipeline.from_pretrained(repository, weight_name=SD15, torch_dtype=torch.float16)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16
    pipe = WaDiPipeline.from_pretrained(
        repository, weight_name=SD15, torch_dtype={"unet": torch.bfloat16, "default": torch.float32}
    )
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    save_file(rotated, tmp_path / "mine.safetensors")  # nobody said that it is theirs: the schedule is the base's
    pipe = WaDiPipeline.from_pretrained(tmp_path / "mine.safetensors", base_model=base_folder)
    assert torch.equal(pipe.scheduler.alphas_cumprod, one_step_scheduler(SD_BETAS).alphas_cumprod)
    assert torch.equal(pipe.unet.state_dict()["conv_in.weight"], rotated["conv_in.weight"])


def test_scheduler_and_unet_that_were_given(repository, components):
    given = one_step_scheduler(SD_BETAS)
    assert WaDiPipeline.from_pretrained(repository, weight_name=SD15, scheduler=given).scheduler is given
    with pytest.raises(ValueError, match="holds a whole UNet, and unet= was given too"):
        WaDiPipeline.from_pretrained(repository, weight_name=SD15, unet=components["unet"])
    one_step_scheduler(SD_BETAS, terminal_alpha_cumprod=0.006).save_pretrained(repository / "scheduler")
    beside = WaDiPipeline.from_pretrained(repository, weight_name=SD15).scheduler
    assert abs(beside.alphas_cumprod[-1].item() - 0.006) < 1e-6
    v_prediction = DDIMScheduler(**SD_BETAS | {"prediction_type": "v_prediction"}, clip_sample=False)
    with pytest.raises(ValueError, match="v_prediction"):
        WaDiPipeline.from_pretrained(repository, weight_name=SD15, scheduler=v_prediction)


def test_from_the_hub(repository, rotated, monkeypatch):
    asked = []

    def download(name, filename, **options):
        asked.append((name, filename, options))
        if name != "gudaochangsheng/WaDi" or not (repository / filename).exists():
            raise EntryNotFoundError(filename)
        return str(repository / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pipe = WaDiPipeline.from_pretrained("gudaochangsheng/WaDi", weight_name=SD15, revision="v1", token="secret")
    assert torch.equal(pipe.unet.state_dict()["conv_in.weight"], rotated["conv_in.weight"])
    assert {name for _, name, _ in asked} == {SD15, "scheduler/scheduler_config.json"}
    assert all(options == {"revision": "v1", "token": "secret"} for _, _, options in asked)
    with pytest.raises(FileNotFoundError, match=f"no {SD21} in"):
        WaDiPipeline.from_pretrained("gudaochangsheng/WaDi", weight_name=SD21)
    with pytest.raises(ValueError, match=f"pass weight_name=, one of {SD15}"):
        WaDiPipeline.from_pretrained("gudaochangsheng/WaDi")


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, "conv_out.bias"), r"1 of \d+ tensors differ, first conv_out.bias: it is missing"),
        (lambda s: s | {"more.weight": torch.zeros(2)}, "1 of .* first more.weight: the model has no such tensor"),
        (lambda s: s | {"conv_in.bias": torch.zeros(3)}, r"first conv_in.bias: \(3,\) in the file, \(8,\) in the"),
        (
            lambda s: s | {"conv_in.bias": torch.full((8,), torch.nan)},
            "first conv_in.bias: values that are not finite",
        ),
        (lambda s: {f"unet.{k}": v for k, v in s.items()}, r"\d\d\d of \d+ tensors differ, first conv_in.bias"),
        (lambda s: {"a.lora_A.weight": torch.zeros(2, 2)}, "tensors differ, first a.lora_A.weight: the model has no"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused(repository, rotated, unet, change, message):
    save_file(change(rotated), repository / SD15)
    with pytest.raises(ValueError, match=f"(?s){message}.*Nothing was changed"):
        WaDiPipeline.from_pretrained(repository, weight_name=SD15)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_authors_weights(unet, repository, SD15)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_transformer_is_loaded_strictly_into_a_model_but_into_no_pipeline(tmp_path):
    model = tiny_pixart()
    thetas = training_state(model)
    assert "adaln_single.linear.theta_a" in thetas  # the release adapts these too
    state = rotated_state(model, thetas)
    # their diffusers saves a buffer that is not used, and not known any more
    save_file(state | {"caption_projection.y_embedding": torch.zeros(5, 12)}, tmp_path / PIXART)
    with pytest.raises(ValueError, match="PixArt transformer.*load_authors_weights"):
        WaDiPipeline.from_pretrained(tmp_path, weight_name=PIXART)
    with pytest.raises(ValueError, match="PixArt transformer.*load_authors_weights"):
        WaDiPipeline.from_pretrained(shutil.copy(tmp_path / PIXART, tmp_path / "x.safetensors"), base_model="x")
    with pytest.raises(ValueError, match="PixArt transformer"):
        WaDiPipeline.from_pretrained("gudaochangsheng/WaDi", weight_name=PIXART)
    tuned = tiny_pixart()
    plain = tuned(**pixart_inputs()).sample
    load_lorad_adapter(tuned, convert_authors_state_dict_to_lorad(thetas), component="transformer")
    load_authors_weights(model, tmp_path, PIXART)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        output = model(**pixart_inputs()).sample
        torch.testing.assert_close(output, tuned(**pixart_inputs()).sample, rtol=1e-4, atol=1e-4)
    assert (output - plain).abs().max() > 0.01
    with pytest.raises(ValueError, match="PixArtTransformer2DModel.*1 of .*first scale_shift_table: it is missing"):
        load_authors_weights(model, without(state, "scale_shift_table"))


def test_a_model_with_adapters_or_offloaded_is_left_alone(unet, rotated, thetas):
    from accelerate import cpu_offload

    with pytest.raises(ValueError, match="tensors differ.*It holds training weights"):
        load_authors_weights(unet, thetas)
    load_lorad_adapter(unet, convert_authors_state_dict_to_lorad(thetas))
    with pytest.raises(ValueError, match="carries adapters"):
        load_authors_weights(unet, rotated)
    unet.unload_lora()
    load_authors_weights(unet, rotated)
    cpu_offload(unet, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        load_authors_weights(unet, rotated)


# ------------------------------------------------------------------------------------------------------ training files


@pytest.mark.parametrize("name", ["kduv.pth", "ema_kduv.pth", "kduv.safetensors", "wrapped.pth"])
def test_training_files_are_adapters(components, thetas, rotated, base_folder, tmp_path, name):
    if name.startswith("ema"):  # their average keeps the autograd graph
        thetas = {key: value.requires_grad_() * 1.0 for key, value in thetas.items()}
    if name.startswith("wrapped"):
        thetas = {f"module.{key}": value for key, value in thetas.items()}
    if name.endswith(".pth"):
        torch.save(thetas, tmp_path / name)
    else:
        save_file(thetas, tmp_path / name)
    with pytest.raises(ValueError, match="training weights .* pass base_model="):
        WaDiPipeline.from_pretrained(tmp_path, weight_name=name)
    pipe = WaDiPipeline.from_pretrained(tmp_path, base_model=base_folder, weight_name=name, adapter_name="student")
    assert pipe.get_active_adapters() == ["student"]
    assert abs(pipe.scheduler.alphas_cumprod[-1].item() - 0.0047) < 1e-6
    torch.testing.assert_close(latents(pipe), by_their_formula(components, rotated), rtol=1e-4, atol=1e-3)
    pipe.fuse_lorad()
    pipe.unload_lorad_weights()
    for key, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(value, rotated[key], rtol=1e-5, atol=1e-6)
    unfused = WaDiPipeline.from_pretrained(tmp_path / name, base_model=base_folder)
    torch.testing.assert_close(latents(pipe), latents(unfused), rtol=1e-4, atol=1e-3)


def test_the_final_pipeline_of_their_training(components, base_folder, thetas, tmp_path):
    """It holds the teacher's weights in half precision and the angles beside them."""
    folder = shutil.copytree(base_folder, tmp_path / "final")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    teacher = {key: value.half() for key, value in load_file(file).items()}
    save_file(teacher | thetas, file)
    with pytest.raises(OSError, match="training weights of the authors' release; WaDiPipeline.from_pretrained"):
        WaDiPipeline.from_pretrained(folder)
    pipe = WaDiPipeline.from_pretrained(file)
    components["unet"].load_state_dict(teacher)
    expected = by_their_formula(components, rotated_state(components["unet"], thetas))
    torch.testing.assert_close(latents(pipe), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"\d+ keys besides theta_a and theta_b, first .*split_authors_state_dict"):
        convert_authors_state_dict_to_lorad(read_authors_file(file))


@pytest.mark.parametrize("name", ["theirs.pth", "theirs.pt", "theirs.safetensors"])
def test_native_to_theirs_and_back_is_exact(unet, thetas, tmp_path, name):
    load_lorad_adapter(unet, convert_authors_state_dict_to_lorad(thetas, component="unet"))
    native = load_file(save_lorad_adapter(unet, tmp_path / "native"))
    assert all(key.startswith("unet.") and key.endswith((".lorad_A", ".lorad_B")) for key in native)
    save_authors_file(convert_lorad_state_dict_to_authors(native), tmp_path / name)
    again = read_authors_file(tmp_path, name)
    assert again.keys() == thetas.keys() and all(torch.equal(again[key], thetas[key]) for key in thetas)
    back = convert_authors_state_dict_to_lorad(again, component="unet")
    assert back.keys() == native.keys() and all(torch.equal(back[key], native[key]) for key in native)


def test_a_part_of_a_tensor_is_saved_without_the_rest(tmp_path):
    large = torch.zeros(1000, 1000)
    save_authors_file({"a.theta_a": large[:2, :2], "a.theta_b": large[:2].T}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 20_000 and [f.name for f in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    "convert, good, message",
    [
        (convert_authors_state_dict_to_lorad, "theta", "besides theta_a and theta_b, first a.bias"),
        (
            convert_lorad_state_dict_to_authors,
            "lorad",
            "besides lorad_A and lorad_B, first a.bias. The authors' layout",
        ),
    ],
)
def test_what_cannot_be_converted(convert, good, message):
    first, second = ("a.theta_a", "a.theta_b") if good == "theta" else ("a.lorad_A", "a.lorad_B")
    pair = {first: torch.zeros(4, 2), second: torch.zeros(2, 3)}
    assert len(convert(pair)) == 2
    with pytest.raises(ValueError, match=f"1 modules have only one of {first[2:]} and {second[2:]}, first a"):
        convert(without(pair, second))
    with pytest.raises(ValueError, match=f"1 keys {message}"):
        convert(pair | {"a.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="no keys that end in .*; the first key is 'x.lora_A'"):
        convert({"x.lora_A": torch.zeros(2, 2)})


def test_training_weights_for_another_model_leave_nothing_behind(base_folder, thetas, tmp_path):
    cut = {key: value[:-2] if key.endswith("theta_a") else value for key, value in thetas.items()}
    torch.save(cut, tmp_path / "kduv.pth")
    modules = len(thetas) // 2
    with pytest.raises(ValueError, match=f"{modules} of {modules} modules differ, first .*the model has"):
        WaDiPipeline.from_pretrained(tmp_path / "kduv.pth", base_model=base_folder)
    pipe = WaDiPipeline.from_pretrained(base_folder)
    expected = latents(pipe)
    with pytest.raises(ValueError, match="modules differ"):
        pipe.load_lorad_weights(convert_authors_state_dict_to_lorad(cut))
    assert torch.equal(latents(pipe), expected) and not getattr(pipe.unet, "peft_config", None)


# ------------------------------------------------------------------------------------------------------------ bad files


class Code:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_file_with_code_in_it_is_refused_and_not_run(base_folder, thetas, tmp_path):
    target = tmp_path / "ran"
    for number, state in enumerate((thetas | {"x.theta_a": Code(target)}, Code(target))):
        torch.save(state, tmp_path / f"{number}.pth")
        for read in (
            read_authors_file,
            lambda path: WaDiPipeline.from_pretrained(path, base_model=base_folder),
            lambda path: WaDiPipeline.from_pretrained(path.parent, base_model=base_folder, weight_name=path.name),
        ):
            with pytest.raises(ValueError, match="more than tensors and is not read"):
                read(tmp_path / f"{number}.pth")
    assert not target.exists()


def test_damaged_and_foreign_files(repository, thetas, base_folder, tmp_path):
    torch.save(thetas, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:3000])
    (tmp_path / "empty.pth").touch()
    torch.save([thetas], tmp_path / "list.pth")
    torch.save({"step": 3} | thetas, tmp_path / "step.pth")
    (repository / SD15).write_bytes((repository / SD15).read_bytes()[:5000])
    torch.save(thetas, tmp_path / "kduv.ckpt")
    for name, message in {
        "cut.pth": "not a complete torch file",
        "empty.pth": "not a complete torch file",
        "list.pth": "but a list",
        "step.pth": "does not hold tensors by name",
        SD15: "not a complete safetensors file",
        "kduv.ckpt": "ends in .safetensors, .pth, .pt",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_authors_file(tmp_path, name)
        with pytest.raises(ValueError):
            WaDiPipeline.from_pretrained(tmp_path / name, base_model=base_folder)
    with pytest.raises(ValueError, match="leaves"):
        read_authors_file(tmp_path, "../secret.pth")
    with pytest.raises(ValueError, match="leaves"):
        WaDiPipeline.from_pretrained(tmp_path, weight_name="../secret.pth", base_model=base_folder)
    with pytest.raises(FileNotFoundError, match=f"weight_name=, such as {SD15}"):
        read_authors_file(tmp_path)
    with pytest.raises(ValueError, match="expected a name that ends in"):
        save_authors_file(thetas, tmp_path / "x.bin")
