"""`optimize()`: every fast path draws what the plain pipeline draws, and nothing that a stock user sees changes."""

import copy
import filecmp
import gc
import weakref

import numpy as np
import pytest
import torch
from backbones import fill_adapter
from conftest import add_random_adapter
from diffusers import AutoencoderTiny, ControlNetModel, DiffusionPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.utils import logging
from peft import LoraConfig
from safetensors.torch import load_file
from test_offload import OFFLOADS
from tiny_pixart import pixart_pipeline

from diffusers_wadi import (
    LoRaDConfig,
    WaDiControlNetPipeline,
    WaDiPipeline,
    WaDiPixArtPipeline,
    export_single_file,
    load_lorad_adapter,
    lorad_target_modules,
    one_step_scheduler,
    save_lorad_adapter,
)
from diffusers_wadi.pipelines import _fast_copies, _one_step
from diffusers_wadi.pipelines._fast_images import device_without_hooks

HALVES = (torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("without_bars")


@pytest.fixture
def warnings_of_compiling(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("diffusers_wadi.pipelines._optimization_steps"), "warning", said.append)
    return said


@pytest.fixture
def pipe(components):
    """With an active adapter."""
    add_random_adapter(components["unet"])
    return WaDiPipeline(**components)


def controlled(components):
    net = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8)).eval()
    for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    add_random_adapter(components["unet"])
    return WaDiControlNetPipeline(**components, controlnet=net)


def pixart():
    parts = pixart_pipeline().components
    parts["scheduler"] = one_step_scheduler(parts["scheduler"], 0.0047)
    transformer = parts["transformer"]
    pipe = WaDiPixArtPipeline(**parts)
    from diffusers_wadi._adapter_ops import add_adapter

    targets = lorad_target_modules(transformer, role="student")
    add_adapter(transformer, LoRaDConfig(r=2, target_modules=targets), "student")
    fill_adapter(transformer, "student")
    return pipe


KINDS = {
    "sd": lambda components: WaDiPipeline(**components | {"unet": add_random_adapter(components["unet"])}),
    "controlnet": controlled,
    "pixart": lambda components: pixart(),
}


def tiny_decoder(seed=5):
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()


def draw(pipe, prompt="red blue", seed=0, output_type="np", **options):
    if isinstance(pipe, WaDiControlNetPipeline):
        options.setdefault("image", torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64))
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type=output_type, **options).images


def cosine(one, other):
    one, other = (np.asarray(image, dtype=np.float64).ravel() for image in (one, other))
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


# --------------------------------------------------------------------------------------------------- what it draws

FAST = {
    "defaults": {},
    "qkv": {"fuse_qkv": True},
    "not fused": {"fuse": False, "channels_last": False},
    "float16": {"dtype": torch.float16},
    "bfloat16, qkv": {"dtype": torch.bfloat16, "fuse_qkv": True},
    "on the CPU": {"keep_original": "cpu"},
    "given up": {"keep_original": False},
}


ALL = {"fuse_qkv": True, "dtype": torch.float16}
CASES = [("sd", name) for name in FAST] + [("controlnet", "all"), ("pixart", "all"), ("pixart", "not fused")]


@pytest.mark.parametrize("kind, name", CASES, ids=[" ".join(case) for case in CASES])
def test_every_fast_path_draws_the_same_and_is_undone_to_the_bit(components, kind, name, warnings_of_compiling):
    pipe, settings = KINDS[kind](components), FAST.get(name, ALL)
    latents, images = draw(pipe, output_type="latent"), draw(pipe)
    assert pipe.optimize(**settings) is pipe and pipe.optimization is not None
    for _ in range(2):  # the second time from the cache of prompts
        least = 0.99 if settings.get("dtype") == torch.bfloat16 else 0.999
        assert cosine(draw(pipe, output_type="latent").float(), latents) > least
        assert cosine(draw(pipe), images) > 0.999
    assert pipe.optimization.done.keys() >= settings.keys() - {"keep_original", "fuse", "channels_last"}
    assert pipe.is_one_step and not warnings_of_compiling
    if settings.get("keep_original") is not False:
        pipe.unoptimize()
        assert pipe.optimization is None and np.array_equal(draw(pipe), images)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "full"])
