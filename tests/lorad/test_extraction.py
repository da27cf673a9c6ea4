"""Extraction: the mathematics on single weights, then adapters out of pairs of checkpoints."""

import copy
import json
import math

import pytest
import torch
from conftest import TARGETS, add_random_adapter, tiny_unet
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_wadi import LoRaDConfig, WaDiPipeline, extract_lorad, load_lorad_adapter, save_lorad_adapter
from diffusers_wadi.lorad.extraction import fit_layer, low_rank_angles, pair_angles, truncated_svd
from diffusers_wadi.lorad.rotation import rotate


def weights(out=24, columns=32, seed=0, spread=0.0):
    """A weight; with `spread`, one whose pairs differ in length by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out, columns, generator=generator)
    lengths = torch.exp(spread * torch.randn(out, columns // 2, generator=generator)).repeat_interleave(2, dim=1)
    return noise * lengths / math.sqrt(columns)


def low_rank(out=24, pairs=16, r=3, seed=1, size=0.4):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(out, r, generator=generator), torch.randn(r, pairs, generator=generator)
    theta = A @ B
    return theta * size / theta.std()


def explained(fit):
    return 1 - fit.left / fit.change


def test_angles_of_pairs():
    base, theta = weights(), low_rank(size=1.0).clamp(-3.1, 3.1)
    angles, products = pair_angles(base, rotate(base, theta))
    assert torch.allclose(angles, theta, atol=1e-5)
    assert torch.allclose(products, base.unflatten(-1, (-1, 2)).square().sum(-1), atol=1e-6)
    # By hand: from (1, 0) to (0, 2) it is a quarter turn, of weight 1 * 2; a pair of zeros has no weight.
    angle, product = pair_angles(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0, 1.0]]))
    assert angle[0, 0].item() == pytest.approx(math.pi / 2) and product.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("shape", [(24, 32), (6, 32), (40, 8)])
def test_full_rank_leaves_only_what_no_turn_can_reach(shape):
    base, tuned = weights(*shape), weights(*shape, seed=5)
    fit = fit_layer(base, tuned, rank=1000)
    assert fit.B.shape[0] == min(shape[0], shape[1] // 2)
    lengths = [w.unflatten(-1, (-1, 2)).norm(dim=-1) for w in (base, tuned)]
    best = (lengths[1] - lengths[0]).square().sum().item()
    assert fit.left == pytest.approx(best, rel=1e-5) and fit.left_by_lengths == pytest.approx(best, rel=1e-5)
    assert fit.change == pytest.approx((tuned - base).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_a_rotation_of_low_rank_is_found_exactly(spread):
    base, theta = weights(spread=spread), low_rank()
    theta *= 3.1 / theta.abs().max()
    base[:, 4:6] = 0  # pairs that no turn moves say nothing of their angle
    base[7] = 0
    tuned = rotate(base, theta)
    fit = fit_layer(base, tuned, rank=3)
    assert fit.A.shape == (24, 3) and fit.B.shape == (3, 16)
    assert (rotate(base, fit.A @ fit.B) - tuned).abs().max() <= 1e-5 * tuned.abs().max()
    assert explained(fit) == pytest.approx(1, abs=1e-9)


def test_single_pairs_without_weight_do_not_spoil_a_low_rank():
    base, theta = weights(), low_rank(size=0.5)
    holes = torch.rand(24, 16, generator=torch.Generator().manual_seed(3)) < 0.05
    base[holes.repeat_interleave(2, dim=1)] = 0
    tuned = rotate(base, theta)
    fit = fit_layer(base, tuned, rank=3, rounds=60)
    assert explained(fit) > 0.9999


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_explained_change_grows_with_rank(spread):
    base = weights(spread=spread)
    tuned = rotate(base, low_rank(size=0.5)) + 0.3 * weights(seed=9, spread=spread)
    shares = [explained(fit_layer(base, tuned, rank=rank)) for rank in (1, 2, 4, 8, 12, 16)]
    assert all(later > earlier for earlier, later in zip(shares, shares[1:])) and shares[0] > 0
    reachable = fit_layer(base, tuned, rank=16)
    assert shares[-1] == pytest.approx(1 - reachable.left_by_lengths / reachable.change, abs=1e-6)


def test_nearly_the_best_that_a_general_optimiser_finds():
    """A plain SVD of the angles makes things worse than no adapter here; the fit has to come near the optimum."""
    base = weights(spread=1.0)
    tuned = base + 0.6 * weights(seed=9, spread=1.0)
    theta, weight = pair_angles(base, tuned)

    def loss(A, B):
        return (weight * (1 - (theta - A @ B).cos())).sum()

    def descend(seed):
        generator = torch.Generator().manual_seed(seed)
        factors = [0.1 * torch.randn(shape, generator=generator) for shape in ((24, 3), (3, 16))]
        factors = [factor.requires_grad_() for factor in factors]
        optimizer = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(*factors)
            value.backward()
            return value

        optimizer.step(closure)
        return loss(*factors).item()

    best = min(descend(seed) for seed in range(4))
    nothing = loss(torch.zeros(24, 1), torch.zeros(1, 16)).item()
    assert loss(*truncated_svd(theta, 3)[:2]).item() > nothing
    reached = loss(*low_rank_angles(theta, weight, rank=3, rounds=40)).item()
    assert nothing - reached > 0.9 * (nothing - best)


def test_energy_chooses_the_rank():
    base = weights()
    exact = rotate(base, low_rank(size=0.5))
    assert fit_layer(base, exact, energy=1.0).B.shape[0] == 3
    tuned = exact + 0.1 * weights(seed=9)
    ranks = [fit_layer(base, tuned, energy=energy).B.shape[0] for energy in (0.3, 0.8, 0.95, 1.0)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[1] < ranks[2] <= ranks[3] == 16
    assert fit_layer(base, tuned, rank=4, energy=1.0).B.shape[0] == 4


def test_truncated_svd_is_the_best_approximation():
    for shape in ((20, 12), (12, 20)):
        matrix = weights(*shape)
        left, right, kept, total = truncated_svd(matrix, 5)
        U, S, V = torch.linalg.svd(matrix)
        assert torch.allclose(left @ right, U[:, :5] * S[:5] @ V[:5], atol=1e-5)
        assert kept == pytest.approx(S[:5].square().sum().item()) and total == pytest.approx(S.square().sum().item())


def test_convolutions_with_an_odd_number_of_taps():
    base = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    tuned = base + 0.1 * torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    fit = fit_layer(base, tuned, rank=100)
    assert fit.A.shape[0] == 8 and fit.B.shape[1] == 13
    assert fit.left == pytest.approx(fit.left_by_lengths, rel=1e-5) and fit.left < fit.change


@pytest.mark.parametrize(
    "choice, message",
    [({}, "Pass `rank`"), ({"rank": 0}, "at least 1, got 0"), ({"energy": 1.5}, "got 1.5"), ({"energy": 0.0}, "0.0")],
)
def test_a_choice_of_rank_that_means_nothing(choice, message):
    with pytest.raises(ValueError, match=message):
        fit_layer(weights(), weights(seed=1), **choice)
    with pytest.raises(ValueError, match=message):
        extract_lorad({}, {}, **choice)


# Adapters out of checkpoints.


def fused(unet, **options):
    tuned = add_random_adapter(copy.deepcopy(unet), **options)
    for module in tuned.modules():
        if hasattr(module, "lorad_A"):
            module.merge()
    tuned.unload_lora()
    return tuned


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = tiny_unet()
    return base, fused(base)


def applied(base, adapter):
    model = copy.deepcopy(base)
    load_lorad_adapter(model, adapter)
    for module in model.modules():
        if hasattr(module, "lorad_A"):
            module.merge()
    model.unload_lora()
    return model.state_dict()


def furthest(state, wanted):
    assert state.keys() == wanted.keys()
    return max((state[key] - wanted[key]).abs().max().item() for key in wanted)


def test_a_fused_checkpoint_comes_back(pair, tmp_path):
    base, tuned = pair
    found = extract_lorad(base, tuned, rank=4)
    assert furthest(applied(base, found.state_dict), tuned.state_dict()) <= 1e-4
    assert furthest(base.state_dict(), tuned.state_dict()) > 1e-2
    report = found.report
    assert report.left_out == [] and report.explained == pytest.approx(1, abs=1e-6)
    adapted = {name for name, _ in base.named_modules() if any(name.endswith(f".{t}") for t in TARGETS)}
    assert {layer.name for layer in report.layers} == adapted == set(found.config.target_modules)
    assert found.config.r == 4
    # Through files: the weights, the config beside them, the report.
    path = found.save(tmp_path / "adapter", base_model_name_or_path="org/base")
    assert furthest(applied(base, path), tuned.state_dict()) <= 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["peft_type"] == "LORAD"
    saved = json.loads((tmp_path / "adapter" / "extraction_report.json").read_text())
    assert saved["explained"] == pytest.approx(1, abs=1e-6) and len(saved["layers"]) == len(adapted)


def test_small_layers_get_no_more_than_their_full_rank(pair, tmp_path):
    base, tuned = pair
    found = extract_lorad(base, tuned, rank=9)
    ranks = {layer.name: layer.rank for layer in found.report.layers}
    assert set(ranks.values()) == {8, 9} and found.config.r == 9
    for name, rank in ranks.items():
        shape = base.get_submodule(name).weight.shape
        assert rank == min(9, shape[0], shape[1] // 2)
    assert furthest(applied(base, found.save(tmp_path)), tuned.state_dict()) <= 1e-4


def test_a_perturbed_checkpoint_is_explained_better_by_more_rank(pair):
    base, tuned = pair
    generator = torch.Generator().manual_seed(5)
    state = {
        key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in base.state_dict().items()
    }
    shares = [extract_lorad(base, state, rank=rank).report.explained_of_layers for rank in (1, 2, 4, 8, 100)]
    assert all(later > earlier for earlier, later in zip(shares, shares[1:]))
    report = extract_lorad(base, state, rank=100).report
    for layer in report.layers:
        assert layer.lost_to_rank == pytest.approx(0, abs=1e-5)
        assert layer.explained + layer.lost_to_rank + layer.lost_to_lengths == pytest.approx(1)
        assert layer.lost_to_lengths > 0.1


def test_what_is_not_adapted_is_reported(pair):
    base, tuned = pair
    state = {key: value.clone() for key, value in tuned.state_dict().items()}
    changed = ["conv_in.weight", "conv_in.bias", "conv_norm_out.weight", "time_embedding.linear_1.weight"]
    for key in changed:
        state[key] += 0.1
    report = extract_lorad(base, state, rank=4, exclude_modules=["time_embedding.linear_1"]).report
    assert {entry.name: entry.reason for entry in report.left_out} == {
        "conv_in.weight": "a convolution",
        "conv_in.bias": "a bias, norm or single value",
        "conv_norm_out.weight": "a bias, norm or single value",
        "time_embedding.linear_1.weight": "excluded",
    }
    entry = next(entry for entry in report.left_out if entry.name == "conv_in.bias")
    assert entry.change == pytest.approx(0.1 * math.sqrt(8), rel=1e-4)
    assert report.explained < 0.99 < report.explained_of_layers
    total = sum(e.change**2 for e in (*report.layers, *report.left_out))
    assert total == pytest.approx(
        sum((state[k] - v).square().sum().item() for k, v in base.state_dict().items()), rel=1e-4
    )
    for text in (report.table(), report.summary(), report.to_json()):
        assert "conv_in.weight" in text or "4 tensors" in text
    only = extract_lorad(base, state, rank=4, target_modules=r".*to_q").report
    assert {layer.name.rsplit(".")[-1] for layer in only.layers} == {"to_q"}
    assert "not among target_modules" in {entry.reason for entry in only.left_out}


def test_convolutions_too(pair, tmp_path):
    base, _ = pair
    tuned = fused(base, targets=[*TARGETS, "conv1", "conv2", "conv_shortcut"])
    found = extract_lorad(base, tuned, rank=4, convolutions=True)
    assert found.report.left_out == [] and any("conv1" in name for name in found.config.target_modules)
    shapes = {layer.name: layer.shape for layer in found.report.layers}
    assert shapes["down_blocks.0.resnets.0.conv1"] == (8, 72)
    assert furthest(applied(base, found.save(tmp_path)), tuned.state_dict()) <= 1e-4
    without = extract_lorad(base, tuned, rank=4).report
    assert {entry.reason for entry in without.left_out} == {"a convolution"}


def test_a_checkpoint_stored_in_fewer_bits_has_not_changed(pair):
    base, tuned = pair
    state = {key: value.clone() for key, value in tuned.state_dict().items()}
    untouched = {key for key, value in base.state_dict().items() if torch.equal(value, state[key])}
    half = {key: value.half() for key, value in state.items()}
    report = extract_lorad(base, half, rank=4).report
    assert report.left_out == [] and untouched and report.explained > 0.9999
    assert furthest(applied(base, extract_lorad(base, half, rank=4).state_dict), state) < 2e-3


def test_every_kind_of_source_gives_the_same_adapter(pair, tmp_path, components, base_folder):
    base, tuned = components["unet"], fused(components["unet"])
    tuned.save_pretrained(tmp_path / "model")
    tuned.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    tuned.save_pretrained(tmp_path / "half", variant="fp16")
    pipe = StableDiffusionPipeline(**components | {"unet": tuned})
    pipe.save_pretrained(tmp_path / "pipeline")
    save_file(tuned.state_dict(), tmp_path / "file.safetensors")
    expected = extract_lorad(base, tuned, rank=4).state_dict
    sources = ["model", "sharded", "half", "pipeline", "pipeline/unet", "file.safetensors"]
    for tuned_source in [*(tmp_path / name for name in sources), tuned.state_dict(), pipe]:
        found = extract_lorad(base_folder, tuned_source, rank=4)
        assert found.config.base_model_name_or_path == str(base_folder.resolve())
        assert found.component == "unet" and found.state_dict.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.state_dict.items())
    assert extract_lorad(base_folder / "unet", tuned, rank=4).config.base_model_name_or_path == str(base_folder)
    with_subfolder = extract_lorad(base_folder, tmp_path / "model", rank=4, subfolder="unet")
    assert with_subfolder.state_dict.keys() == expected.keys()


def test_an_extracted_adapter_is_a_pipeline(components, base_folder, tmp_path):
    """From a complete one-step folder to an adapter that draws its images, with its scheduler."""
    tuned = StableDiffusionPipeline(**components | {"unet": fused(components["unet"])})
    tuned.save_pretrained(tmp_path / "tuned")
    extract_lorad(base_folder, tmp_path / "tuned", rank=4).save(tmp_path / "adapter")
    pipe = WaDiPipeline.from_pretrained(tmp_path / "adapter")
    ignored = {"_use_default_values": 0}
    assert dict(pipe.scheduler.config) | ignored == dict(tuned.scheduler.config) | ignored
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    wanted = tuned("red", generator=torch.Generator().manual_seed(0), **call).images
    got = pipe("red", generator=torch.Generator().manual_seed(0), **call).images
    plain = WaDiPipeline.from_pretrained(base_folder)
    other = plain("red", generator=torch.Generator().manual_seed(0), **call).images
    assert (got - wanted).abs().max() < 1e-3 < 1e-2 < (other - wanted).abs().max()


def test_bad_sources(pair, tmp_path, adapter_folder, base_folder):
    base, tuned = pair

    def refused(message, first=base, second=tuned, kind=ValueError, **options):
        with pytest.raises(kind, match=message):
            extract_lorad(first, second, rank=2, **options)

    refused("hold the same weights", base, base)
    refused("carries adapters; fuse", base, add_random_adapter(copy.deepcopy(base)))
    refused("differ in .* first", base, tiny_unet(width=16))
    refused("float64, which device mps does not have", device="mps")
    refused("on the meta device", base, copy.deepcopy(tuned).to("meta"))
    refused("from_single_file", base, {"model.diffusion_model.x": torch.zeros(2)})
    refused("is an adapter, not a checkpoint", base_folder, adapter_folder)
    refused("no diffusion_pytorch_model.safetensors", base_folder, tmp_path, kind=FileNotFoundError)
    refused("of variant bf16", base_folder, base_folder, kind=FileNotFoundError, variant="bf16")
    refused("not a folder here", base_folder, tmp_path / "nothing", kind=OSError)
    refused("none of the .* is a Linear layer", base, tuned, target_modules=["nothing"])
    broken = {key: value.clone() for key, value in tuned.state_dict().items()}
    next(value for key, value in broken.items() if key.endswith("to_q.weight"))[0, 0] = math.nan
    refused("not finite", base, broken)
    save_file(tuned.state_dict(), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    refused("not a complete safetensors file", base, tmp_path / "cut.safetensors")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused("safetensors only", base, tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="as .safetensors only"):
        extract_lorad(base, tuned, rank=2).save(tmp_path / "out", weight_name="x.bin")
    assert not (tmp_path / "out").exists()


def test_half_precision_files_of_factors(pair, tmp_path):
    base, tuned = pair
    path = extract_lorad(base, tuned, rank=4).save(tmp_path, dtype=torch.float16)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert furthest(applied(base, path), tuned.state_dict()) < 2e-3
    model = copy.deepcopy(base)
    load_lorad_adapter(model, tmp_path, "again")
    assert isinstance(model.peft_config["again"], LoRaDConfig)
    assert save_lorad_adapter(model, tmp_path / "saved", "again").is_file()
