"""What a ``config.json`` says of attention over latents (multi-head latent attention, MLA)."""

from __future__ import annotations

from dataclasses import dataclass

from .entries import Entries, ModelError


@dataclass(frozen=True, slots=True)
class Latent:
    """A short vector for each token, which all heads make their keys and values of.

    Attributes:
        rank: elements of a token's latent. query_rank: of the one for queries; None: they are made of hidden states.
        still, turning: elements of each head's query and key that know nothing of positions, and those that RoPE turns. The
            latter are one vector for all heads' keys, cached behind the latent.
        value: elements of each head's value.
        interleaved: RoPE turns pairs (2i, 2i + 1).
    """

    rank: int
    query_rank: int | None
    still: int
    turning: int
    value: int
    interleaved: bool

    @property
    def query_dim(self) -> int:
        """Elements of a head's query."""
        return self.still + self.turning

    @property
    def cached(self) -> int:
        """Elements in the cache for a token and layer."""
        return self.rank + self.turning

    def num_weights(self, hidden: int, heads: int) -> int:
        """Weights of a layer's projections."""
        queries = heads * self.query_dim
        of_queries = hidden * queries if self.query_rank is None else self.query_rank * (hidden + queries)
        of_heads = heads * self.rank * (self.still + self.value)
        return of_queries + hidden * self.cached + of_heads + heads * self.value * hidden


def read_latent(hf: Entries, interleaved: bool) -> Latent:
    """The latents of a DeepSeek.

    Raises:
        ModelError: a number is missing or wrong.
    """
    latent = Latent(
        hf.whole("kv_lora_rank"), hf.whole("q_lora_rank", None), hf.whole("qk_nope_head_dim"), hf.whole("qk_rope_head_dim"),
        hf.whole("v_head_dim"), interleaved,
    )  # fmt: skip
    if latent.cached % 2:
        raise ModelError(f"config.json: kv_lora_rank + qk_rope_head_dim must be even, got {latent.cached}")
    return latent