def test_compiled_for_real(pipe, how, warnings_of_compiling):
    images = draw(pipe)
    pipe.optimize(compile=how)
    assert pipe.optimization.done.get("compile") == how, pipe.optimization
    np.testing.assert_allclose(draw(pipe), images, atol=1e-4)


def test_full_compilation_takes_denoiser_and_decoder(pipe, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    pipe.optimize(compile=True, compile_options={"mode": "reduce-overhead"})
    assert [part for part, _ in compiled] == [pipe.unet, pipe.vae.decoder]
    assert all(options == {"mode": "reduce-overhead"} for _, options in compiled)
    assert pipe.optimization.done["compile"] == "full"


@pytest.mark.parametrize("make", [controlled, lambda components: pixart()], ids=["controlnet", "pixart"])
def test_regional_compilation_takes_the_transformer_blocks(components, monkeypatch, make):
    compiled, pipe = [], make(components)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    pipe.optimize(compile="regional")
    denoiser = getattr(pipe, pipe.lorad_component)
    assert compiled and {type(part).__name__ for part in compiled} == {"BasicTransformerBlock"}
    assert compiled == [part for part in denoiser.modules() if type(part).__name__ == "BasicTransformerBlock"]


def test_where_compiling_fails_it_draws_without(pipe, warnings_of_compiling, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    def compile(module, **options):
        module._compiled_call_impl = broken

    images = draw(pipe)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    pipe.optimize(compile="full")
    assert "no compiler here" in pipe.optimization.left_out["compile"] and len(warnings_of_compiling) == 1
    np.testing.assert_allclose(draw(pipe), images, atol=1e-4)


def test_what_is_drawn_with_holds_no_adapted_layer_and_shares_what_does_not_change(pipe):
    unet, vae = pipe.unet, pipe.vae
    pipe.optimize(channels_last=False)
    assert pipe.unet is not unet and not any("lorad" in name for name, _ in pipe.unet.named_modules())
    own = {p.data_ptr() for p in unet.parameters()}
    new = {n for n, p in pipe.unet.named_parameters() if p.data_ptr() not in own}
    assert new and all(any(t in n for t in ("to_q", "to_k", "to_v", "to_out", "time_emb_proj")) for n in new)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(vae.parameters(), pipe.vae.parameters()))


def test_joined_projections_take_no_further_memory(pipe):
    pipe.optimize(fuse_qkv=True)
    attentions = [module for module in pipe.unet.modules() if isinstance(module, Attention)]
    assert attentions and all(isinstance(a.processor, FusedAttnProcessor2_0) for a in attentions)
    for attention in attentions:
        joined = attention.to_kv if attention.is_cross_attention else attention.to_qkv
        assert attention.to_v.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()


def test_nothing_is_done_twice_and_settings_do_not_add_up(pipe):
    unet = pipe.unet
    pipe.optimize(fuse_qkv=True, dtype=torch.float16)
    assert pipe.dtype == torch.float16
    for _ in range(2):
        pipe.optimize()
        assert pipe.unet.dtype == torch.float32 and not hasattr(pipe.unet.down_blocks[1].attentions[0], "to_qkv")
        assert pipe._original("unet") is unet
    pipe.unoptimize()
    assert pipe.unet is unet and pipe.unoptimize() is pipe


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"compile": "faster"}, "regional"),
        ({"keep_original": "disk"}, "expected True, False or 'cpu'"),
        ({"prompt_cache": -1}, "megabytes"),
    ],
)
def test_unknown_settings_are_refused_before_work(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.optimize(**settings)
    assert pipe.optimization is None


def test_the_model_without_adapters_and_the_teacher_are_optimized_too(pipe):
    pipe.disable_lora()
    off = draw(pipe)
    pipe.optimize()
    assert not pipe.is_one_step and cosine(draw(pipe), off) > 0.99999
    pipe.unoptimize().unload_lorad_weights()
    pipe.optimize()
    assert pipe.optimization.left_out == {"fuse": "there are no adapters"} and cosine(draw(pipe), off) > 0.99999


def test_what_transformers_keeps_in_float32_stays_so(components):
    pipe = pixart()
    pipe.text_encoder._keep_in_fp32_modules = ["wo"]  # as of a T5 that was loaded in float16
    pipe.optimize(dtype=torch.float16)
    dtypes = {n.split(".")[-2]: p.dtype for n, p in pipe.text_encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32 and dtypes["wi"] == torch.float16
    assert np.isfinite(draw(pipe)).all()


# ----------------------------------------------------------------------------------------------------------- decoders


def test_another_decoder(pipe, tmp_path, monkeypatch):
    latents, images, vae = draw(pipe, output_type="latent"), draw(pipe), pipe.vae
    tiny = tiny_decoder()
    with torch.no_grad():  # its own scaling factor is 1
        expected = (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    tiny.save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(_fast_copies.TINY_VAES, "taesd", str(tmp_path / "tiny"))
    for given in (tiny, str(tmp_path / "tiny"), "taesd"):
        pipe.optimize(vae=given)
        np.testing.assert_allclose(draw(pipe), expected, atol=1e-4)
    pipe.optimize(vae=tiny, dtype=torch.float16)
    assert tiny.dtype == torch.float32 and pipe.vae.dtype == torch.float16
    pipe.unoptimize()
    assert pipe.vae is vae and np.array_equal(draw(pipe), images)


def test_a_decoder_of_other_latents_is_refused_and_nothing_else_loaded(pipe):
    other = AutoencoderTiny(latent_channels=16, encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4,
                            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)  # fmt: skip
    with pytest.raises(ValueError, match="16 latent channels and the pipeline's latents have 4; .*taesd"):
        pipe.optimize(vae=other)
    with pytest.raises(TypeError, match="Linear"):
        pipe.optimize(vae=torch.nn.Linear(1, 1))
    assert pipe.optimization is None


# -------------------------------------------------------------------------------------------------- files and adapters


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_not_optimized(components, kind, tmp_path):
    pipe = KINDS[kind](components)
    pipe.save_pretrained(tmp_path / "before")
    pipe.save_lorad_weights(tmp_path / "before" / "adapter")
    pipe.optimize(fuse_qkv=True, dtype=torch.float16, vae=tiny_decoder())
    pipe.save_pretrained(tmp_path / "after")
    pipe.save_lorad_weights(tmp_path / "after" / "adapter")
    names = files_of(tmp_path / "before")
    assert names == files_of(tmp_path / "after") and len(names) > 8
    assert filecmp.cmpfiles(tmp_path / "before", tmp_path / "after", names, shallow=False)[0] == names
    assert pipe.unet.dtype == torch.float16 if kind != "pixart" else pipe.transformer.dtype == torch.float16


def test_one_file_is_not_optimized(pipe, tmp_path):
    export_single_file(pipe, tmp_path / "before.safetensors")
    pipe.optimize(fuse_qkv=True, dtype=torch.float16, vae=tiny_decoder())
    export_single_file(pipe, tmp_path / "after.safetensors")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


STAGES = {
    "half": lambda pipe, b: pipe.set_adapters("student", 0.5),
    "two loaded": lambda pipe, b: pipe.load_lorad_weights(b, adapter_name="b"),
    "both": lambda pipe, b: pipe.set_adapters(["student", "b"], [1.0, 0.5]),
    "fused": lambda pipe, b: pipe.fuse_lorad(lorad_scale=0.7),
    "unfused": lambda pipe, b: pipe.unfuse_lorad(),
    "off": lambda pipe, b: pipe.disable_lora(),
    "on": lambda pipe, b: pipe.enable_lora(),
    "one deleted": lambda pipe, b: pipe.delete_adapters("student"),
    "unloaded": lambda pipe, b: pipe.unload_lorad_weights(),
}


def test_adapter_operations_go_on(components, tmp_path):
    unet = add_random_adapter(copy.deepcopy(components["unet"]), "b", r=2, seed=7)
    save_lorad_adapter(unet, tmp_path / "b", "b")
    add_random_adapter(components["unet"])
    plain, pipe = WaDiPipeline(**copy.deepcopy(components)), WaDiPipeline(**components)
    pipe.optimize(fuse_qkv=True)
    seen = [draw(plain)]
    for name, stage in STAGES.items():
        for each in (plain, pipe):
            stage(each, tmp_path / "b")
        seen.append(draw(plain))
        np.testing.assert_allclose(draw(pipe), seen[-1], atol=2e-4, err_msg=name)
        assert pipe.get_list_adapters() == plain.get_list_adapters(), name
        assert pipe.get_active_adapters() == plain.get_active_adapters(), name
        assert pipe.fused_loras == plain.fused_loras and pipe.is_one_step == plain.is_one_step, name
        assert pipe.optimization is not None
    assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(seen[1:], seen[2:]) if one is not seen[4])


def test_lora_beside_it(pipe, tmp_path):
    style = copy.deepcopy(pipe.unet)
    style.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    state = {f"unet.{k}": v for k, v in _lora_state(style).items()}
    plain = WaDiPipeline.from_pipe(pipe, unet=copy.deepcopy(pipe.unet))
    pipe.optimize()
    for each in (plain, pipe):
        each.load_lora_weights(dict(state), adapter_name="style")
        each.set_adapters(["student", "style"])
    np.testing.assert_allclose(draw(pipe), draw(plain), atol=2e-4)


def _lora_state(unet):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(unet, adapter_name="style")


def test_what_would_be_lost_is_refused_with_a_remedy(pipe, adapter_folder, tmp_path):
    pipe.optimize()
    for lost in (
        lambda: pipe.unet.set_adapters("student", 0.5),
        lambda: pipe.unet.add_adapter(LoRaDConfig(r=1, target_modules=["to_q"]), "new"),
        lambda: load_lorad_adapter(pipe.unet, adapter_folder, "new"),
        lambda: pipe.unet.save_pretrained(tmp_path / "unet"),
    ):
        with pytest.raises(ValueError, match=r"optimized WaDiPipeline.*unoptimize"):
            lost()
    with pytest.raises(ValueError, match="set_adapters.*0.5"):
        draw(pipe, cross_attention_kwargs={"scale": 0.5})
    draw(pipe, cross_attention_kwargs={"scale": 1.0})


def test_given_up_models_are_gone_and_missed_with_a_remedy(pipe, tmp_path):
    layer = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    pipe.optimize(keep_original=False)
    gc.collect()
    assert not [
        referrer for referrer in gc.get_referrers(layer) if isinstance(referrer, dict) and "base_layer" in referrer
    ]
    for lost in (pipe.unoptimize, pipe.optimize, pipe.disable_lora, lambda: pipe.save_pretrained(tmp_path / "no")):
        with pytest.raises(ValueError, match="keep_original=False.*load the pipeline again"):
            lost()
    assert pipe.get_active_adapters() == [] and pipe.is_one_step
    pipe.to("cpu")
    draw(pipe)


def test_a_failing_change_leaves_it_optimized(pipe):
    images = draw(pipe.optimize())
    with pytest.raises(ValueError, match="nobody"):
        pipe.set_adapters("nobody")
    assert pipe.optimization is not None and np.array_equal(draw(pipe), images)


def test_a_pipeline_made_of_it_gets_the_models_themselves(pipe):
    unet, plain = pipe.unet, draw(pipe)
    pipe.optimize(dtype=torch.float16, vae=tiny_decoder())
    other = WaDiPipeline.from_pipe(pipe)
    assert other.unet is unet and other.dtype == torch.float32 and np.array_equal(draw(other), plain)
    other.set_adapters("student", 0.5)
    assert other.optimization is None and not np.array_equal(draw(other), plain)
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert np.isfinite(draw(stock, num_inference_steps=1, guidance_scale=0)).all()


def test_a_model_put_in_by_the_user_stays(pipe):
    pipe.optimize()
    pipe.vae = other = copy.deepcopy(pipe._original("vae"))
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.5)
    images = draw(pipe)
    pipe.set_adapters("student", 1.0)
    np.testing.assert_allclose(draw(pipe), images, atol=1e-4)
    assert pipe.unoptimize().vae is other


def test_asking_for_adapters_does_not_disturb_who_draws(pipe):
    pipe.optimize(dtype=torch.float16)
    seen = []

    def ask(pipe, step, timestep, kwargs):
        seen.append((pipe.unet, pipe.is_one_step, pipe.get_active_adapters(), pipe.unet))
        return {}

    draw(pipe, callback_on_step_end=ask)
    ((before, one_step, names, after),) = seen
    assert before is after is pipe.unet and one_step and names == ["student"] and pipe.dtype == torch.float16


@pytest.mark.parametrize("kind", ["model", "leaves on disk"])
def test_offloaded_before(pipe, kind, tmp_path):
    images = draw(pipe)

    def close(pipe, name):
        for _ in range(2):  # the second call needs what the first has put away
            np.testing.assert_allclose(draw(pipe), images, atol=2e-4, err_msg=f"{kind}: {name}")

    OFFLOADS[kind](pipe, tmp_path / "groups")
    pipe.optimize(fuse_qkv=True, compile="regional")
    assert "offloaded" in pipe.optimization.left_out["compile"]
    close(pipe, "optimized")
    assert hasattr(pipe.unet, "_hf_hook") or any(hasattr(m, "_diffusers_hook") for m in pipe.unet.modules())
    pipe.set_adapters("student", 1.0)
    close(pipe, "changed")
    if kind != "model":
        pipe.save_pretrained(tmp_path / "saved")
        close(WaDiPipeline.from_pretrained(tmp_path / "saved"), "saved")
    close(pipe.unoptimize(), "undone")
    assert hasattr(pipe.unet, "_hf_hook") or any(hasattr(m, "_diffusers_hook") for m in pipe.unet.modules())


def all_groups(pipe, folder):
    where = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(folder)}
    pipe.enable_group_offload(**where, offload_type="leaf_level")


