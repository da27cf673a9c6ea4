"""DreamBooth's parts: images, class images, loss, and a subject over a one-step student."""

import copy

import numpy as np
import pytest
import torch
from conftest import TARGETS, add_random_adapter, tiny_unet
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from diffusers_wadi import LoRaDConfig, WaDiPipeline, load_lorad_adapter, save_lorad_adapter
from diffusers_wadi.downstream import dreambooth
from diffusers_wadi.downstream.dreambooth import SubjectImages, dreambooth_loss, missing_class_images


def gradient_image(width, height, mode="RGB"):
    """Red grows to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, 0 * rows], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


# --- images ---


def test_images_are_upright_cut_and_scaled(tmp_path):
    gradient_image(64, 32).save(tmp_path / "a.png")
    turned = gradient_image(32, 32).rotate(90, expand=True)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "b.jpg", exif=exif, quality=100, subsampling=0)
    gradient_image(32, 32, "RGBA").save(tmp_path / "c.png")
    (tmp_path / ".hidden").write_text("not an image")
    images = SubjectImages(tmp_path, 16, center_crop=True)
    assert [file.name for file in images.files] == ["a.png", "b.jpg", "c.png"] and not images.random_flip
    a, b, c = images.at(torch.arange(3), torch.zeros(3, 3))
    assert a.shape == (3, 16, 16) and -1 <= a.min() and a.max() <= 1
    assert a[0].mean() == pytest.approx(0, abs=0.05) and a[0].std() < 0.7 * c[0].std()  # the middle half
    assert torch.allclose(b, c, atol=0.1)  # which only holds if the turn was undone


def test_crop_and_flip_follow_the_random_numbers(tmp_path):
    gradient_image(32, 16).save(tmp_path / "a.png")
    images = SubjectImages(tmp_path, 16, random_flip=True)
    random = torch.tensor([[0, 0, 0.2], [0, 0.999, 0.2], [0, 0, 0.7], [1, 1, 0.2]])  # float32 draws can round up to 1
    left, right, mirrored, last = images.at(torch.zeros(4, dtype=torch.long), random)
    whole = torch.from_numpy(np.array(gradient_image(32, 16))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(left, whole[..., :16]) and torch.equal(right, whole[..., 16:]) and torch.equal(last, right)
    assert torch.equal(mirrored, left.flip(-1)) and not images.fixed
    assert not SubjectImages(tmp_path, 16).fixed and SubjectImages(tmp_path, 16, center_crop=True).fixed


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="class images.*nowhere.*does not exist"):
        SubjectImages(tmp_path / "nowhere", 16, what="class images")
    with pytest.raises(FileNotFoundError, match="is empty"):
        SubjectImages(tmp_path, 16)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="notes.txt cannot be read as an image"):
        SubjectImages(tmp_path, 16)
    (tmp_path / "notes.txt").unlink()
    gradient_image(64, 64).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        SubjectImages(tmp_path, 16)


# --- class images ---


def test_class_images_go_on_where_they_stopped(components, tmp_path):
    pipe = StableDiffusionPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    settings = {"resolution": 64, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert missing_class_images(whole, 3) == [0, 1, 2]
    dreambooth.draw_class_images(pipe, "red", whole, [0, 1, 2], batch_size=2, **settings)

    class Stop(Exception):
        pass

    def interrupted(batches):
        yield batches[0]
        raise Stop

    with pytest.raises(Stop):
        dreambooth.draw_class_images(pipe, "red", parts, [0, 1, 2], batch_size=1, progress=interrupted, **settings)
    assert missing_class_images(parts, 3) == [1, 2]
    dreambooth.draw_class_images(pipe, "red", parts, [1, 2], batch_size=2, **settings)
    assert sorted(p.name for p in parts.iterdir()) == [f"class-{i:05d}.png" for i in range(3)]
    for i in range(3):
        one, other = (np.asarray(Image.open(dreambooth.class_image_file(f, i))).astype(int) for f in (whole, parts))
        assert abs(one - other).max() <= 1
    assert not np.array_equal(one, np.asarray(Image.open(dreambooth.class_image_file(whole, 0))))


def test_pictures_of_the_user_count_as_class_images(tmp_path):
    for name in ("mine.jpg", "class-00001.png", ".hidden"):
        (tmp_path / name).touch()
    assert missing_class_images(tmp_path, 4) == [0, 2]
    assert missing_class_images(tmp_path, 2) == []


# --- loss (D3) ---


def test_prior_loss():
    torch.manual_seed(0)
    prediction, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    instance = torch.nn.functional.mse_loss(prediction[:2], target[:2])
    loss, logs = dreambooth_loss(prediction, target, 0.0)
    assert torch.equal(loss, instance) and logs["prior_loss"] > 0
    assert torch.equal(dreambooth_loss(prediction[:2], target[:2])[0], instance)
    twice = prediction[:2].repeat(2, 1, 1, 1), target[:2].repeat(2, 1, 1, 1)
    assert dreambooth_loss(*twice, 1.0)[0].item() == pytest.approx(2 * instance.item(), rel=1e-6)
    assert dreambooth_loss(*twice, 0.5)[0].item() == pytest.approx(1.5 * instance.item(), rel=1e-6)
    with pytest.raises(ValueError, match="holds 3"):
        dreambooth_loss(prediction[:3], target[:3], 1.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_leads_back_to_the_image(kind):
    """x0 = (x_t - sigma eps) / alpha or alpha x_t - sigma v, whatever the network predicts."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    x0, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    x_t, target = scheduler.add_noise(x0, noise, t), dreambooth.noise_target(scheduler, x0, noise, t)
    alpha, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (scheduler.alphas_cumprod[t], 1 - scheduler.alphas_cumprod[t]))
    found = (x_t - sigma * target) / alpha if kind == "epsilon" else alpha * x_t - sigma * target
    assert torch.allclose(found, x0, atol=1e-4)


