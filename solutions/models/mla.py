"""Multi-head latent attention (MLA; DeepSeek-V2, 2024): all heads' keys and values are made of one short vector for each token.

How it differs from ``llama.py``: a projection makes a *latent* of a token's hidden state, which is normalised, and another one
makes each head's key and value of that. So the latent is all that has to be cached, and one more key, which RoPE turns and all
heads share: 576 numbers a token and layer in every DeepSeek, where 128 heads of 128 elements would need 32,768. Queries may be
made of a latent of their own, which saves weights and is not cached.

What makes a head's key of a latent can as well be applied to the query, for ``q · (W c) = (Wᵀ q) · c``, and what makes a value
of it to the sum over the context. With this *absorbed* way latents are never expanded; ``attention/latent_attention.py`` says
when it is taken. Each rank has some of the heads and the whole cache, which cannot be cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.latent_attention import LatentBackend, LatentPlan, Prompt
from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Layer, Linear, copy_weight
from ..parallelism.tensor_parallel import ColumnParallelLinear, RowParallelLinear, Shard, TensorParallel
from .config.latent import Latent
from .config.model_config import ModelConfig
from .layers import RMSNorm
from .llama import LlamaAttention
from .rope import rotate_

NORM_EPS = 1e-6
"""Of the norms of latents, whatever config.json says of the others."""


class UpProjection(Linear):
    """Keys (without their turning part) and values of this rank's heads from latents: [L, rank] -> [L, H·(still + value)]."""

    def __init__(self, latent: Latent, heads: Shard) -> None:
        self.rows = heads.times(latent.still + latent.value)
        super().__init__(latent.rank, len(self.rows), False)
        self.num_heads, self.rank = len(heads), latent.rank
        self._matrices: Tensor | None = None

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        copy_weight(param, self.rows.of(loaded))

    def matrices(self, like: Tensor) -> Tensor:
        """Each head's matrix, [H, still + value, rank], of the type and where `like` is: what the projection says of the
        identity, whichever kernel computes it and however its weight is kept. Made once, beside that weight."""
        if self._matrices is None:
            unit = torch.eye(self.rank, dtype=like.dtype, device=like.device)
            self._matrices = self(unit).t().contiguous().view(self.num_heads, -1, self.rank)
        return self._matrices


