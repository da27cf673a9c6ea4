"""LoRaD on an Embedding, and on the Conv1D of transformers.

The weight vector of a Linear is a row of (out, in): what one output reads. That of an Embedding is the vector of one
token, a row of (num_embeddings, embedding_dim). So the pairs are adjacent columns of embedding_dim, every token has
angles of its own, and its vector keeps its length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad.layer import LoRaDLinear, OneTensorLayer
from diffusers_wadi.lorad.offload import onloaded
from diffusers_wadi.lorad.rotation import lorad_linear, turn_weight, turned_rows

__all__ = ["LoRaDEmbedding", "LoRaDTransposedLinear"]


class LoRaDEmbedding(OneTensorLayer):
    """`nn.Embedding` with LoRaD adapters: `A` (num_embeddings, r), `B` (r, embedding_dim // 2).

    (...) of token numbers -> (..., embedding_dim).

    Only the vectors that are looked up are turned, and only their rows of `A` get a gradient. As in the base,
    `padding_idx` gets none, so that its vector stays as it is; `sparse` and `scale_grad_by_freq` hold for `A`.
    """

    adapts = (nn.Embedding,)

    @torch.no_grad()
    def reset_lorad_parameters(self, adapter_name: str, identity: bool = True) -> None:
        """As for every layer, but for the token at `padding_idx`, whose angles are and stay zero."""
        super().reset_lorad_parameters(adapter_name, identity)
        if (padding := self.get_base_layer().padding_idx) is not None:
            self.lorad_A[adapter_name][padding] = 0.0

    def _with_adapters(self, x: Tensor, names: list[str]) -> Tensor:
        # What the base makes of its rows (a scale, a limit to their lengths) commutes with turning them.
        inner = self.get_base_layer()
        for adapter in self._inner_adapters():
            if adapter.merged:
                adapter.unmerge()
        plain = inner(x)
        rows = plain.reshape(-1, plain.shape[-1])
        with onloaded(self.lorad_A, self.lorad_B):
            turned = turned_rows(rows, *self._looked_up(x.flatten(), names)).view_as(plain)
        # Over another adapter (a LoRA, say) LoRaD adds the change that it makes to the base alone.
        return turned if inner is self.base_layer else self.base_layer(x) + (turned - plain)

    def _looked_up(self, x: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """The factors of these tokens alone, (tokens, sum of ranks) and (sum of ranks, embedding_dim // 2)."""
        inner = self.get_base_layer()
        how = (inner.padding_idx, None, 2.0, inner.scale_grad_by_freq, inner.sparse)
        A = [F.embedding(x, self.lorad_A[name], *how) * self.scaling[name] for name in names]
        B = [self.lorad_B[name] for name in names]
        return (A[0], B[0]) if len(names) == 1 else (torch.cat(A, dim=1), torch.cat(B))

    def _refuse_unmergeable(self) -> None:
        super()._refuse_unmergeable()
        if (limit := self.get_base_layer().max_norm) is not None:
            raise ValueError(
                f"This Embedding rewrites its weight in every call (max_norm={limit}), so that what is merged into it "
                "could not be taken out again. Limit its vectors once (`weight.data.renorm_(2, 0, max_norm)`) and set "
                "`max_norm = None` before merging, or use the adapter unmerged."
            )


class LoRaDTransposedLinear(LoRaDLinear):
    """The `Conv1D` of transformers (GPT-2), a Linear layer whose weight is stored as (in, out), with LoRaD adapters.

    The same pairs as in the Linear of the same function: adjacent inputs, that is rows of the stored weight. Where the
    number of inputs is odd, the last one has no partner and its weights stay as they are.
    """

    adapts = (Conv1D,)

    def _turn(self, weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, wide: bool = False) -> Tensor:
        return turn_weight(weight.T, A, B, dtype, wide).T

    def _turned(self, x: Tensor, A: Tensor, B: Tensor, bias: bool = True) -> Tensor:
        inner = self.get_base_layer()
        dtype = x.dtype if inner.weight.dtype.itemsize == 1 else None
        return lorad_linear(x, inner.weight.T, inner.bias if bias else None, A, B, dtype)

    def _rotated_weight(self, names: list[str], scaling: dict[str, float], dtype: torch.dtype) -> Tensor:
        return turn_weight(self._base_weight().T, *self._factors(names, scaling), dtype)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_base_layer().weight.T)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` reads the change as (out, in), which it is not here."""
        return False
