"""What a model looks like: one record made from Hugging Face's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...batching.pooling import Pooling
from ...quantization.layout.formats import Format, read_format
from .entries import Entries, ModelError
from .experts import Mixture
from .families import find_family
from .latent import Latent

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

OTHER_NAMES = {
    "swish": "silu", "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new",
}  # fmt: skip
"""What transformers also calls them; GPT-NeoX-20B says "gelu_fast"."""

MAX_POSITIONS = 1 << 24
"""Positions are float32 on their way to an angle, which is exact up to here."""


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """A model's architecture, the same record for every family.

    Attributes:
        architecture: of one of the families.
        intermediate_size: width of the MLP. mixture: the experts in its place, if there are some.
        num_kv_heads: heads of keys and values; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
        latent: what attention caches in the place of keys and values. A token's is one vector, whose halves lie in the cache
            as a key and a value of one head do, so `num_kv_heads` is 1 and `head_dim` half of its length.
        max_position_embeddings: the context in tokens; linear and YaRN scaling have stretched it already.
        norm_eps: epsilon of RMSNorm or LayerNorm.
        rope_theta: base of the rotary frequencies (unused by GPT-2).
        rope_scaling: None, or ``{"rope_type": ..., **numbers}``, what `rope.read_rope` makes.
        rotary_dim: elements at the start of a head that RoPE turns; None: all.
        layers_without_rope: layers that get no positions.
        parallel_residual: the MLP reads what attention reads, and both are added at once.
        tie_word_embeddings: the LM head is the embedding's own weight.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all.
        layer_windows: the same of each layer, where layers differ; `sliding_window` is None then.
        layers_apart: each layer has a tensor of its own in the KV cache, so that groups of layers may share blocks.
        local_rope_theta: base of the rotary frequencies in layers with a window, which get no scaling; None: as in the others.
        attention_scale: factor on attention's scores; None: ``head_dim ** -0.5``.
        attention_sinks: each head has a score that counts in the softmax and stands for no token.
        attention_soft_cap, logit_soft_cap: scores and logits x become ``cap · tanh(x / cap)``; None: they stay x.
        attention_bias, output_bias, mlp_bias: whether there is a bias in the projections to queries, keys and values, in the
            one behind attention, and in those of the MLP.
        eos_token_ids: tokens that end a text; may be empty.
        torch_dtype: precision that the checkpoint was saved in, such as "bfloat16", if it says so.
        max_model_len: longest sequence that will be served, if that is known to differ from the context. Only the
            RoPE scalings "dynamic" and "longrope" compute with it.
        quantization: how the linear layers' weights are kept in the checkpoint, if they are quantized.
        token_types: kinds of text that an encoder tells apart; 0: the model is none.
        first_position: row of the table of positions that a text begins with.
        pooling: how a text becomes a vector, if the model's files say so.
        sampling: fields of `SamplingParams` that hold unless a request says otherwise.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rotary_dim: int | None = None
    layers_without_rope: tuple[int, ...] = ()
    parallel_residual: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    layers_apart: bool = False
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_sinks: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    mixture: Mixture | None = None
    latent: Latent | None = None
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str | None = None
    max_model_len: int | None = None
    quantization: Format | None = None
    token_types: int = 0
    first_position: int = 0
    pooling: Pooling | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def is_encoder(self) -> bool:
        """Whether it reads texts and writes none."""
        return self.token_types > 0

    @property
    def num_cached_layers(self) -> int:
        """Layers of a group, whose keys and values lie in tensors of their own; the groups share these."""
        if self.layers_apart:
            return self.num_layers
        return 0 if self.is_encoder else max(len(layers) for layers in self.kv_groups)

    @property
    def kv_groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers, in groups that have one window each and blocks of their own. All groups have as many layers, so that
        blocks are of one size, but some may lack a few: as many as leave the fewest places empty."""
        if not self.layer_windows:
            return (tuple(range(self.num_layers)),)
        kinds = [
            [layer for layer, window in enumerate(self.layer_windows) if window == kind]
            for kind in dict.fromkeys(self.layer_windows)
        ]
        sizes = range(min(map(len, kinds)), max(map(len, kinds)) + 1)
        size = min(sizes, key=lambda size: (sum(-(-len(kind) // size) * size for kind in kinds), -size))
        return tuple(tuple(kind[at : at + size]) for kind in kinds for at in range(0, len(kind), size))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each of `kv_groups`; None where it has none."""
        return (
            tuple(self.layer_windows[layers[0]] for layers in self.kv_groups) if self.layer_windows else (self.sliding_window,)
        )

    def place_of(self, layer: int) -> tuple[int, int]:
        """Which of `kv_groups` a layer belongs to, and its place there."""
        group = next(number for number, layers in enumerate(self.kv_groups) if layer in layers)
        return group, layer if self.layers_apart else self.kv_groups[group].index(layer)

    @property
    def rope_dim(self) -> int:
        """Elements of a head that positions are for."""
        return self.head_dim if self.latent is None else self.latent.turning

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's projections around attention."""
        if self.latent is not None:
            return self.latent.num_weights(self.hidden_size, self.num_heads)
        return self.hidden_size * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def attention_kind(self) -> str | None:
        """Attention that few backends compute, see `make_backend`; None: the usual."""
        return "over latents" if self.latent is not None else "with sinks" if self.attention_sinks else None

    @property
    def mlp_width(self) -> int:
        """Columns of all experts of a layer together, or of its MLP."""
        return self.intermediate_size if self.mixture is None else self.mixture.count * self.mixture.size

    @property
    def mlp_elements(self) -> int:
        """What an MLP makes of a token on the way, or the experts that it goes through, in elements."""
        mixture = self.mixture
        if mixture is None:
            return 3 * self.intermediate_size
        widths = mixture.chosen * mixture.size + mixture.shared_size
        return 3 * widths + 2 * (mixture.chosen + 1) * self.hidden_size

    @property
    def longest(self) -> int:
        """The longest sequence that will be served, in tokens."""
        return self.max_position_embeddings if self.max_model_len is None else self.max_model_len

    @property
    def max_context(self) -> int:
        """The longest sequence the positions are made for: dynamic NTK scaling stretches the trained context."""
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Normalise the contents of a ``config.json``, of transformers 4 or 5.

        Raises:
            ModelError: the architecture, or something that it asks for, is not supported, or a number is missing.
        """
        family = find_family(Entries(hf))
        quantized = Entries(hf).entries("quantization_config").content
        try:
            quantization = read_format(quantized) if quantized else None
        except ValueError as error:
            raise ModelError(str(error)) from None
        fields = family.read(Entries(hf))
        fields["hidden_act"] = OTHER_NAMES.get(fields["hidden_act"], fields["hidden_act"])
        config = cls(architecture=family.architecture, quantization=quantization, **fields)
        config._check()
        return config

    def also_ends_at(self, token: int | None) -> ModelConfig:
        """The same model with one more token that ends a text, if the vocabulary has that token."""
        if token is None or token in self.eos_token_ids or not 0 <= token < self.vocab_size:
            return self
        return replace(self, eos_token_ids=(*self.eos_token_ids, token))

    def _check(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(f"activation {self.hidden_act!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.architecture != "GPT2LMHeadModel" and (self.rope_dim < 4 or self.rope_dim % 2):
            raise ModelError(f"heads of {self.rope_dim} elements are not supported: RoPE needs an even number, 4 or more")
        self._check_rotation(self.rotary_dim or self.rope_dim)
        if self.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(
                f"a context of {self.max_position_embeddings} tokens is not supported; the maximum is {MAX_POSITIONS}"
            )

    def _check_rotation(self, rotary_dim: int) -> None:
        if self.rotary_dim is not None and not (2 <= rotary_dim <= self.rope_dim and rotary_dim % 2 == 0):
            raise ModelError(f"RoPE over {rotary_dim} of {self.rope_dim} elements of a head is not supported: it turns pairs")
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "longrope":
            counts = [len(self.rope_scaling[name]) for name in ("short_factor", "long_factor")]
            if counts != [rotary_dim // 2] * 2:
                raise ModelError(
                    f"RoPE scaling longrope needs a divisor for each of {rotary_dim // 2} pairs, and there are "
                    f"{counts[0]} and {counts[1]}"
                )
