"""ReVersion: importance sampling, steering loss, which tokens are negatives, the one row that trains, the data format.

The numbers of R1 are those of the formula, computed independently (facts of the method); see `reference_reversion`.
"""

import copy
import json

import numpy as np
import pytest
import reference_reversion as reference
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn import functional as F

from diffusers_wadi import WaDiPipeline
from diffusers_wadi.downstream import reversion
from diffusers_wadi.downstream.reversion import RelationImages, importance_probabilities, steering_loss, timesteps_at

# --- R1: timesteps ---


def test_importance_sampling_has_the_values_of_the_formula():
    p = importance_probabilities()
    t = torch.arange(1000, dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert 1000 * p[0].item() == pytest.approx(0.50025, abs=1e-5)
    assert 1000 * p[999].item() == pytest.approx(1.50075, abs=1e-5)
    for alpha, mean in ((0.5, 600.87), (0.25, 550.17), (1.0, 702.34), (0.0, 499.5)):
        assert (t * importance_probabilities(alpha=alpha)).sum().item() == pytest.approx(mean, abs=5e-3)
    assert p[500:].sum().item() == pytest.approx(0.65923, abs=5e-6)
    assert p[900:].sum().item() == pytest.approx(0.14924, abs=5e-6)
    assert p[:100].sum().item() == pytest.approx(0.05083, abs=5e-6)
    for k in (0, 123, 999):
        assert p[k].item() == pytest.approx(reference.importance_probability(k, 1000, 0.5), abs=1e-12)


def test_alpha_zero_is_uniform_and_others_are_refused():
    torch.testing.assert_close(importance_probabilities(20, 0.0), torch.full((20,), 0.05, dtype=torch.float64))
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"alpha is {alpha}"):
            importance_probabilities(alpha=alpha)


