"""Comparing models: closed forms on a tiny UNet, every kind of source, what is refused."""

import copy
import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import TARGETS, add_random_adapter, tiny_unet
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_pixart import pixart_pipeline

from diffusers_wadi import export_lora, load_lorad_adapter, save_lorad_adapter
from diffusers_wadi.analysis import analyze_weights, save_analyses, swap_weights, swapping
from diffusers_wadi.analysis.comparison import group_of
from diffusers_wadi.authors_files import convert_lorad_state_dict_to_authors, save_authors_file
from diffusers_wadi.conversion._original_keys import unet_to_original
from diffusers_wadi.lorad.rotation import rotate_weight


def merged(model):
    """A copy with its adapters in its weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    model.unload_lora()
    return model


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_unet()


@pytest.fixture(scope="module")
def adapted(base):
    return add_random_adapter(copy.deepcopy(base))


@pytest.fixture(scope="module")
def tuned(adapted):
    return merged(adapted)


def perturbed(model, size=0.1, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return {k: v + size * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


def values(analysis):
    """All that an analysis measured."""
    return [[layer.relative_change, *layer.norm, *layer.direction, *layer.energies] for layer in analysis.layers]


def assert_alike(one, other, tolerance=1e-5):
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for left, right in zip(values(one), values(other)):
        assert left == pytest.approx(right, abs=tolerance)


def test_a_fused_lorad_turns_and_does_not_stretch(base, tuned):
    analysis = analyze_weights(base, tuned)
    changed = {layer.name for layer in analysis.layers if layer.change > 0}
    assert changed == {name for name, _ in base.named_modules() if name.endswith(tuple(f".{t}" for t in TARGETS))}
    total = analysis.overall()
    assert total.norm_mean < 1e-6 and total.norm_std < 1e-6 and total.direction_mean > 0.01
    assert total.rotation_share == pytest.approx(1, abs=1e-10) and analysis.others == []
    for layer in analysis.layers:
        assert layer.energies.sum() == (pytest.approx(1) if layer.name in changed else 0)
        assert layer.rotation_share == (pytest.approx(1, abs=1e-10) if layer.name in changed else None)
    weights = [v for k, v in base.state_dict().items() if k.endswith("weight") and v.ndim > 1]
    assert total.layers == len(weights) and total.vectors == sum(len(w) for w in weights)
    assert total.changed == len(changed)


def test_a_scaled_checkpoint_stretches_and_does_not_turn(base):
    analysis = analyze_weights(base, {key: 1.25 * value for key, value in base.state_dict().items()})
    total = analysis.overall()
    assert total.norm_mean == pytest.approx(0.25, abs=1e-6) and total.norm_std < 1e-6
    assert total.direction_mean < 1e-6 and total.rotation_share < 1e-6
    assert all(other.relative_change == pytest.approx(0.25, abs=1e-6) for other in analysis.others)
    biases = [k for k, v in base.state_dict().items() if v.ndim == 1 and v.any()]
    assert sorted(other.name for other in analysis.others) == sorted(biases)


def test_sums_and_choices(base):
    state = perturbed(base)
    whole = analyze_weights(base, state)
    linear, convolutions = (analyze_weights(base, state, layers=kind) for kind in ("linear", "convolution"))
    assert {len(layer.shape) for layer in linear.layers} == {2}
    assert {len(layer.shape) for layer in convolutions.layers} == {4}
    assert len(linear.layers) + len(convolutions.layers) == len(whole.layers)
    directions = np.concatenate([layer.direction for layer in whole.layers])
    total = whole.overall()
    assert total.direction_mean == pytest.approx(directions.mean())
    assert total.direction_std == pytest.approx(math.sqrt(((directions - directions.mean()) ** 2).mean()))
    assert sum(group.vectors for group in whole.groups()) == total.vectors
    rows = analyze_weights(base, state, convention="row")
    assert rows.overall().vectors == sum(math.prod(layer.shape[1:]) for layer in whole.layers)
    queries = analyze_weights(
        base, state, target_modules=["to_q", "to_k"], exclude_modules=r".*attn1.*", energies=False
    )
    assert {layer.name.split(".")[-2] for layer in queries.layers} == {"attn2"}
    assert {layer.name.split(".")[-1] for layer in queries.layers} == {"to_q", "to_k"}
    assert all(layer.energies.size == 0 for layer in queries.layers)
    assert queries.overall().rank_fractions[0.9] is None and "rotation" in queries.summary()


@pytest.mark.parametrize("convention", ["column", "row"])
def test_what_a_random_change_does_to_norms(convention):
    torch.manual_seed(0)
    base = {"wide.weight": torch.randn(300, 50), "deep.weight": torch.randn(80, 20, 3, 3)}
    tuned = {key: value + 0.01 * torch.randn_like(value) for key, value in base.items()}
    total = analyze_weights(base, tuned, convention=convention).overall()
    assert total.norm_of_random == pytest.approx(total.norm_mean, rel=0.15)
    assert total.rotation_share == pytest.approx(0.5, abs=0.03)
    turned = {
        key: rotate_weight(value, torch.full((len(value), value[0].numel() // 2), 0.1)) for key, value in base.items()
    }
    total = analyze_weights(base, turned).overall()
    assert total.norm_mean < 1e-6 < 1e-3 < total.norm_of_random  # a rotation keeps norms better than chance does


def test_rank_fractions_and_curves(base):
    state = base.state_dict()
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    change = torch.zeros_like(state[key])
    change.diagonal()[:4] = torch.tensor([3.0, 2.0, 1.0, 1.0]).sqrt()  # energies 3/7, 2/7, 1/7, 1/7
    analysis = analyze_weights(base, state | {key: state[key] + change})
    (layer,) = [layer for layer in analysis.layers if layer.change > 0]
    assert layer.energies[:4].tolist() == pytest.approx([3 / 7, 2 / 7, 1 / 7, 1 / 7], abs=1e-5)
    n = min(layer.shape)
    assert [layer.rank_fraction(e) for e in (0.4, 0.5, 0.7, 0.8, 0.99)] == [k / n for k in (1, 2, 2, 3, 4)]
    assert layer.energy_curve(np.array([0, 1 / n, 2 / n, 1])).tolist() == pytest.approx([0, 3 / 7, 5 / 7, 1], abs=1e-5)
    assert analysis.overall().rank_fractions[0.5] == 2 / n


def test_layers_in_the_order_of_the_network(base):
    names = [layer.name for layer in analyze_weights(base, perturbed(base)).layers]
    stages = [name.split(".")[0] for name in names]
    assert stages[0] == "conv_in" and stages[-1] == "conv_out"
    assert stages.index("down_blocks") < stages.index("mid_block") < stages.index("up_blocks")
    assert group_of("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 2) == "cross-attention"
    assert group_of("down_blocks.0.resnets.0.conv1", 4) == "convolution" and group_of("a.b", 2) == "other"


def test_checkpoints_of_every_kind(base, tuned, components, base_folder, tmp_path):
    tuned.save_pretrained(tmp_path / "run" / "unet")
    tuned.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    pipe = StableDiffusionPipeline(**components | {"unet": tuned})
    pipe.save_pretrained(tmp_path / "pipeline")
    state = tuned.state_dict()
    save_file(state, tmp_path / "file.safetensors")
    torch.save(state, tmp_path / "file.pth")
    original = unet_to_original(state, tuned.config) | {"first_stage_model.x": torch.zeros(2)}
    save_file(original, tmp_path / "original.safetensors")
    torch.save({k.removeprefix("model.diffusion_model."): v for k, v in original.items()}, tmp_path / "bare.pt")
    first = StableDiffusionPipeline(**components | {"unet": copy.deepcopy(base)})
    expected = analyze_weights(first, tuned)
    names = ["run", "run/unet", "sharded", "pipeline", "pipeline/unet", "file.safetensors", "file.pth", "bare.pt"]
    for source in [*(tmp_path / name for name in [*names, "original.safetensors"]), state, pipe]:
        assert_alike(analyze_weights(base, source), expected)
    both = analyze_weights(tmp_path / "original.safetensors", tmp_path / "bare.pt")
    assert both.overall().changed == 0 and len(both.layers) == len(expected.layers)
    fp16 = analyze_weights(tuned, {key: value.half() for key, value in state.items()})
    assert fp16.overall().changed == 0 and fp16.others == []  # storing in fewer bits is no change


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loras_are_put_on_as_peft_does(kind, base, tmp_path):
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=kind == "dora", alpha_pattern={"to_q": 2})
    unet = copy.deepcopy(base)
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1.1
    expected = analyze_weights(base, merged(unet))
    assert expected.overall().changed == sum(isinstance(m, BaseTunerLayer) for m in unet.modules()) > 5
    unet.save_lora_adapter(tmp_path)
    assert_alike(analyze_weights(base, tmp_path), expected)
    (file,) = tmp_path.glob("*.safetensors")
    assert_alike(analyze_weights(base, file), expected)


def test_loras_of_other_layouts(base, adapted, tmp_path):
    lora = export_lora(adapted, rank=3)
    lora.save(tmp_path / "diffusers")
    lora.save(tmp_path / "kohya", layout="kohya")
    one, other = (analyze_weights(base, tmp_path / name) for name in ("diffusers", "kohya"))
    assert one.overall().changed > 5
    assert_alike(one, other)
    state = load_file(next((tmp_path / "kohya").glob("*.safetensors")))
    key = next(key for key in state if key.endswith("to_q.alpha"))
    state[key] *= 2  # alpha / r is the scale: the change doubles
    save_file(state, tmp_path / "double.safetensors")
    double = analyze_weights(base, tmp_path / "double.safetensors")
    ratios = [d.relative_change / o.relative_change for d, o in zip(double.layers, one.layers) if o.change]
    assert sorted(ratios)[-1] == pytest.approx(2, abs=1e-4) and sorted(ratios)[-2] == pytest.approx(1, abs=1e-4)
    old = {}
    for name, value in lora.state_dict.items():  # as diffusers wrote them in 2023
        path, end = name.rsplit(".lora_", 1)
        path = path.replace(".to_out.0", ".to_out").replace(".attn1.", ".attn1.processor.")
        join = "_lora." if ".processor." in path else ".lora."
        old[f"{path}{join}{'down' if end.startswith('A') else 'up'}.weight"] = value
    save_file(old, tmp_path / "old.safetensors")
    assert_alike(analyze_weights(base, tmp_path / "old.safetensors"), one)


def test_lorads_and_the_authors_angles_on_the_fly(base_folder, adapter_folder, components, tmp_path):
    unet = copy.deepcopy(components["unet"])
    load_lorad_adapter(unet, adapter_folder)
    expected = analyze_weights(base_folder, merged(unet))
    assert expected.overall().changed > 5
    assert_alike(analyze_weights(base_folder, adapter_folder), expected)
    assert_alike(analyze_weights(base_folder / "unet", adapter_folder / "pytorch_lorad_weights.safetensors"), expected)
    authors = convert_lorad_state_dict_to_authors(load_file(adapter_folder / "pytorch_lorad_weights.safetensors"))
    for name in ("kduv.pth", "kduv.safetensors"):
        save_authors_file(authors, tmp_path / name)
        assert_alike(analyze_weights(base_folder, tmp_path / name), expected)
    # An adapter as BASE stands on the base that it names, and so does the one that it is compared with.
    other = add_random_adapter(copy.deepcopy(components["unet"]), seed=9)
    save_lorad_adapter(other, tmp_path / "other", "student")
    assert_alike(analyze_weights(adapter_folder, tmp_path / "other"), analyze_weights(merged(unet), merged(other)))
    with pytest.raises(ValueError, match="names no base model; pass --base-model"):
        analyze_weights(tmp_path / "other", adapter_folder)
    assert analyze_weights(tmp_path / "other", merged(other), base_model=base_folder).overall().direction_mean < 1e-6


def test_pixart_and_its_transformer(tmp_path):
    pipe = pixart_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    transformer = pipe.transformer
    state = perturbed(transformer, 0.01) | {
        "caption_projection.y_embedding": torch.zeros(3)
    }  # as in the authors' file
    save_file(state, tmp_path / "tuned.safetensors")
    analysis = analyze_weights(tmp_path / "base", tmp_path / "tuned.safetensors")
    groups = {group.name for group in analysis.groups()}
    assert {"self-attention", "cross-attention", "feed-forward"} <= groups
    assert "scale_shift_table" in {other.name for other in analysis.others}
    path = swap_weights(tmp_path / "base", tmp_path / "tuned.safetensors", tmp_path / "swapped")
    assert type(PixArtAlphaPipeline.from_pretrained(path).transformer) is type(transformer)


# Swaps.


def test_a_swap_of_both_parts_is_the_other_model(base_folder, tmp_path, components):
    state = perturbed(components["unet"])
    save_file(state, tmp_path / "tuned.safetensors")
    out = swap_weights(base_folder, tmp_path / "tuned.safetensors", tmp_path / "both", take="both")
    written = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)
    same = swap_weights(base_folder, components["unet"], tmp_path / "same.safetensors", take="norm")
    expected = components["unet"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in load_file(same).items())


@pytest.mark.parametrize("convention", ["column", "row"])
@pytest.mark.parametrize("take", ["direction", "norm"])
def test_a_swap_takes_the_one_and_leaves_the_other(take, convention, base_folder, components, tmp_path):
    state, options = perturbed(components["unet"]), {"convention": convention}
    out = swap_weights(base_folder, state, tmp_path / "out", take=take, **options)
    from_base, from_tuned = analyze_weights(base_folder, out, **options), analyze_weights(state, out, **options)
    taken, left = ("direction", "norm") if take == "direction" else ("norm", "direction")
    means = {
        (name, part): getattr(a.overall(), f"{part}_mean")
        for name, a in (("b", from_base), ("t", from_tuned))
        for part in ("norm", "direction")
    }
    assert means["t", taken] < 1e-6 and means["b", left] < 1e-6
    assert means["b", taken] > 0.01 and means["t", left] > 0.01
    assert from_base.others == [] and from_tuned.others  # biases and norm layers are the base's
    rest = swap_weights(base_folder, state, tmp_path / "rest", take=take, rest="tuned", **options)
    assert analyze_weights(state, rest, **options).others == []


def test_a_swap_runs_as_a_stock_pipeline(base_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(swapping, "SHARD_BYTES", 30_000)
    out = swap_weights(base_folder, adapter_folder, tmp_path / "out", dtype=torch.float16)
    assert len(list((out / "unet").glob("*.safetensors"))) > 1 and (out / "unet" / "config.json").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    # An adapter has no norms to take: the swap is the fused adapter itself, rounded.
    assert analyze_weights(pipe.unet, adapter_folder, base_model=base_folder).overall().direction_mean < 1e-3
    images = pipe("red", num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert np.isfinite(images).all()


def test_a_swap_of_models_outside_of_pipelines(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    state = perturbed(base)
    out = swap_weights(tmp_path / "base", state, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    UNet2DConditionModel.from_pretrained(out)
    with pytest.raises(ValueError, match="is not empty"):
        swap_weights(tmp_path / "base", state, out)
    with pytest.raises(ValueError, match="config.json"):
        swap_weights(base.state_dict(), state, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="got 'angle'"):
        swap_weights(base, state, tmp_path / "new", take="angle")


# What is refused.


def test_another_architecture_names_the_first_tensor(base, tmp_path):
    with pytest.raises(ValueError, match=r"first conv_in.bias: \(8,\) and \(16,\)"):
        analyze_weights(base, tiny_unet(width=16))
    state = base.state_dict()
    del state["mid_block.resnets.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"first mid_block.resnets.0.conv1.weight: .* and absent"):
        analyze_weights(base, state)


def test_adapters_of_another_model(base, adapted, adapter_folder, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit .*angles .* Pass the checkpoint that it was trained on"):
        analyze_weights(tiny_unet(width=16), adapter_folder)
    lora = export_lora(adapted, rank=3)
    path = lora.save(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit .*factors "):
        analyze_weights(tiny_unet(width=16), path)
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "to_q.lora_B" not in key}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="only down of its two factors"):
        analyze_weights(base, tmp_path / "half.safetensors")
    save_file({key.replace("to_q", "to_x"): value for key, value in state.items()}, tmp_path / "else.safetensors")
    with pytest.raises(ValueError, match="to_x.weight: no such tensor"):
        analyze_weights(base, tmp_path / "else.safetensors")
    save_file({key: value * math.nan for key, value in state.items()}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="nan.safetensors: .* not finite"):
        analyze_weights(base, tmp_path / "nan.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(value, base, tmp_path):
    for key in ("conv_in.weight", "conv_in.bias"):
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        state[key].view(-1)[0] = value
        save_file(state, tmp_path / "broken.safetensors")
        for pair in ((base, tmp_path / "broken.safetensors"), (tmp_path / "broken.safetensors", base)):
            with pytest.raises(ValueError, match=f"broken.safetensors: {key} holds numbers that are not finite"):
                analyze_weights(*pair)
    with pytest.raises(ValueError, match="not finite"):
        swap_weights(tmp_path / "broken.safetensors", base, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("empty", FileNotFoundError, "no diffusion_pytorch_model.safetensors"),
        ("missing", OSError, "not a folder here"),
        ("missing.safetensors", FileNotFoundError, "there is no file"),
        ("broken.safetensors", ValueError, "not a complete safetensors file"),
        ("notes.txt", ValueError, "safetensors"),
        ("pipeline-without", FileNotFoundError, "no diffusion_pytorch_model.safetensors"),
    ],
)
def test_files_and_folders_that_hold_nothing(source, error, message, base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678 and no more")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "pipeline-without").mkdir()
    (tmp_path / "pipeline-without" / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "vae": ["a", "b"]})
    )
    with pytest.raises(error, match=message):
        analyze_weights(base, tmp_path / source)


def test_nothing_to_compare(base, tuned):
    with pytest.raises(ValueError, match="look at `layers`, `target_modules`"):
        analyze_weights(base, tuned, target_modules=["nothing"])
    with pytest.raises(ValueError, match="got 'dense'"):
        analyze_weights(base, tuned, layers="dense")
    with pytest.raises(ValueError, match="mps"):
        analyze_weights(base, tuned, device="mps")


# What is written.


def test_files_hold_what_was_measured(base, tuned, tmp_path):
    analyses = [analyze_weights(base, tuned, label="lorad"), analyze_weights(base, perturbed(base), label="full")]
    save_analyses(analyses, tmp_path)
    saved = json.loads((tmp_path / "analysis.json").read_text())
    assert [one["label"] for one in saved] == ["lorad", "full"] and saved[0]["convention"] == "column"
    for one, analysis in zip(saved, analyses):
        assert one["overall"]["direction_mean"] == analysis.overall().direction_mean
        for values, layer in zip(one["layers"], analysis.layers):
            assert values["name"] == layer.name and values["norm_std"] == layer.norm.std()
            assert (values["energy_curve"] is None) == (layer.change == 0)
            assert layer.change == 0 or (values["energy_curve"][0], values["energy_curve"][-1]) == (0, 1)
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == 2 * len(analyses[0].layers) and {row["tuned"] for row in rows} == {"lorad", "full"}
    assert float(rows[-1]["direction_mean"]) == analyses[1].layers[-1].direction.mean()
    assert rows[0]["shape"] == "8x4x3x3" and rows[0]["rotation_share"] == ""
    overall = list(csv.DictReader((tmp_path / "overall.csv").open()))
    assert float(overall[0]["norm_mean"]) == analyses[0].overall().norm_mean
    assert [row["name"] for row in overall].count("all layers") == 2
    for text in (analyses[1].table(), analyses[1].layer_table(3)):
        lines = text.splitlines()
        assert len({line.count("|") for line in lines}) == 1
    assert len(analyses[1].layer_table(3).splitlines()) == 5
