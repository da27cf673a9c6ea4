"""How much wider for which size: ScaleCrafter's own settings for Stable Diffusion 1.5 and 2.1, and a rule for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

PRESET_NATIVE = 512  # pixels; the presets are for models of this size
RULE = "rule"


@dataclass(frozen=True)
class ScaleCrafterSettings:
    """What ScaleCrafter does to a UNet. Layers are named as in the UNet, one by one or by the block around them.

    Args:
        factors: layer -> how many times wider its field becomes, at least 1.
        weak_factors: the same for the weaker pass of noise-damped guidance.
        dispersed: layers whose kernel is dispersed as well.
        until: share of a multi-step schedule, from its noisy end, in which this holds; the rest runs unchanged. One
            step is always inside.
        progressive: factors fall during that share, s -> min(s, max(ceil(s * what is left of it), 2)).
        source: "sd15" or "sd21" for ScaleCrafter's own settings, "rule" for what was extrapolated from them.
    """

    factors: dict[str, float]
    weak_factors: dict[str, float] = field(default_factory=dict)
    dispersed: tuple[str, ...] = ()
    until: float = 1.0
    progressive: bool = False
    source: str = RULE


def _levels(values: dict[int, float], middle: float | None, depth: int = 4) -> dict[str, float]:
    """Resolution level (0 the finest) -> factor, for a UNet of `depth` levels, as factors by block."""
    down = {f"down_blocks.{level}": value for level, value in values.items()}
    up = {f"up_blocks.{depth - 1 - level}": value for level, value in values.items()}
    return down | up | ({} if middle is None else {"mid_block": middle})


_DISPERSED = ("down_blocks.2.downsamplers", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.1")
_WIDE = {
    "factors": _levels({1: 2.0, 2: 3.0, 3: 4.0}, 4.0),
    "weak_factors": _levels({2: 3.0, 3: 4.0}, 4.0),
    "progressive": True,
}
_SD21_WEAK = {
    "down_blocks.2.resnets": 3.0,
    "down_blocks.2.downsamplers": 4.0,
    "down_blocks.3": 4.0,
    "mid_block": 4.0,
    "up_blocks.0": 4.0,
    "up_blocks.1": 4.0,
    "up_blocks.2": 3.0,
}


def _even(factor: float, until: float) -> dict:
    return {"factors": _levels(dict.fromkeys((1, 2, 3), factor), factor), "until": until}


# (height, width) in pixels -> settings, as in ScaleCrafter's configuration files.
PRESETS: dict[str, dict[tuple[int, int], dict]] = {
    "sd15": {
        (1024, 1024): _even(2.0, 0.6),
        (1280, 1280): _even(2.5, 0.7),
        (1024, 2048): _WIDE | {"until": 0.7},
        (2048, 2048): _WIDE | {"until": 0.7, "dispersed": _DISPERSED},
    },
    "sd21": {
        (1024, 1024): _even(2.0, 0.4),
        (1280, 1280): _even(2.5, 0.6),
        (1024, 2048): _WIDE | {"until": 0.74, "weak_factors": _SD21_WEAK},
        (2048, 2048): {
            "factors": _SD21_WEAK | {"up_blocks.3": 2.0},
            "weak_factors": _SD21_WEAK,
            "dispersed": _DISPERSED,
            "until": 0.74,
            "progressive": True,
        },
    },
}


def preset_settings(name: str, height: int, width: int) -> ScaleCrafterSettings:
    """ScaleCrafter's own settings for "sd15" (Stable Diffusion 1.x) or "sd21" (2.1-base, 512 pixels).

    `weak_factors` and `dispersed` are what the preset names for those options; neither is on by itself.

    Raises:
        ValueError: no such name, or a size (in pixels) that ScaleCrafter has no settings for.
    """
    if name not in PRESETS:
        raise ValueError(
            f"no preset {name!r}; there are {', '.join(map(repr, PRESETS))}, and {RULE!r} for other models"
        )
    if (height, width) not in PRESETS[name]:
        sizes = ", ".join(f"{w}x{h}" for h, w in PRESETS[name])
        raise ValueError(
            f"ScaleCrafter has no settings for {name!r} at width x height {width}x{height}, only at {sizes}. Take one of "
            f"these, or preset={RULE!r} for factors by extrapolation."
        )
    return ScaleCrafterSettings(**PRESETS[name][height, width], source=name)


def rule_settings(native: int, depth: int, height: int, width: int) -> ScaleCrafterSettings:
    """Settings extrapolated from the presets (not ScaleCrafter's, and tried by nobody but where it says so).

    With S = max(height, width) / native: nothing for S <= 1; S on every level but the finest for S <= 2.5; else from S/2
    on the second finest level to S on the coarsest, and progressive. The weak pass leaves the second finest level out.

    Args:
        native: side in pixels that the model was trained at. depth: resolution levels of its UNet.
    """
    ratio = max(height, width) / native
    if ratio <= 1:
        return ScaleCrafterSettings({})
    levels = range(1, depth)
    if ratio <= 2.5:
        values = dict.fromkeys(levels, ratio)
    else:
        values = {level: ratio * (0.5 + 0.5 * (level - 1) / (depth - 2)) if depth > 2 else ratio for level in levels}
    last = depth - 1
    dispersed = (f"down_blocks.{last}", "mid_block", "up_blocks.0")
    if depth > 2:
        dispersed = (f"down_blocks.{last - 1}.downsamplers", *dispersed, "up_blocks.1")
    return ScaleCrafterSettings(
        factors=_levels(values, ratio, depth),
        weak_factors=_levels({level: value for level, value in values.items() if level > 1}, ratio, depth),
        dispersed=dispersed,
        until=0.6 if ratio <= 2.5 else 0.7,
        progressive=ratio > 2.5,
    )


def strengthened(factors: dict[str, float], strength: float) -> dict[str, float]:
    """s -> 1 + strength (s - 1)."""
    return {name: 1 + strength * (factor - 1) for name, factor in factors.items()}


def check_factors(factors: dict[str, float]) -> None:
    """Raises ValueError for a factor that is no number of at least 1."""
    for name, factor in factors.items():
        if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor < 1:
            raise ValueError(f"the factor of {name!r} has to be a number of at least 1, but is {factor!r}")


def read_factors(path: str | Path) -> dict[str, float]:
    """Factors from a file in ScaleCrafter's form, one `layer:factor` per line.

    Raises:
        ValueError: a line of another form, or a factor below 1.
    """
    factors = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        name, _, value = line.strip().rpartition(":")
        if not line.strip():
            continue
        try:
            factors[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"{path}, line {number}: expected 'layer:factor', such as 'mid_block:2.0', got {line!r}")
    check_factors(factors)
    return factors