def test_the_sampler_is_ddim_of_the_models_schedule(components):
    own = DDIMScheduler(beta_start=0.002, beta_end=0.01, prediction_type="v_prediction", timestep_spacing="leading")
    made = dreambooth.sampling_scheduler(own)
    made.set_timesteps(50)
    assert isinstance(made, DDIMScheduler) and len(made.timesteps) == 50 and made.timesteps[0] == 999
    assert torch.equal(made.alphas_cumprod, own.alphas_cumprod) and made.config.prediction_type == "v_prediction"
    assert own.config.clip_sample and not made.config.clip_sample


# --- the subject over a student ---


def saved_subject(unet, folder, seed=5):
    """A LoRaD of angles of about 0.3 on a copy of `unet`, as the training writes it."""
    other = add_random_adapter(copy.deepcopy(unet), "subject", seed=seed)
    save_lorad_adapter(other, folder, "subject", base_model_name_or_path="somewhere")
    return other


def call(pipe, **kwargs):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe("red blue", latents=latents, output_type="latent", **kwargs).images


def test_angles_of_subject_and_student_add(components, adapter_folder, base_folder, tmp_path):
    subject = saved_subject(components["unet"], tmp_path)
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    student, plain = pipe.get_active_adapters(), call(pipe)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    alone = pipe.unet.get_submodule(layer).get_angles(student)
    dreambooth.load_subject(pipe, tmp_path, 0.5)
    assert pipe.get_active_adapters() == [*student, "subject"]
    stacked = call(pipe)
    assert not torch.allclose(stacked, plain, atol=1e-2)

    one, other = (m.get_submodule(layer) for m in (pipe.unet, subject))
    theta = alone + 0.5 * other.get_angles(["subject"])
    assert torch.allclose(one.get_angles([*student, "subject"]), theta, atol=1e-6)

    pipe.fuse_lorad()
    assert torch.allclose(call(pipe), stacked, atol=2e-4)
    pipe.unfuse_lorad()
    pipe.set_adapters([*student, "subject"], [1.0, 0.0])
    assert torch.allclose(call(pipe), plain, atol=1e-4)


