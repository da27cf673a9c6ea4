"""LoRaDAttnProcessor: the tuner's numbers without the tuner, in every kind of attention that the stock processor serves."""

import copy
import pickle

import pytest
import torch
from backbones import fill_adapter, pixart_inputs, tiny_pixart, tiny_unet, unet_inputs
from conftest import add_random_adapter
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.utils import logging
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from diffusers_wadi import (
    LoRaDAttnProcessor,
    LoRaDConfig,
    WaDiPipeline,
    attn_processors_from_lorad,
    fuse_lorad_attn_processors,
    load_lorad_adapter,
    lorad_state_dict_from_attn_processors,
    save_lorad_adapter,
)
from diffusers_wadi.lorad.attention_processor import PROJECTIONS

TARGETS = list(PROJECTIONS)

# Arguments of Attention, of its call, and the stock processor to compare with.
KINDS = {
    "self": ({"bias": True}, {}, AttnProcessor2_0),
    "cross": ({"cross_attention_dim": 6}, {"context": 5}, AttnProcessor2_0),
    "wide": ({"dim_head": 8, "cross_attention_dim": 6}, {"context": 5}, AttnProcessor2_0),
    "other output": ({"out_dim": 16}, {}, AttnProcessor2_0),
    "mask": ({"cross_attention_dim": 6}, {"context": 5, "mask": (2, 1, 5)}, AttnProcessor2_0),
    "mask per query": ({}, {"mask": (2, 16, 16)}, AttnProcessor2_0),
    "mask per head": ({"cross_attention_dim": 6}, {"context": 5, "mask": (4, 16, 5)}, AttnProcessor2_0),
    "norms": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7, "eps": 1e-3},
        {},
        AttnProcessor2_0,
    ),
    "image": (
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7, "bias": True},
        {"image": True},
        AttnProcessor2_0,
    ),
    "spatial norm": (
        {"query_dim": 32, "norm_num_groups": 4, "spatial_norm_dim": 3, "residual_connection": True},
        {"width": 32, "image": True, "temb": (2, 3, 2, 2)},
        AttnProcessor2_0,
    ),
    "context norm": (
        {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
        {"context": 5},
        AttnProcessor2_0,
    ),
    "context group norm": (
        {"cross_attention_dim": 6, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
        {"context": 5},
        AttnProcessor2_0,
    ),
    "query norm": ({"qk_norm": "rms_norm"}, {}, AttnProcessor2_0),
    "query layer norm": ({"qk_norm": "layer_norm", "cross_attention_dim": 6}, {"context": 5}, AttnProcessor2_0),
    "unscaled": ({"scale_qk": False}, {}, AttnProcessor),
}


def attention(**options):
    torch.manual_seed(0)
    attn = Attention(**{"query_dim": 8, "heads": 2, "dim_head": 4} | options)
    for parameter in attn.parameters():  # norms and biases that do something
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return attn.eval()


def inputs(width=8, context=None, mask=None, image=False, temb=None):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    given = {"hidden_states": draw(2, width, 4, 4) if image else draw(2, 16, width)}
    if context:
        given["encoder_hidden_states"] = draw(2, context, 6)
    if mask:
        given["attention_mask"] = torch.where(draw(*mask) > 0.5, -10000.0, 0.0)
    if temb:
        given["temb"] = draw(*temb)
    return given


def tuned_and_processed(attn, rank=3, seed=2):
    """The attention under the tuner, and a second one with a processor of the same factors."""
    tuned = copy.deepcopy(attn)
    inject_adapter_in_model(LoRaDConfig(r=rank, target_modules=TARGETS), tuned, "default")
    fill_adapter(tuned, "default", seed)
    attn.set_processor(LoRaDAttnProcessor.from_attention(attn, rank))
    for name, layer in attn.processor.projections.items():
        source = tuned.get_submodule(name)
        layer.A.data.copy_(source.lorad_A["default"])
        layer.B.data.copy_(source.lorad_B["default"])
    return tuned, attn


# ----------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_tuner(kind):
    options, call, stock = KINDS[kind]
    attn, given = attention(**options), inputs(**call)
    attn.set_processor(stock())
    plain = attn(**given)
    tuned, processed = tuned_and_processed(attn)
    given["hidden_states"].requires_grad_()
    expected = tuned(**given)
    (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum().backward()
    gradient, given["hidden_states"].grad = given["hidden_states"].grad, None
    output = processed(**given)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()

    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(given["hidden_states"].grad, gradient, rtol=1e-5, atol=1e-6)
    for name, layer in processed.processor.projections.items():
        source = tuned.get_submodule(name)
        for own, other in ((layer.A, source.lorad_A["default"]), (layer.B, source.lorad_B["default"])):
            assert own.grad.abs().max() > 0, name
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_a_new_processor_changes_nothing():
    attn, given = attention(cross_attention_dim=6), inputs(context=5)
    plain = attn(**given)
    attn.set_processor(LoRaDAttnProcessor(8, 6, rank=3))
    assert torch.equal(attn(**given), plain)
    attn.set_processor(LoRaDAttnProcessor(8, 6, rank=3, init_lorad_weights="xavier"))
    assert (attn(**given) - plain).abs().max() > 0.01


def test_scale_is_a_factor_on_the_angle():
    tuned, processed = tuned_and_processed(attention())
    given = inputs()
    plain = AttnProcessor2_0()(processed, **given)
    for name in PROJECTIONS:
        tuned.get_submodule(name).set_scale("default", 0.5)
    expected = tuned(**given)
    processed.processor.scale = 0.5
    assert torch.equal(processed(**given), expected)
    processed.processor.scale = 1.0
    assert torch.equal(processed(**given, scale=0.5), expected)
    assert torch.equal(processed(**given, scale=0.0), plain)
    assert (processed(**given) - expected).abs().max() > 1e-3


def test_only_the_named_projections_are_turned():
    attn = attention(cross_attention_dim=6)
    attn.set_processor(LoRaDAttnProcessor.from_attention(attn, {"to_k": 2, "to_v": 3}))
    assert list(attn.processor.projections) == ["to_k", "to_v"]
    assert [tuple(p.shape) for p in attn.processor.parameters()] == [(8, 2), (2, 3), (8, 3), (3, 3)]
    assert attn(**inputs(context=5)).shape == (2, 16, 8)


def test_dropout_acts_in_training():
    _, processed = tuned_and_processed(attention(dropout=0.5))
    given = inputs()
    assert torch.equal(processed(**given), processed(**given))
    processed.train()
    assert not torch.equal(processed(**given), processed(**given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_stay_float32_in_a_half_precision_model(dtype):
    tuned, processed = tuned_and_processed(attention())
    given = {"hidden_states": inputs()["hidden_states"].to(dtype)}
    for name in PROJECTIONS:  # the tuner keeps its factors where its pipeline casts, the module alone does not
        tuned.get_submodule(name).get_base_layer().to(dtype)
    before = {key: value.clone() for key, value in processed.processor.state_dict().items()}
    processed.to(dtype)
    assert processed.to_q.weight.dtype == dtype
    for key, value in processed.processor.state_dict().items():
        assert torch.equal(value, before[key]) and value.dtype == torch.float32
    output = processed(**given)
    assert output.dtype == dtype and torch.equal(output, tuned(**given))
    processed.double()
    assert processed.processor.to_q_lorad.A.dtype == torch.float64


def test_autocast_is_as_in_the_tuner():
    tuned, processed = tuned_and_processed(attention(cross_attention_dim=6))
    with torch.autocast("cpu", torch.bfloat16):
        output = processed(**inputs(context=5))
        assert torch.equal(output, tuned(**inputs(context=5)))


def test_copies_pickles_and_state_dicts():
    _, processed = tuned_and_processed(attention())
    expected = processed(**inputs())
    for twin in (copy.deepcopy(processed), pickle.loads(pickle.dumps(processed))):
        assert torch.equal(twin(**inputs()), expected)
    fresh = LoRaDAttnProcessor(8, rank=3)
    fresh.load_state_dict(processed.processor.state_dict())
    processed.set_processor(fresh)
    assert torch.equal(processed(**inputs()), expected)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LoRaDAttnProcessor(8, rank=2).load_state_dict(fresh.state_dict())


def test_compiles_in_one_graph():
    _, processed = tuned_and_processed(attention(norm_num_groups=4, residual_connection=True))
    compiled = torch.compile(processed, fullgraph=True, backend="aot_eager")
    given = inputs()
    expected = processed(**given)
    output = compiled(**given)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.square().mean().backward()
    assert processed.processor.to_q_lorad.A.grad.abs().max() > 0


def test_a_lora_beside_it_acts_as_under_the_tuner():
    tuned, processed = tuned_and_processed(attention())
    given, outputs = inputs(), []
    alone = processed(**given)
    for attn in (tuned, processed):
        lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        inject_adapter_in_model(lora, attn, "lora")
        generator = torch.Generator().manual_seed(4)
        for name, parameter in attn.named_parameters():
            if "lora_" in name and name.endswith(".weight"):
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        outputs.append(attn(**given))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert (outputs[1] - alone).abs().max() > 0.01
    for name in ("to_q", "to_v"):  # fusing it changes nothing: only the base is turned
        processed.get_submodule(name).merge()
    torch.testing.assert_close(processed(**given), outputs[1], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_odd_features_and_ranks_are_refused():
    with pytest.raises(ValueError, match="`to_k` has 5"):
        LoRaDAttnProcessor(8, 5)
    with pytest.raises(ValueError, match="`to_q` has 7"):
        LoRaDAttnProcessor.from_attention(Attention(7, cross_attention_dim=8, heads=2, dim_head=4))
    with pytest.raises(ValueError, match="at least 1, got 0 for `to_q`"):
        LoRaDAttnProcessor(8, rank=0)
    with pytest.raises(ValueError, match=r"names \['to_x'\]"):
        LoRaDAttnProcessor(8, rank={"to_x": 3})
    only_value = LoRaDAttnProcessor.from_attention(Attention(7, cross_attention_dim=8, heads=2), {"to_v": 2})
    assert list(only_value.projections) == ["to_v"]


def test_an_attention_of_other_sizes_is_refused():
    attn = attention(cross_attention_dim=6)
    attn.set_processor(LoRaDAttnProcessor(8, 10, rank=2))
    with pytest.raises(
        ValueError, match=r"`to_k` has a weight of shape .* = \(8, 6\), this processor is for \(8, 10\)"
    ):
        attn(**inputs(context=5))


def test_attentions_of_another_kind_are_refused():
    added = Attention(8, heads=2, dim_head=4, added_kv_proj_dim=6)
    with pytest.raises(ValueError, match="added_kv_proj_dim=6"):
        LoRaDAttnProcessor.from_attention(added)
    with pytest.raises(ValueError, match="not in a Linear"):
        LoRaDAttnProcessor.from_attention(torch.nn.Linear(8, 8))


def test_tuner_and_processor_do_not_turn_one_layer_twice():
    tuned, processed = tuned_and_processed(attention())
    given, expected = inputs(), processed(**inputs())
    tuned.set_processor(processed.processor)
    with pytest.raises(ValueError, match="`to_q` has the LoRaD adapter .* both are on"):
        tuned(**given)
    for name in PROJECTIONS:
        tuned.get_submodule(name).enable_adapters(False)
    assert torch.equal(tuned(**given), expected)


# ---------------------------------------------------------------------------------------------------------- conversion


def adapted_unet(targets=TARGETS, seed=2, ranks=None):
    unet = tiny_unet()
    unet.add_adapter(LoRaDConfig(r=3, target_modules=targets, rank_pattern=ranks), "student")
    fill_adapter(unet, "student", seed)
    return unet


def test_a_unet_with_processors_is_the_unet_with_the_adapter():
    unet, given = adapted_unet(ranks={"attn2.to_k": 2}), unet_inputs()
    expected = unet(**given).sample
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    processors = attn_processors_from_lorad(unet, "student")
    unet.unload_lora()
    plain = unet(**given).sample
    unet.requires_grad_(False)
    unet.set_attn_processor(processors)
    unet.enable_gradient_checkpointing()
    unet.train()
    output = unet(**given).sample
    output.square().mean().backward()

    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert (plain - expected).abs().max() > 0.01
    assert all(type(processor) is LoRaDAttnProcessor for processor in unet.attn_processors.values())
    assert sorted(unet.attn_processors) == sorted(f"{name}.processor" for name in attention_names(unet))
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 8 * len(unet.attn_processors) and all("_lorad." in name for name in trained)
    for name, parameter in trained.items():
        path = name.replace(".processor.to_out_lorad", ".to_out.0").replace("_lorad.", ".").replace(".processor.", ".")
        path = f"{path[:-1]}lorad_{path[-1]}"
        torch.testing.assert_close(parameter.grad, gradients[f"{path}.student"], rtol=1e-4, atol=1e-7)


def attention_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def test_processors_become_a_tuner_adapter_again(tmp_path):
    unet, given = adapted_unet(), unet_inputs()
    expected = unet(**given).sample
    unet.set_attn_processor(attn_processors_from_lorad(unet, "student"))
    unet.unload_lora()
    save_file(lorad_state_dict_from_attn_processors(unet, component="unet"), tmp_path / "from.safetensors")
    other = tiny_unet()
    load_lorad_adapter(other, tmp_path / "from.safetensors", "again")
    torch.testing.assert_close(other(**given).sample, expected, rtol=0, atol=1e-6)
    load_lorad_adapter(other, lorad_state_dict_from_attn_processors(unet), "bare")
    other.set_adapter("bare")
    torch.testing.assert_close(other(**given).sample, expected, rtol=0, atol=1e-6)
    own = {name: p for name, p in adapted_unet().named_parameters() if "lorad_" in name}
    loaded = {name: p for name, p in other.named_parameters() if name.endswith(".again")}
    assert len(own) == len(loaded)
    for name, parameter in own.items():
        assert torch.equal(parameter, loaded[name.removesuffix("student") + "again"]), name
    # and a file of the tuner's makes processors without the tuner
    other = tiny_unet()
    other.set_attn_processor(attn_processors_from_lorad(other, load_file(tmp_path / "from.safetensors")))
    torch.testing.assert_close(other(**given).sample, expected, rtol=0, atol=1e-6)


def test_scales_are_carried_over():
    unet, given = adapted_unet(), unet_inputs()
    unet.set_adapters(["student"], [0.4])
    expected = unet(**given).sample
    even = attn_processors_from_lorad(unet, "student")
    assert {processor.scale for processor in even.values()} == {0.4}
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.set_scale("student", 2.0)
    uneven = unet(**given).sample
    processors = attn_processors_from_lorad(unet, "student")
    unet.unload_lora()
    unet.set_attn_processor(dict(even))
    torch.testing.assert_close(unet(**given).sample, expected, rtol=0, atol=1e-6)
    unet.set_attn_processor(dict(processors))
    torch.testing.assert_close(unet(**given).sample, uneven, rtol=0, atol=1e-6)
    other = tiny_unet()
    load_lorad_adapter(other, lorad_state_dict_from_attn_processors(even), "student")
    torch.testing.assert_close(other(**given).sample, expected, rtol=0, atol=1e-6)
    assert (uneven - expected).abs().max() > 1e-4


def test_a_transformer_works_as_well():
    model, given = tiny_pixart(), pixart_inputs()
    given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    plain = model(**given).sample
    inject_adapter_in_model(LoRaDConfig(r=3, target_modules=TARGETS), model, "student")
    fill_adapter(model, "student")
    expected = model(**given).sample
    state = {
        f"transformer.{name.removesuffix('.student')}": p for name, p in model.named_parameters() if "lorad_" in name
    }
    model = tiny_pixart()
    model.set_attn_processor(attn_processors_from_lorad(model, state))
    torch.testing.assert_close(model(**given).sample, expected, rtol=0, atol=1e-6)
    assert (plain - expected).abs().max() > 0.01


def test_attentions_without_factors_keep_their_processors():
    unet = adapted_unet(["attn2.to_k", "attn2.to_v"])
    before = unet.attn_processors
    processors = attn_processors_from_lorad(unet, "student")
    for name, processor in processors.items():
        assert (processor is before[name]) == ("attn1" in name)
    assert {tuple(p.projections) for n, p in processors.items() if "attn2" in n} == {("to_k", "to_v")}


def test_an_adapter_that_covers_more_is_refused_or_cut():
    unet = adapted_unet([*TARGETS, "time_emb_proj", "ff.net.2"])
    seen = []
    with pytest.raises(ValueError, match=r"of \d+ layers covers \d+ besides: .*ff.net.2.*strict=False"):
        attn_processors_from_lorad(unet, "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.get_logger("diffusers_wadi.lorad.attention_conversion"), "warning", seen.append)
        processors = attn_processors_from_lorad(unet, "student", strict=False)
    assert "left out" in seen[0] and "ff.net.2" in seen[0]
    carried = lorad_state_dict_from_attn_processors(processors)
    assert len(carried) == 8 * len(processors) and not any("ff.net" in key for key in carried)
    with pytest.raises(ValueError, match="touches none of"):
        attn_processors_from_lorad(adapted_unet(["ff.net.2"]), "student", strict=False)


def test_what_does_not_fit_is_refused_with_the_first_and_the_number():
    unet = adapted_unet()
    processors = attn_processors_from_lorad(unet, "student")
    state = lorad_state_dict_from_attn_processors(processors)
    first = sorted(state)[0]

    def refused(message, changed, model=None):
        with pytest.raises(ValueError, match=message):
            attn_processors_from_lorad(model or tiny_unet(), changed)

    cut = {key: value[:-2] if key.endswith("lorad_A") else value for key, value in state.items()}
    refused(rf"UNet2DConditionModel: {len(state) // 2} of {len(state) // 2} layers differ, first .*\(out, in\)", cut)
    refused("values that are not finite", state | {first: state[first] * torch.nan})
    refused("are not \\(out, r\\)", state | {first: state[first].flatten()})
    refused("only one of lorad_A and lorad_B for 1 modules", {k: v for k, v in state.items() if k != first})
    refused("found none; the first key is 'x.lora_A.weight'", {"x.lora_A.weight": torch.zeros(2, 2)})
    refused("covers 1 besides: .*conv_in", state | {"conv_in.weight": torch.zeros(2)})
    refused("no LoRaD adapter 'other'; the model has \\['student'\\]", "other", unet)
    with pytest.raises(ValueError, match="no attention processors"):
        attn_processors_from_lorad(torch.nn.Linear(2, 2), state)
    with pytest.raises(ValueError, match="no LoRaDAttnProcessor among .* AttnProcessor2_0"):
        lorad_state_dict_from_attn_processors(tiny_unet())


def test_fused_adapters_and_foreign_processors_are_refused():
    unet = adapted_unet()
    unet.fuse_lora(adapter_names=["student"])
    with pytest.raises(ValueError, match="layers are fused, first .*; unfuse them first"):
        attn_processors_from_lorad(unet, "student")
    unet.unfuse_lora()

    class OtherProcessor(AttnProcessor2_0):
        pass

    unet.set_attn_processor(OtherProcessor())
    with pytest.raises(ValueError, match="has a OtherProcessor, in whose place"):
        attn_processors_from_lorad(unet, "student")


def test_fusing_turns_the_weights_and_leaves_stock_processors(tmp_path):
    unet, given = adapted_unet(["attn1.to_q", "attn2.to_k", "attn2.to_out.0"]), unet_inputs()
    unet.set_adapters(["student"], [0.7])
    expected = unet(**given).sample
    processors = attn_processors_from_lorad(unet, "student")
    unet.unload_lora()
    unet.set_attn_processor(processors)
    fuse_lorad_attn_processors(unet)
    torch.testing.assert_close(unet(**given).sample, expected, rtol=0, atol=1e-6)
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert unet.state_dict().keys() == tiny_unet().state_dict().keys()
    fuse_lorad_attn_processors(unet)
    torch.testing.assert_close(unet(**given).sample, expected, rtol=0, atol=1e-6)


def test_fusing_beside_a_lora_and_in_vain():
    unet, given = adapted_unet(), unet_inputs()
    processors = attn_processors_from_lorad(unet, "student")
    unet.unload_lora()
    unet.set_attn_processor(processors)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "lora")
    expected = unet(**given).sample
    twin = copy.deepcopy(unet)
    twin.fuse_lora(adapter_names=["lora"])
    for fused in (unet, twin):
        fuse_lorad_attn_processors(fused)
        torch.testing.assert_close(fused(**given).sample, expected, rtol=1e-4, atol=1e-5)

    unet = tiny_unet()
    unet.set_attn_processor(attn_processors_from_lorad(adapted_unet(), "student"))
    last = list(unet.attn_processors.values())[-1]
    last.to_out_lorad.A.data[0, 0] = torch.inf
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    with pytest.raises(ValueError, match="to_out.0: values that are not finite"):
        fuse_lorad_attn_processors(unet)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_saved_pipeline_has_the_processors_in_its_weights(components, tmp_path):
    unet = add_random_adapter(components["unet"], targets=TARGETS)
    unet.set_attn_processor(attn_processors_from_lorad(unet, "student"))
    unet.unload_lora()
    pipe = WaDiPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "latent"}
    expected = pipe("red", generator=torch.Generator().manual_seed(0), **call).images
    pipe.save_pretrained(tmp_path / "saved")
    assert all(isinstance(processor, LoRaDAttnProcessor) for processor in unet.attn_processors.values())
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    stock.set_progress_bar_config(disable=True)
    saved = stock("red", generator=torch.Generator().manual_seed(0), guidance_scale=0.0, **call).images
    torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-4)
    assert not any("lorad" in key for key in load_file(tmp_path / "saved/unet/diffusion_pytorch_model.safetensors"))
    pipe.to(torch.bfloat16)
    assert {p.dtype for name, p in unet.named_parameters() if "_lorad." in name} == {torch.float32}


def test_sequential_offload():
    from accelerate import cpu_offload

    unet, given = adapted_unet(), unet_inputs()
    expected = unet(**given).sample
    unet.set_attn_processor(attn_processors_from_lorad(unet, "student"))
    unet.unload_lora()
    cpu_offload(unet, torch.device("cpu"))
    processor = next(iter(unet.attn_processors.values()))
    assert processor.to_q_lorad.A.is_meta and unet.conv_in.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(unet(**given).sample, expected, rtol=0, atol=1e-6)
    assert processor.to_q_lorad.A.is_meta


def test_processors_beside_an_adapter_on_other_layers(tmp_path):
    """The adapter's file holds the adapter alone, the processors' state the processors alone."""
    unet, given = tiny_unet(), unet_inputs()
    unet.set_attn_processor(attn_processors_from_lorad(adapted_unet(), "student"))
    state = lorad_state_dict_from_attn_processors(unet)
    unet.add_adapter(LoRaDConfig(r=2, target_modules=["ff.net.2", "time_emb_proj"]), "rest")
    fill_adapter(unet, "rest", seed=6)
    expected = unet(**given).sample
    path = save_lorad_adapter(unet, tmp_path, "rest")
    assert not any("processor" in key or ".to_" in key for key in load_file(path))
    assert lorad_state_dict_from_attn_processors(unet).keys() == state.keys()
    other = tiny_unet()
    other.set_attn_processor(attn_processors_from_lorad(other, state))
    load_lorad_adapter(other, tmp_path, "rest")
    torch.testing.assert_close(other(**given).sample, expected, rtol=0, atol=1e-6)
