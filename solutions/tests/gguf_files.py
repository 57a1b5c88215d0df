"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from transformers import LlamaForCausalLM, PreTrainedModel

from solutions.tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, make_tiny_llama

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 262}
"""K-quants have blocks of 256."""


def llama_cpp_architecture(model: PreTrainedModel) -> str:
    """Mistral and Mixtral are labelled llama, the others as transformers calls them, or nearly."""
    kind = model.config.model_type
    names = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}
    names |= {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss", "olmo3": "olmo2"}
    return names.get(kind, kind.replace("_moe", "moe"))


def llama_cpp_names(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names and layout: in some families the rows of q and k reordered within each head."""
    architecture = llama_cpp_architecture(model)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    heads = heads if architecture in ("llama", "smollm3") else {}
    for name, tensor in _halves(model):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.squeeze(0).numpy()
        layer = name.split(".")[-2]
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if layer in heads:
            halves = values.reshape(heads[layer], 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if layer == "kv_b_proj":  # as llama.cpp's converter cuts it, for the absorbed way
            still = model.config.qk_nope_head_dim
            by_head = values.reshape(model.config.num_attention_heads, -1, values.shape[1])  # [H, still + value, rank]
            yield names.get_name(name.replace("kv_b", "k_b"), (".weight",)), by_head[:, :still].swapaxes(1, 2).copy()
            yield names.get_name(name.replace("kv_b", "v_b"), (".weight",)), by_head[:, still:].copy()
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = f"{name}.weight" if name.endswith("sinks") else name
        if layer == "query_key_value":
            by_head = values.reshape(model.config.num_attention_heads, 3, -1, *values.shape[1:])
            values = by_head.swapaxes(0, 1).reshape(values.shape)
        name = "embed_out.weight" if architecture == "gptneox" and name == "lm_head.weight" else name
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), values


def _halves(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' tensors; gate and up of experts, which it keeps as one, are two. gpt-oss has them in turns."""
    turned = model.config.model_type == "gpt_oss"
    for name, tensor in model.state_dict().items():
        before, _, matrix = name.rpartition(".experts.")
        matrix, kind = matrix.removesuffix("_bias"), "bias" if matrix.endswith("_bias") else "weight"
        if before and matrix in ("gate_up_proj", "down_proj") and turned and kind == "weight":
            tensor = tensor.transpose(1, 2).contiguous()
        if before and matrix == "gate_up_proj":
            halves = (tensor[:, ::2], tensor[:, 1::2]) if turned else tensor.chunk(2, dim=1)
            for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
                yield f"{before}.experts.{part}.{kind}", half.contiguous()
        else:
            yield f"{before}.experts.down_proj.{kind}" if before and matrix == "down_proj" else name, tensor


def write_gguf(
    path: Path, model: PreTrainedModel, kind: GGMLType = GGMLType.F32, drop: str = "", split: int = 0, **extra: Any
) -> Path:
    """A GGUF file of a tiny model; matrices are stored as `kind`, or as `others` says of a part of layers. `extra` are more
    tensors and keys (``a__b`` is a.b).

    With `split` it is cut into files of so many tensors, called as llama.cpp calls them.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, llama_cpp_architecture(model), split_max_tensors=split)
    writer.add_tokenizer_model("gpt2")
    vocab = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "ab", "ĊĊ", "ĠĠ"]
    names = extra.pop("names", [])
    tokens[: len(names)] = names
    writer.add_tokenizer_pre(extra.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>") else 1 for token in tokens])
    writer.add_token_merges(extra.pop("merges", ["a b", "Ċ Ċ", "Ġ Ġ"]))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(extra.pop("tokenizer__ggml__eos_token_id", config.eos_token_id))
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    write_model(writer, model, kind, drop, **extra)
    return path


def write_gguf_header(path: Path, model: PreTrainedModel) -> Path:
    """A file that says what it is of, and no more."""
    write_out(gguf.GGUFWriter(path, llama_cpp_architecture(model)))
    return path


def write_out(writer: gguf.GGUFWriter) -> None:
    """Write the file: all that the writer was told."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    writer: gguf.GGUFWriter, model: PreTrainedModel, kind: GGMLType = GGMLType.F32, drop: str = "", **extra: Any
) -> None:
    """Write the file's header and all tensors: what the converter writes of this model, with some left out or added.

    Args:
        kind: of the matrices; `others` among `extra` names some that have another one. drop: a tensor that is left out.
        extra: arrays are tensors more, all else are keys of the header, with `__` for a dot. "fused": some tensors are laid
            into one. "apart": each expert has tensors of its own.
    """
    others = extra.pop("others", {})
    _write_sizes(writer, model.config)
    extra |= _write_positions(writer, model.config)
    tensors = dict(llama_cpp_names(model)) | {k: v for k, v in extra.items() if isinstance(v, np.ndarray)}
    tensors.pop(drop, None)
    if extra.pop("fused", False):
        tensors = _fused(tensors)
    if extra.pop("apart", False):  # as the first files with experts have them
        tensors = {each: rows for name, values in tensors.items() for each, rows in _apart(name, values)}
    _write_tensors(writer, tensors, kind, others)
    for key, value in extra.items():
        key = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    write_out(writer)


def _fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Queries, keys and values in one, and gates and ups of experts, as flags of the converter lay them."""
    found = dict(tensors)
    for whole, parts in {
        "attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    }.items():  # fmt: skip
        for name in tensors:
            before, _, kind = name.rpartition(f".{parts[0]}.")
            if before and f"{before}.{parts[1]}.{kind}" in tensors:
                rows = [found.pop(f"{before}.{part}.{kind}") for part in parts]
                found[f"{before}.{whole}.{kind}"] = np.concatenate(rows, axis=-2 if kind == "weight" else -1)
    return found


def _apart(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    before, _, kind = name.rpartition("_exps.")
    yield from ((f"{before}.{i}.{kind}", rows) for i, rows in enumerate(values)) if before else ((name, values),)


def write_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """The sizes that every model has."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Layers, heads, norms and experts."""
    write_shape(writer, config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    writer.add_head_count_kv(1 if config.model_type.startswith("deepseek") else heads)
    epsilon = {"starcoder2": "norm_epsilon", "gpt_neox": "layer_norm_eps"}.get(config.model_type)
    if epsilon is None:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, epsilon))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * 32))
    if config.model_type.startswith("deepseek"):
        _write_latents(writer, config)
    elif count := getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
        if shared := getattr(config, "shared_expert_intermediate_size", 0):
            writer.add_expert_shared_feed_forward_length(shared)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "head_dim", None) and not config.model_type.startswith("deepseek"):
        writer.add_key_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _write_positions(writer: gguf.GGUFWriter, config: Any) -> dict[str, np.ndarray]:
    """Rotations and how they are scaled; the factors of LongRoPE, which are tensors."""
    rope, factors = config.rope_parameters.get("full_attention", config.rope_parameters), {}
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if share := rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * share)
    if rope["rope_type"] == "longrope":
        head_dim = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
        longer = config.max_position_embeddings / config.original_max_position_embeddings
        writer.add_rope_scaling_attn_factors(
            math.sqrt(1 + math.log(longer) / math.log(config.original_max_position_embeddings))
        )
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        factors = {f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32) for n in ("long", "short")}
    return factors


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray], kind: GGMLType, others: dict[str, GGMLType]
) -> None:
    random = np.random.default_rng(0)
    for name, values in tensors.items():
        if values.ndim == 1 or kind == GGMLType.F32 or name.endswith(".bias"):
            writer.add_tensor(name, values)
        else:
            own = others.get(name.split(".")[-2], kind)
            try:
                stored = gguf.quants.quantize(values, own)
            except NotImplementedError:  # nothing here can write these: random bytes, which are as good as any
                stored = random.integers(0, 256, gguf.quant_shape_to_byte_shape(values.shape, own), dtype=np.uint8)
            writer.add_tensor(name, stored, raw_dtype=own)


def _write_latents(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the converter writes of a DeepSeek alone: one head, which is a latent and the key that turns."""
    sigmoid = config.model_type == "deepseek_v3"
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYOV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), **WIDE)


@pytest.fixture
def tiny(tmp_path: Path, tiny_model: LlamaForCausalLM, cache: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_model)