def test_draws_follow_the_distribution():
    """Chi-square of 1e5 draws in 50 bins of 20 timesteps; 99.9 % quantile for 49 degrees of freedom: 85.4."""
    p = importance_probabilities()
    drawn = timesteps_at(torch.rand(100_000, generator=torch.Generator().manual_seed(0)), p)
    counts = torch.bincount(drawn // 20, minlength=50).double()
    expected = 100_000 * p.reshape(50, 20).sum(1)
    assert ((counts - expected) ** 2 / expected).sum() < 85.4
    uniform = torch.full((50,), 2000.0, dtype=torch.float64)
    assert ((counts - uniform) ** 2 / uniform).sum() > 1000


def test_every_number_gives_a_timestep():
    p = importance_probabilities(10, 0.3)
    edges = torch.tensor([0.0, 1 - 2**-24, p[0].item() - 1e-6, p[0].item() + 1e-6])
    assert timesteps_at(edges, p).tolist() == [0, 9, 0, 1]


# --- R2: steering loss ---


def rows(n, dim=6, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_steering_loss_is_the_log_ratio():
    row, near, far = rows(1, seed=1), rows(3, seed=2), rows(5, seed=3)
    expected = reference.steering_loss(row[0].tolist(), near.tolist(), far.tolist(), 0.07)
    assert steering_loss(row, near, far).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01
    assert steering_loss(7.5 * row, near, far).item() == pytest.approx(expected, rel=1e-5)
    assert steering_loss(row, near, 3 * far, temperature=0.2).item() == pytest.approx(
        reference.steering_loss(row[0].tolist(), near.tolist(), far.tolist(), 0.2), rel=1e-5
    )


def test_without_negatives_there_is_nothing_to_steer_from():
    row = rows(1).requires_grad_()
    loss = steering_loss(row, rows(2, seed=1), rows(0))
    loss.backward()
    assert loss.item() == 0 and row.grad.abs().max() < 1e-6
    with pytest.raises(ValueError, match="no positive rows"):
        steering_loss(row, rows(0), rows(2))


def test_only_the_row_gets_a_gradient_at_right_angles_to_itself():
    row, near, far = (t.requires_grad_() for t in (rows(1), rows(3, seed=1), rows(5, seed=2)))
    steering_loss(row, near, far).backward()
    assert near.grad is None and far.grad is None
    assert row.grad.norm() > 0.1
    assert abs((row.grad * row).sum().item()) < 1e-5 * row.grad.norm().item() * row.norm().item()


def test_the_gradient_is_that_of_finite_differences():
    row, near, far = rows(1).double(), rows(3, seed=1), rows(5, seed=2)
    leaf = row.float().requires_grad_()
    steering_loss(leaf, near, far).backward()
    for k in range(row.shape[1]):
        step = torch.zeros_like(row)
        step[0, k] = 1e-4
        ends = [
            reference.steering_loss((row + s * step)[0].tolist(), near.tolist(), far.tolist(), 0.07) for s in (1, -1)
        ]
        assert leaf.grad[0, k].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-3, abs=2e-3)


def test_descent_turns_the_row_to_the_positives():
    row, near, far = rows(1).requires_grad_(), rows(3, seed=1) + 1, rows(5, seed=2) - 1

    def mean_cosine():
        return F.cosine_similarity(row, near).mean().item()

    optimizer, before = torch.optim.SGD([row], lr=0.05), mean_cosine()
    losses = []
    for _ in range(60):
        losses.append(steering_loss(row, near, far))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert mean_cosine() > before + 0.1


# --- R3: words and tokens ---


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_pads_marks_stop_words_and_the_placeholder_are_no_negatives(components, pad):
    tokenizer, encoder = components["tokenizer"], components["text_encoder"]
    embedding = reversion.add_placeholder(tokenizer, encoder, "<R>", "a")
    tokenizer.pad_token = pad
    captions = ["red <R> blue on x", "a <R> a", "red <R> z red"]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert (ids[:, -1] == tokenizer.convert_tokens_to_ids(pad)).all()
    stop = reversion.stop_ids(tokenizer, ["a", "x"])
    marks = (embedding.token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    vocabulary = {w: reversion.word_id(tokenizer, w) for w in ("red", "blue", "z")} | {"on": None}
    found = reversion.negative_ids(ids, stop, *marks).tolist()
    on = tokenizer("on", add_special_tokens=False).input_ids  # two letters of this tokenizer
    excluded = {"a", "x", "<R>", "on"}
    expected = reference.negatives(captions, vocabulary, excluded)
    expected[2:2] = on
    assert found == expected
    assert reversion.negative_ids(ids[1:2], stop, *marks).tolist() == []


def test_the_word_lists_are_whole():
    assert len(set(reversion.POSITIVE_WORDS)) == len(reversion.POSITIVE_WORDS) == 56
    assert len(set(reversion.STOP_WORDS)) == len(reversion.STOP_WORDS) == 127
    assert len(set(reversion.POSITIVE_WORDS) & set(reversion.STOP_WORDS)) == 23


def test_positive_words_of_several_tokens_are_left_out_and_named(components, caplog):
    tokenizer = components["tokenizer"]
    with caplog.at_level("INFO"):
        ids = reversion.positive_ids(tokenizer, ["red", "above", "b", "red"], at_least=2)
    assert ids.tolist() == [reversion.word_id(tokenizer, "red"), reversion.word_id(tokenizer, "b")]
    assert "above" in caplog.text
    with pytest.raises(ValueError, match="1 of 2 positive words .* at least 2.*above"):
        reversion.positive_ids(tokenizer, ["red", "above"], at_least=2)


# --- R4: the one row ---


def test_only_the_row_of_the_placeholder_trains(components):
    tokenizer, encoder, unet = (components[name] for name in ("tokenizer", "text_encoder", "unet"))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    start = encoder.get_input_embeddings().weight[reversion.word_id(tokenizer, "red")].clone()
    embedding = reversion.add_placeholder(tokenizer, encoder, "<R>", "red")
    unet.requires_grad_(False)
    assert torch.equal(embedding.row[0], start)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["embeddings.token_embedding.row"]
    optimizer = torch.optim.AdamW([embedding.row], lr=1e-2, weight_decay=1e-2)
    ids = tokenizer(["red <R> blue"], padding="max_length", return_tensors="pt").input_ids
    latents = rows(1, 4 * 64).reshape(1, 4, 8, 8)
    for _ in range(3):
        prediction = unet(latents, torch.tensor([500]), encoder(ids)[0]).sample
        loss = F.mse_loss(prediction, torch.zeros_like(latents)) + steering_loss(
            embedding.row, rows(2, 16), rows(3, 16)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (embedding.row[0] - start).abs().min() > 1e-3
    after = encoder.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name.replace("token_embedding.", "token_embedding.table.")], tensor), name
    assert all(p.grad is None for p in unet.parameters())
    assert all(p.grad is None for name, p in encoder.named_parameters() if not name.endswith(".row"))


def test_the_module_gives_what_stock_textual_inversion_gives(components):
    """Both ways of spelling the placeholder; a loaded row and the trained one are the same text encoder."""
    row = rows(1, 16, seed=5)[0]
    trained = WaDiPipeline(**components)
    prompt = "red <R> blue"
    stock = WaDiPipeline(**copy.deepcopy(components))
    stock.load_textual_inversion({"<R>": row})
    embedding = reversion.add_placeholder(trained.tokenizer, trained.text_encoder, "<R>", "red")
    embedding.row.data.copy_(row)
    encoded = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for pipe in (trained, stock)]
    torch.testing.assert_close(*encoded, rtol=0, atol=1e-6)
    lower = trained.encode_prompt("red <r> blue", "cpu", 1, False)[0]
    assert torch.equal(lower, encoded[0])
    assert (trained.encode_prompt("red red blue", "cpu", 1, False)[0] - encoded[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "placeholder, initializer, message",
    [
        ("red", "blue", "'red' is in the tokenizer's vocabulary"),
        ("<|endoftext|>", "blue", "in the tokenizer's vocabulary"),
        ("", "blue", "without spaces"),
        ("two words", "blue", "'two words'"),
        ("<R>", "and", r"'and' is 3 tokens \(a, n, d</w>\)"),
    ],
)
def test_words_that_cannot_be_used_are_refused_and_nothing_changes(components, placeholder, initializer, message):
    tokenizer, encoder = components["tokenizer"], components["text_encoder"]
    size, table = len(tokenizer), encoder.get_input_embeddings()
    with pytest.raises(ValueError, match=message):
        reversion.add_placeholder(tokenizer, encoder, placeholder, initializer)
    assert len(tokenizer) == size and encoder.get_input_embeddings() is table


def test_a_placeholder_that_was_added_before_is_refused(components):
    tokenizer, encoder = components["tokenizer"], components["text_encoder"]
    reversion.add_placeholder(tokenizer, encoder, "<R>", "red")
    with pytest.raises(ValueError, match="'<R>' is in the tokenizer's vocabulary"):
        reversion.add_placeholder(tokenizer, encoder, "<R>", "red")


def test_other_models_are_refused():
    stable = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    stable["text_encoder"] = ["transformers", "CLIPTextModel"]
    reversion.refuse_other_models(stable, "base")
    with pytest.raises(ValueError, match="base is a PixArtAlphaPipeline, which has no textual inversion"):
        reversion.refuse_other_models({"_class_name": "PixArtAlphaPipeline"}, "base")
    with pytest.raises(ValueError, match="expected a Stable Diffusion"):
        reversion.refuse_other_models(stable | {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "base")


def test_the_target_is_noise_or_velocity():
    latents, noise, t = rows(2, 4), rows(2, 4, seed=1), torch.tensor([10, 900])
    scheduler = DDPMScheduler(prediction_type="epsilon")
    assert reversion.training_target(scheduler, latents, noise, t) is noise
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    a = scheduler.alphas_cumprod[t][:, None]
    expected = a.sqrt() * noise - (1 - a).sqrt() * latents
    torch.testing.assert_close(reversion.training_target(scheduler, latents, noise, t), expected)
    with pytest.raises(ValueError, match="'sample'"):
        reversion.training_target(DDPMScheduler(prediction_type="sample"), latents, noise, t)


def test_a_row_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="<R> is not finite"):
        reversion.save_learned_embedding(tmp_path / "file.safetensors", "<R>", torch.tensor([1.0, float("nan")]))
    assert list(tmp_path.iterdir()) == []


# --- the data ---


@pytest.fixture
def folder(tmp_path):
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{k}.png")
    (tmp_path / "text.json").write_text(json.dumps({"0.png": ["red {} blue"], "1.png": ["blue {} red", "a {} b"]}))
    return tmp_path


def test_images_and_captions_are_read_in_order(folder):
    found = RelationImages(folder, size=16)
    assert found.names == ["0.png", "1.png"] and found.templates == [["red {} blue"], ["blue {} red", "a {} b"]]
    assert found.pixels.shape == (2, 3, 16, 16)
    assert found.pixels[0, :, 3, 3].tolist() == [1, -1, -1] and found.pixels[1, :, 3, 3].tolist() == [-1, -1, 1]


def test_images_are_squeezed_or_cropped_but_not_flipped(folder):
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :5] = 255  # the left quarter
    Image.fromarray(pixels).save(folder / "0.png")
    squeezed = RelationImages(folder, size=8).pixels[0, 0, 4]
    assert squeezed[0] == 1 and squeezed[-1] == -1
    cropped = RelationImages(folder, size=8, center_crop=True).pixels[0, 0, 4]
    assert (cropped < -0.9).all()