class LatentAttention(LlamaAttention):
    """Projections around attention over cached latents."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        Layer.__init__(self)  # of LLaMA's it shares what it is called with, and no layer
        assert config.latent is not None
        assert config.attention_scale is not None
        self.latent = latent = config.latent
        self.scale = config.attention_scale
        self.group, self.layer = config.place_of(layer)
        heads, hidden, bias = parallel.heads(config)[0], config.hidden_size, config.attention_bias
        self.num_heads = len(heads)
        queries = {"q": heads.times(latent.query_dim)}
        if latent.query_rank is None:
            self.q_proj = ColumnParallelLinear(hidden, queries, False)
        else:
            self.q_a_proj = Linear(hidden, latent.query_rank, bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, NORM_EPS)
            self.q_b_proj = ColumnParallelLinear(latent.query_rank, queries, False)
        self.kv_a_proj_with_mqa = Linear(hidden, latent.cached, bias)
        self.kv_a_layernorm = RMSNorm(latent.rank, NORM_EPS)
        self.kv_b_proj = UpProjection(latent, heads)
        self.o_proj = RowParallelLinear(heads.times(latent.value), hidden, config.output_bias, parallel)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, metadata: AttentionMetadata, add_to: Tensor | None
    ) -> Tensor:
        assert rope is not None
        latent = self.latent
        still, turned = self.project(x).view(len(x), self.num_heads, -1).split((latent.still, latent.turning), dim=-1)
        compressed, key = self.kv_a_proj_with_mqa(x).split((latent.rank, latent.turning), dim=-1)
        key = self._turn(key[:, None], rope)[:, 0]
        vectors = torch.cat((self.kv_a_layernorm(compressed.contiguous()), key), dim=-1)
        assert isinstance(metadata.backend, LatentBackend)
        metadata.backend.rank = latent.rank
        heads = self.attend(still, self._turn(turned, rope), vectors, metadata.of(self.group))
        return self.o_proj(heads.view(len(x), -1), add_to)

    def project(self, x: Tensor) -> Tensor:
        """Queries before they are turned: [T, hidden] -> [T, H·(still + turning)]."""
        if self.latent.query_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _turn(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`heads` [T, any number, turning], turned by RoPE, the pairs' first elements before all second ones."""
        if self.latent.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2)
        return rotate_(heads.flatten(2), rope)

    def attend(self, still: Tensor, turned: Tensor, vectors: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Write this step's vectors and attend, each sequence the way that the step's plan says.

        The backend's `attend` is called once: it writes all tokens' vectors, whichever way they go, and for the tokens of
        `plan.absorbed` it sums whole vectors of their context, weighted by the softmax of query · vector · `scale`. The query
        is a head's matrix for keys (of `kv_b_proj.matrices` the first `still` rows) applied to `still` from the other side, and
        `turned` behind it. The matrix for values (the other rows) is applied to the latent of the sum. `plan.prompts` go by
        `attend_plainly`, each over all vectors of its context, this step's among them.

        Args:
            still, turned: [T, H, still] and [T, H, turning], the parts of the queries. vectors: [T, rank + turning].

        Returns:
            [T, H, value].
        """
        latent, backend, plan = self.latent, metadata.backend, metadata.plan
        assert isinstance(backend, LatentBackend)
        assert isinstance(plan, LatentPlan)
        up, rows = self.kv_b_proj.matrices(vectors), plan.absorbed
        query = vectors.new_empty(len(vectors), self.num_heads, latent.cached)
        query[rows] = torch.cat((torch.einsum("thn,hnr->thr", still[rows], up[:, : latent.still]), turned[rows]), dim=-1)
        first, second = vectors[:, None].chunk(2, dim=-1)
        sums = backend.attend(self.layer, query, first, second, metadata, self.scale)[rows]
        out = vectors.new_empty(len(vectors), self.num_heads, latent.value)
        out[rows] = torch.einsum("thr,hvr->thv", sums[..., : latent.rank], up[:, latent.still :])
        for prompt in plan.prompts:
            query = torch.cat((still[prompt.tokens], turned[prompt.tokens]), dim=-1)
            out[prompt.tokens] = self.attend_plainly(query, backend.vectors(self.layer, metadata, prompt.slots), prompt)
        return out

    def attend_plainly(self, query: Tensor, vectors: Tensor, prompt: Prompt) -> Tensor:
        """Attention of a prompt over the keys and values that its vectors stand for, each token over those that it may see.

        `kv_b_proj` makes of latents, for one head behind the other, its key (`still` elements) and its value. Behind the key
        comes the vector's turning part, the same for all heads. Scores are query · key · `scale`. Values may be narrower than
        keys, or wider.

        Args:
            query: [Q, H, still + turning]. vectors: [L, rank + turning].

        Returns:
            [Q, H, value].
        """
        latent = self.latent
        shared, turned = vectors.split((latent.rank, latent.turning), dim=-1)
        heads = self.kv_b_proj(shared.contiguous()).view(len(vectors), self.num_heads, -1)  # [L, H, still + value]
        key = torch.cat((heads[..., : latent.still], turned[:, None].expand(-1, self.num_heads, -1)), dim=-1)
        # as wide as the keys, or PyTorch has no fused kernel
        value = key.new_zeros(len(vectors), self.num_heads, max(latent.query_dim, latent.value))
        value[..., : latent.value] = heads[..., latent.still :]
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, H, Q or L, ...]
        out = F.scaled_dot_product_attention(q, k, v, prompt.seen, scale=self.scale)
        return out[0].transpose(0, 1)[..., : latent.value]