def test_a_subject_on_the_multi_step_model(components, base_folder, tmp_path):
    saved_subject(components["unet"], tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(base_folder)
    before = call(pipe, num_inference_steps=2, guidance_scale=1.0)
    dreambooth.load_subject(pipe, tmp_path)
    assert pipe.get_active_adapters() == ["subject"]
    assert not torch.allclose(call(pipe, num_inference_steps=2, guidance_scale=1.0), before, atol=1e-2)


def test_a_lora_subject_over_the_student(components, adapter_folder, tmp_path):
    unet = components["unet"]
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), adapter_name="subject")
    state = {k.replace(".subject", ""): v.detach() for k, v in unet.named_parameters() if "lora_" in k}
    StableDiffusionPipeline.save_lora_weights(tmp_path, state)
    pipe = WaDiPipeline.from_pretrained(adapter_folder)
    student, plain = pipe.get_active_adapters(), call(pipe)
    dreambooth.load_subject(pipe, tmp_path, adapter_name="dog")
    assert set(pipe.get_active_adapters()) == {*student, "dog"}
    assert not torch.allclose(call(pipe), plain, atol=1e-2)
    pipe.set_adapters([*student, "dog"], [1.0, 0.0])
    assert torch.allclose(call(pipe), plain, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_stacked_subject_with_a_controlnet(components, adapter_folder, tmp_path, fused):
    """DreamBooth and ControlNet at one step: the residuals act, on fused and unfused angles alike."""
    saved_subject(components["unet"], tmp_path)
    wadi = WaDiPipeline.from_pretrained(adapter_folder)
    dreambooth.load_subject(wadi, tmp_path)
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 8, 8, 8)).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)  # from_unet starts with zeros
    pipe = StableDiffusionControlNetPipeline.from_pipe(wadi, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    if fused:
        wadi.fuse_lorad()
    settings = {"image": gradient_image(64, 64), "num_inference_steps": 1, "guidance_scale": 1.0}
    images = {scale: call(pipe, **settings, controlnet_conditioning_scale=scale) for scale in (0.0, 1.0)}
    assert torch.allclose(images[0.0], call(wadi), atol=1e-5)
    assert not torch.allclose(images[1.0], images[0.0], atol=1e-2)
    if fused:
        wadi.unfuse_lorad()
        assert torch.allclose(call(pipe, **settings), images[1.0], atol=1e-3)
    wadi.disable_lora()
    assert not torch.allclose(call(pipe, **settings), images[1.0], atol=1e-2)


# --- learning (D4) ---


def test_saved_merged_and_unmerged_adapters_agree_and_training_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(), DDIMScheduler(beta_schedule="scaled_linear")
    base, latents, text = copy.deepcopy(unet), torch.randn(4, 4, 8, 8), torch.randn(1, 24, 16).expand(4, -1, -1)
    unet.requires_grad_(False)
    unet.add_adapter(LoRaDConfig(r=8, target_modules=TARGETS), adapter_name="subject")
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=0.05)

    def loss(seed):
        g = torch.Generator().manual_seed(seed)
        noise, t = torch.randn(latents.shape, generator=g), torch.randint(0, 1000, (4,), generator=g)
        prediction = unet(scheduler.add_noise(latents, noise, t), t, text).sample
        return dreambooth_loss(prediction, dreambooth.noise_target(scheduler, latents, noise, t))[0]

    with torch.no_grad():
        before = sum(loss(seed) for seed in range(1000, 1008))
    for seed in range(60):
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
    with torch.no_grad():
        assert sum(loss(seed) for seed in range(1000, 1008)) < 0.98 * before
        x = torch.randn(2, 4, 8, 8)
        trained = unet(x, 500, text[:2]).sample
        save_lorad_adapter(unet, tmp_path, "subject")
        load_lorad_adapter(base, tmp_path, "subject")
        assert torch.allclose(base(x, 500, text[:2]).sample, trained, atol=1e-6)
        base.fuse_lora()
        assert torch.allclose(base(x, 500, text[:2]).sample, trained, atol=1e-5)
        base.unfuse_lora()
        assert torch.allclose(base(x, 500, text[:2]).sample, trained, atol=1e-5)
