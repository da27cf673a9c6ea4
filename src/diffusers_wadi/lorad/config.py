"""The settings of a LoRaD adapter, in PEFT's convention."""

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from diffusers_wadi.lorad.registration import lorad_peft_type

__all__ = ["LoRaDConfig"]

_BIAS_CHOICES = ("none", "all", "lorad_only")
_INIT_CHOICES = (True, False, "paper", "xavier")


@dataclass
class LoRaDConfig(PeftConfig):
    """Which layers of a model get a LoRaD adapter, and of which rank.

    Args:
        r: rank of the angle matrix, at least 1. Default 64 (DreamBooth in the paper; its one-step students use 256 for
            SD and 128 for PixArt, its fake-score networks 32).
        target_modules: module names (full, or their last parts), a regular expression over full names, or "all-linear".
            By default the paper's student layers of a UNet2DConditionModel or PixArtTransformer2DModel; other
            diffusers models need it spelled out (see `lorad_target_modules`).
        exclude_modules: names or a regular expression of modules to leave alone. Default None.
        init_lorad_weights: True (default) or "paper": `A` zero and `B` Xavier-uniform, as in the authors' release, so
            that the adapter starts as the identity. "xavier": both Xavier-uniform (the paper's ablation). False: as "xavier",
            PEFT's convention for a start that is not the identity.
        init_weights: PEFT's name for the same choice; False means a start that is not the identity. Default True.
        rank_pattern: module name or regular expression -> rank, where it differs from `r`. Default {}.
        layers_to_transform: indices of the layers to adapt, with a list in `target_modules`. Default None: all.
        layers_pattern: name of the list those indices count in; needs `layers_to_transform`. Default None.
        modules_to_save: further modules to train in full and to save with the adapter. Default None.
        trainable_token_indices: rows of an embedding to train in full beside the adapter: a list (of the input
            embedding) or a dictionary from module name to list. Default None.
        bias: "none" (default), "all" or "lorad_only": which biases of the base are trained as well.

    Raises:
        ValueError: a rank below 1, an unknown choice, or settings that contradict one another.
    """

    r: int = field(default=64, metadata={"help": "rank of the angle matrix"})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "modules to adapt"})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "modules to leave"})
    init_lorad_weights: bool | Literal["paper", "xavier"] = field(
        default=True, metadata={"help": "True, False, paper or xavier"}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: do not start as the identity"})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "ranks by module"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens trained in full"}
    )
    bias: Literal["none", "all", "lorad_only"] = field(default="none", metadata={"help": "biases to train"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = lorad_peft_type()
        self.rank_pattern = self.rank_pattern or {}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_ranks()
        self._check_choices()
        self._check_layers()

    @property
    def starts_as_identity(self) -> bool:
        """Whether a new adapter leaves the base as it is (`A` = 0)."""
        return self.init_weights is not False and self.init_lorad_weights in (True, "paper")

    def _check_ranks(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"A LoRaD rank has to be an integer of at least 1, got {rank!r} for `{name}`. Set `r` (usual: 32 "
                    "to 256) or `rank_pattern` accordingly; to leave a layer alone, name it in `exclude_modules`."
                )

    def _check_choices(self) -> None:
        choices = {"bias": _BIAS_CHOICES, "init_lorad_weights": _INIT_CHOICES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` has to be one of {allowed}, got {getattr(self, name)!r}.")

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` ({self.layers_to_transform}) picks from a list of names, but `target_modules` "
                f"is the string {self.target_modules!r}. Pass a list, or put the indices into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` ({self.layers_pattern!r}) needs `layers_to_transform`, the indices to adapt."
            )