LATER = {"sequential": OFFLOADS["sequential"], "all groups on disk": all_groups}


@pytest.mark.parametrize("offload", LATER.values(), ids=LATER)
def test_offload_of_an_optimized_pipeline(pipe, offload, tmp_path):
    images = draw(pipe)
    pipe.optimize(fuse_qkv=True)
    offload(pipe, tmp_path / "groups")
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe), images, atol=2e-4)
    pipe.disable_lora()
    pipe.enable_lora()
    np.testing.assert_allclose(draw(pipe), images, atol=2e-4)
    np.testing.assert_allclose(draw(pipe.unoptimize()), images, atol=1e-4)


# ------------------------------------------------------------------------------------------------- prompts known before


@pytest.fixture
def encoded(pipe, monkeypatch):
    """Batches that reach the text encoder, of an optimized pipeline."""
    seen, forward = [], type(pipe.text_encoder).forward

    def watched(self, input_ids, *args, **kwargs):
        seen.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(pipe.text_encoder), "forward", watched)
    pipe.optimize()
    return seen


def test_known_prompts_are_not_encoded_and_give_the_same_bits(pipe, encoded):
    calls = [
        ("red", {}),
        (["red", "blue"], {}),
        (["blue", "red"], {}),
        (["red"], {}),
        ("red", {"num_images_per_prompt": 2}),
        ("red", {"guidance_scale": 3.0}),
        ("red", {"guidance_scale": 3.0, "negative_prompt": "blue"}),
    ]
    first = [draw(pipe, prompt, **options) for prompt, options in calls]
    number = len(encoded)
    assert number == len(calls) + 2  # guidance encodes twice
    again = [draw(pipe, prompt, **options) for prompt, options in calls]
    assert len(encoded) == number and all(np.array_equal(a, b) for a, b in zip(first, again))
    pipe.optimize(prompt_cache=0)
    plain = [draw(pipe, prompt, **options) for prompt, options in calls]
    assert all(np.array_equal(a, b) for a, b in zip(first, plain)) and len(encoded) == 2 * number


