"""What a drafting head says of a whole text at once, at each depth of a draft, so that it can be trained.

At depth 0 the head reads true features. At depth j it reads its own outputs of depth j - 1 in their place, a position further,
as it does when it drafts: a position attends to keys of true features up to j positions before it, and behind these to the j
keys of its own draft. Source: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time
Test", NeurIPS 2025, §3.2.

Letters: B texts, n positions of each, H query heads, H_kv key/value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.config.model_config import ModelConfig
from ...models.heads.eagle import EagleHead
from ...models.llama import GatedMLP

Rope = tuple[Tensor, Tensor]


class UnrolledHead:
    """A head's outputs with gradients.

    Args:
        head: without kernels; its parameters may need gradients. config: the target's. rope: of the positions, each [n, 1, D].
    """

    def __init__(self, head: EagleHead, config: ModelConfig, rope: Rope) -> None:
        self.head, self.config = head, config
        self.cos, self.signed_sin = (each.transpose(0, 1) for each in rope)  # [1, n, D]

    def __call__(self, embedded: Tensor, features: Tensor, depth: int) -> list[Tensor]:
        """Outputs of each depth, [B, n, hidden]; that of depth j at position p stands for the feature of p + 1, and is worth
        nothing at positions before j.

        Args:
            embedded: [B, n, hidden], of the token behind each position. features: [B, n, hidden].
        """
        outputs: list[Tensor] = []
        drafted: list[tuple[Tensor, Tensor]] = []
        for _ in range(depth):
            outputs.append(self._run(embedded, features, drafted))
            features = behind(outputs[-1], 1)
        return outputs

    def _run(self, embedded: Tensor, features: Tensor, drafted: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The head at one depth; appends its keys and values [B, H_kv, n, D] to those of the depths before."""
        head, layer, mlp = self.head, self.head.layer, self.head.layer.mlp
        assert isinstance(mlp, GatedMLP)  # as in every LLaMA
        x = F.linear(torch.cat((embedded, features), dim=-1), head.fc.weight)
        normed = self._norm(x, layer.input_layernorm.weight)
        x = x + F.linear(
            self._attend(F.linear(normed, layer.self_attn.qkv_proj.weight), drafted), layer.self_attn.o_proj.weight
        )
        normed = self._norm(x, layer.post_attention_layernorm.weight)
        gate, up = F.linear(normed, mlp.gate_up_proj.weight).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, mlp.down_proj.weight)
        return self._norm(x, head.norm.weight)

    def _attend(self, qkv: Tensor, drafted: list[tuple[Tensor, Tensor]]) -> Tensor:
        heads, kv_heads, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        split = qkv.unflatten(-1, (-1, size)).transpose(1, 2)  # [B, H + 2·H_kv, n, D]
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        drafted.append((self._rotate(k), v))
        depth, n = len(drafted) - 1, q.shape[2]
        q = self._rotate(q).unflatten(1, (kv_heads, -1)) * size**-0.5  # [B, H_kv, H / H_kv, n, D]
        keys, values = (each.unsqueeze(2) for each in drafted[0])
        unseen = torch.ones(n, n, dtype=torch.bool).triu(1 - depth)
        scores = [(q @ keys.transpose(-1, -2)).masked_fill(unseen, float("-inf"))]
        own = [[behind(each, depth - place, dim=2).unsqueeze(2) for each in drafted[place]] for place in range(1, depth + 1)]
        scores += [(q * key).sum(dim=-1, keepdim=True) for key, _ in own]
        weights = torch.cat(scores, dim=-1).float().softmax(dim=-1).to(values.dtype)  # [B, H_kv, H / H_kv, n, n + depth]
        out = weights[..., :n] @ values
        for place, (_, value) in enumerate(own):
            out = out + weights[..., n + place : n + place + 1] * value
        return out.flatten(1, 2).transpose(1, 2).flatten(2)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.config.norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        return x * self.cos + x.roll(x.shape[-1] // 2, dims=-1) * self.signed_sin


def behind(x: Tensor, count: int, dim: int = 1) -> Tensor:
    """The same, so many positions further along `dim`; zeros in front."""
    if count == 0:
        return x
    kept = x.narrow(dim, 0, x.shape[dim] - count)
    return torch.cat((torch.zeros_like(x.narrow(dim, 0, count)), kept), dim=dim)
