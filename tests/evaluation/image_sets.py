"""Small sets of images on disk, and random networks for the metrics."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def random_images(count, size=40, seed=0):
    """uint8 arrays (count, size, size, 3), smooth enough to differ after resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(pixels).resize((size, size), Image.BILINEAR)) for pixels in coarse])


def write_set(folder, images, prompts=None, groups=None):
    """A generated set as `wadi evaluate` writes it."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, pixels in enumerate(images):
        name = f"images/{i:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        prompt = prompts[i] if prompts else f"a thing, number {i}"
        group = groups[i] if groups else None
        lines.append(json.dumps({"file": name, "index": i, "prompt": prompt, "seed": i, "group": group}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_images(folder, images):
    """Real images: files alone, in a subfolder."""
    (Path(folder) / "inner").mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(Path(folder) / "inner" / f"{i}.png")
    return Path(folder)


def random_inception(path, monkeypatch):
    """torch-fidelity's InceptionV3 with random weights, as a file."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # its constructor wants weights; it is given none
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        made = network("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Conv2d):  # as large as they keep the size of what passes
            inputs = layer.weight[0].numel()
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / inputs) ** 0.5)
    torch.save(made.state_dict(), path)
    return path


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_clip(folder, name="tiny-clip"):
    """Register a tiny model with open_clip, and write random weights of it; returns the model and the file."""
    import open_clip

    config, weights = Path(folder) / f"{name}.json", Path(folder) / f"{name}.pt"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), weights)
    return model.eval(), weights