def _write(pipe):
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.bias.add_(1.0)


def _exchange(pipe):
    pipe.text_encoder.final_layer_norm.bias = torch.nn.Parameter(torch.ones(16))


def _other_encoder(pipe):
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    _write(pipe)


def _adapter_of_text(pipe):
    pipe.text_encoder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "style"
    )


CHANGES = {
    "written to": _write,
    "parameter exchanged": _exchange,
    "another one": _other_encoder,
    "adapter": _adapter_of_text,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_text_encoder_forgets_prompts(pipe, encoded, change):
    before = draw(pipe)
    change(pipe)
    after = draw(pipe)
    assert len(encoded) == 2 and not np.array_equal(before, after)
    pipe.optimize(prompt_cache=0)
    assert np.array_equal(draw(pipe), after)


def test_adapters_of_the_text_encoder_that_are_scaled_or_switched(pipe, encoded):
    _adapter_of_text(pipe)
    strong = draw(pipe)
    pipe.text_encoder.set_adapter("style")
    for layer in pipe.text_encoder.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("style", 0.1)
    weak = draw(pipe)
    pipe.text_encoder.disable_adapters()
    off = draw(pipe)
    assert len(encoded) == 3 and not np.array_equal(strong, weak) and not np.array_equal(weak, off)


def test_new_tokens_forget_prompts(pipe, encoded):
    before = draw(pipe, "red <R>")
    pipe.load_textual_inversion({"<R>": torch.linspace(-1, 1, 16)})
    assert not np.array_equal(draw(pipe, "red <R>"), before) and pipe.optimization is not None


def test_a_callback_may_write_into_what_it_is_given(pipe, encoded):
    def spoil(pipe, step, timestep, kwargs):
        kwargs["prompt_embeds"].zero_()
        return {}

    before = draw(pipe)
    for _ in range(2):
        draw(pipe, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert np.array_equal(draw(pipe), before) and len(encoded) == 1


def test_the_cache_is_bounded_and_forgets_the_oldest(pipe, encoded):
    one = 24 * 16 * 4
    pipe.optimize(prompt_cache=2.5 * one / 2**20)
    cache = pipe._optimization.cache
    for prompt in ("r", "b", "r", "g"):  # b is the one not used for longest
        draw(pipe, prompt)
    assert cache.bytes == 2 * one and (cache.hits, cache.misses) == (1, 3)
    draw(pipe, "r")
    assert cache.hits == 2
    draw(pipe, "b")
    assert cache.misses == 4 and cache.bytes == 2 * one
    draw(pipe, ["r", "b", "g"])  # larger than all of it
    assert cache.bytes == 2 * one
    pipe.clear_prompt_cache()
    assert cache.bytes == 0
    draw(pipe, "r")
    assert cache.misses == 6


def test_training_and_given_embeddings_do_not_use_the_cache(pipe, encoded):
    text = pipe.encode_prompt("red", "cpu", 1, False)[0]
    assert text.requires_grad  # gradients are on, here
    draw(pipe, None, prompt_embeds=text.detach())
    assert pipe._optimization.cache.misses == 0


# ---------------------------------------------------------------------------------------- what one step does not need


def test_images_are_those_of_diffusers(pipe):
    for dtype in (torch.float32, *HALVES):
        pipe.optimize(dtype=dtype)
        processor = pipe.image_processor
        decoded = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        for shown in (None, [True, True], [True, False]):
            stock = type(processor).postprocess(processor, decoded, "pil", shown)
            ours = processor.postprocess(decoded, output_type="pil", do_denormalize=shown)
            assert all(np.array_equal(a, b) for a, b in zip(stock, ours)) and len(ours) == 2
    pipe.unoptimize()
    assert "postprocess" not in vars(pipe.image_processor)


def test_a_single_step_shows_no_bar(pipe, monkeypatch):
    shown = []
    monkeypatch.setattr(StableDiffusionPipeline, "progress_bar", lambda self, *args: shown.append(args) or _Bar())
    draw(pipe.optimize())
    assert shown == []
    pipe.disable_lora()
    draw(pipe, num_inference_steps=2)
    draw(pipe.unoptimize())
    assert shown == [(None, 2), (None, 1)]


class _Bar:
    def __enter__(self):
        return self

    def __exit__(self, *details):
        pass

    def update(self):
        pass


def test_the_step_does_not_wait_for_the_device(pipe):
    """A timestep on the meta device stands for one whose value the CPU would have to wait for."""
    eps, z = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(1)
    expected = pipe.scheduler.step(eps, torch.tensor(999), z, return_dict=False)[0]
    step = _one_step._own_step(pipe.scheduler.step, False, 0, _one_step._last_timestep(pipe.scheduler))
    assert torch.equal(step(eps, torch.tensor(999, device="meta"), z)[0], expected)


def test_a_scheduler_is_checked_once_for_as_long_as_it_stays(pipe, monkeypatch):
    calls, check = [], _one_step.check_one_step_scheduler
    monkeypatch.setattr(_one_step, "check_one_step_scheduler", lambda scheduler: calls.append(1) or check(scheduler))
    for _ in range(2):
        draw(pipe)
    assert len(calls) == 1
    pipe.scheduler.register_to_config(timestep_spacing="leading")
    with pytest.raises(ValueError, match="one_step_scheduler"):
        draw(pipe)
    pipe.scheduler = one_step_scheduler(pipe.scheduler)
    draw(pipe)
    pipe.scheduler.alphas_cumprod[-1] = 0.0
    with pytest.raises(ValueError, match="zero terminal SNR"):
        draw(pipe)


def test_the_device_is_found_without_a_search_unless_something_is_offloaded(pipe, tmp_path, monkeypatch):
    models = [pipe.unet, pipe.vae, pipe.text_encoder]
    assert device_without_hooks(models) == torch.device("cpu")
    assert device_without_hooks([*models, torch.nn.Linear(1, 1, device="meta")]) is None
    pipe.scorer = torch.nn.Linear(1, 1, device="meta")  # of the user, and no component
    with monkeypatch.context() as without:
        without.setattr(DiffusionPipeline, "_execution_device", None)
        assert pipe._execution_device == torch.device("cpu")
    OFFLOADS["leaves"](pipe, tmp_path)
    assert device_without_hooks(models) is None and pipe._execution_device == torch.device("cpu")


class Styled(WaDiPipeline):
    style = ""

    def encode_prompt(self, prompt, *args, **kwargs):
        return super().encode_prompt(prompt + self.style, *args, **kwargs)


def test_what_a_subclass_does_to_prompts_is_not_cached(pipe, encoded):
    mine = Styled(**pipe.unoptimize().components).optimize()
    plain = draw(mine, "red")
    mine.style = " blue"
    assert not np.array_equal(draw(mine, "red"), plain)
    mine.style = ""
    count = len(encoded)
    assert np.array_equal(draw(mine, "red"), plain) and len(encoded) == count


def test_copies_are_freed_without_the_collector(pipe):
    gc.collect()
    gc.disable()
    try:
        gone = []
        pipe.optimize()
        for strength in (0.5, 0.7):
            gone += [weakref.ref(pipe.unet), weakref.ref(pipe.vae)]
            pipe.set_adapters(pipe.get_active_adapters(), strength)
        gone += [weakref.ref(pipe.unet), weakref.ref(pipe.vae)]
        pipe.unoptimize()
        assert not any(reference() for reference in gone)
    finally:
        gc.enable()


class Marking(VaeImageProcessor):
    def postprocess(self, *args, **kwargs):
        images = super().postprocess(*args, **kwargs)
        for image in images:
            image.info["mark"] = "mine"
        return images


def test_another_image_processor_does_what_it_did(pipe):
    usual = pipe.image_processor
    pipe.image_processor = Marking(vae_scale_factor=pipe.vae_scale_factor)
    assert draw(pipe.optimize(), output_type="pil")[0].info == {"mark": "mine"}
    pipe.unoptimize()
    pipe.image_processor = usual
    usual.postprocess = own = lambda *args, **kwargs: "mine"
    assert draw(pipe.optimize(), output_type="pil") == "mine"
    assert pipe.unoptimize().image_processor.postprocess is own


def test_tiling_and_slicing_are_carried_over(pipe):
    pipe.optimize()
    pipe.vae.enable_tiling()
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    assert pipe.unoptimize().vae.use_tiling


def test_another_dtype_is_drawn_in(pipe):
    pipe.optimize(dtype=torch.bfloat16)
    pipe.to(torch.float16)
    assert pipe.dtype == torch.float16 == pipe.unoptimize().dtype


@pytest.mark.parametrize(
    "change", [lambda pipe: setattr(pipe.tokenizer, "pad_token", "red"), lambda pipe: hooked(pipe)]
)
def test_another_padding_or_a_hook_is_noticed(pipe, encoded, change):
    pipe.optimize()
    draw(pipe)
    count = len(encoded)
    change(pipe)
    draw(pipe)
    assert len(encoded) > count


def hooked(pipe):
    pipe.text_encoder.register_forward_hook(lambda *args: None)


def test_a_scale_for_one_call_is_taken_by_another_denoiser(pipe):
    pipe.optimize()
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(ValueError, match="set_adapters"):
        draw(pipe, **scaled)
    pipe.unet = copy.deepcopy(pipe._original("unet"))
    assert not np.array_equal(draw(pipe, **scaled), draw(pipe))


def test_a_decoder_that_was_given_is_given_up_with_the_rest(pipe):
    decoder = tiny_decoder()
    gone = weakref.ref(decoder)
    pipe.optimize(vae=decoder, keep_original=False)
    del decoder
    gc.collect()
    assert gone() is None and draw(pipe).shape[0] == 1