def write(folder, captions):
    (folder / "text.json").write_text(captions if isinstance(captions, str) else json.dumps(captions))


@pytest.mark.parametrize(
    "captions, error, message",
    [
        ({"0.png": ["red {} blue"], "1.png": ["red blue"]}, ValueError, r"text.json: 1.png: 'red blue' must hold {}"),
        ({"0.png": ["red {} blue"], "1.png": ["{} {}"]}, ValueError, r"1.png: '{} {}' must hold {} exactly once"),
        ({"0.png": ["red {} {blue}"], "1.png": ["a {} b"]}, ValueError, r"0.png: .*no other brace"),
        ({"0.png": ["red {} blue"]}, ValueError, "no captions for '1.png'"),
        ({"0.png": ["a {} b"], "1.png": []}, ValueError, r"1.png has \[\], expected a list"),
        ({"0.png": ["a {} b"], "1.png": "a {} b"}, ValueError, "expected a list"),
        ({"0.png": ["a {} b"], "1.png": ["a {} b"], "../2.png": ["a {} b"]}, FileNotFoundError, r"names '../2.png'"),
        (["a {} b"], ValueError, "holds a list"),
        ("{", ValueError, "text.json is no JSON"),
    ],
)
def test_wrong_captions_are_refused(folder, captions, error, message):
    write(folder, captions)
    with pytest.raises(error, match=message):
        RelationImages(folder, size=8)


def test_missing_files_are_refused(folder, tmp_path_factory):
    (folder / "1.png").write_text("no image")
    with pytest.raises(ValueError, match="1.png cannot be read as an image"):
        RelationImages(folder, size=8)
    (folder / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="names '1.png', which is not among the images"):
        RelationImages(folder, size=8)
    (folder / "text.json").unlink()
    with pytest.raises(FileNotFoundError, match="text.json is missing"):
        RelationImages(folder, size=8)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        RelationImages(tmp_path_factory.mktemp("empty"), size=8)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        RelationImages(folder / "nowhere", size=8)


def test_a_caption_that_loses_the_placeholder_is_refused(folder, components):
    tokenizer = components["tokenizer"]
    reversion.add_placeholder(tokenizer, components["text_encoder"], "<R>", "red")
    images = RelationImages(folder, size=8)
    images.check_tokens(tokenizer, "<R>")
    write(folder, {"0.png": [30 * "red " + "{} blue"], "1.png": ["a {} b"]})
    with pytest.raises(ValueError, match="0.png: .* is cut off before its {}, at 24 tokens"):
        RelationImages(folder, size=8).check_tokens(tokenizer, "<R>")
