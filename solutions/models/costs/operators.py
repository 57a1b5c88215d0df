"""What the operators of a LLaMA decode step have to move and to compute, whoever computes them."""

from __future__ import annotations

from ..config.model_config import ModelConfig

OPERATORS = ("norm before attention", "qkv_proj", "rope", "attention", "o_proj, + residual", "norm before MLP",
             "gate_up_proj, SiLU·mul", "down_proj, + residual")  # fmt: skip
"""The kernels of a LLaMA layer in their order."""


def costs(model: ModelConfig, batch: int, context: int, weight: int, element: int) -> dict[str, tuple[int, int]]:
    """Operator → (bytes, operations) over all layers; a weight has `weight` bytes, an activation or cached value `element`."""
    hidden, q, kv = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim

    def product(n_in: int, n_out: int, written: int) -> tuple[int, int]:
        return n_in * n_out * weight + element * batch * (n_in + written), 2 * batch * n_in * n_out

    norm = (2 * element * batch * hidden, 4 * batch * hidden)
    per_layer = (
        norm,
        product(hidden, q + 2 * kv, q + 2 * kv),
        (2 * element * batch * (q + kv), 3 * batch * (q + kv)),
        (2 * element * batch * (context * kv + q + kv), 4 * batch * context * q),
        product(q, hidden, 2 * hidden),
        norm,
        product(hidden, 2 * model.intermediate_size, model.intermediate_size),
        product(model.intermediate_size, hidden, 2 * hidden),
    )
    table = {name: (model.num_layers * b, model.num_layers * o) for name, (b, o) in zip(OPERATORS, per_layer, strict=True)}
    table["lm_head"] = product(hidden, model.vocab_size, model.vocab_size)
    table["arg-max"] = (element * batch * model.vocab_size, batch * model.vocab_size)
    return table
