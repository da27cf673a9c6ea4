"""Figures: what is drawn are the numbers of the analysis."""

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image

from diffusers_wadi.analysis import analyze_weights, plot_energies, plot_layers, plot_overview, save_figures

pytest.importorskip("matplotlib", reason="comes with the extra `analysis`")


CHOSEN = r"(conv_in|mid_block\..*)"  # few enough to draw quickly


@pytest.fixture(scope="module")
def analyses():
    torch.manual_seed(0)
    base = tiny_unet()
    generator = torch.Generator().manual_seed(1)
    states = [
        {k: v + size * torch.randn(v.shape, generator=generator) for k, v in base.state_dict().items()}
        for size in (0.02, 0.05)
    ]
    return [
        analyze_weights(base, state, label=label, target_modules=CHOSEN) for state, label in zip(states, ("a", "b/c"))
    ]


def test_bars_are_the_means_of_the_layers(analyses):
    figure = plot_layers(analyses[0])
    for ax, kind in zip(figure.axes, ("norm", "direction")):
        drawn = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in ax.patches}
        assert drawn == pytest.approx({i: getattr(layer, kind).mean() for i, layer in enumerate(analyses[0].layers)})
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()  # one scale, or the eye compares nothing
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(set(labels)) == len(analyses[0].layers)


def test_dots_are_the_means_of_the_analyses(analyses):
    figure = plot_overview(analyses)
    for ax, kind in zip(figure.axes[:2], ("norm", "direction")):
        dots = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert dots == pytest.approx([getattr(a.overall(), f"{kind}_mean") for a in analyses])
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[2].lines}
    expected = np.mean([layer.energy_curve() for layer in analyses[1].layers], axis=0)
    assert np.allclose(curves["b/c"], expected)
    logarithmic = plot_overview(analyses, logarithmic=True)
    dots = [line.get_ydata()[0] for line in logarithmic.axes[1].lines if line.get_marker() == "o"]
    assert dots == pytest.approx([np.log10(a.overall().direction_mean) for a in analyses])


def test_files(analyses, tmp_path):
    paths = save_figures(analyses, tmp_path / "figures")
    names = ["overview", "layers-a", "energies-a", "layers-b-c", "energies-b-c"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 300 and pixels.std() > 5
    (path, *_) = save_figures(analyses[:1], tmp_path, ["pdf"])
    assert path.name == "overview.pdf" and path.read_bytes().startswith(b"%PDF")
    assert (tmp_path / "layers.pdf").is_file()


def test_an_analysis_without_changes_can_be_drawn(analyses):
    base = tiny_unet()
    nothing = analyze_weights(base, base.state_dict(), label="same", target_modules=CHOSEN)
    for figure in (plot_overview([nothing]), plot_overview([nothing, analyses[0]]), plot_layers(nothing)):
        figure.canvas.draw()
    plot_energies(nothing).canvas.draw()
