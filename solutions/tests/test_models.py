"""The models against transformers: logits of whole prompts, in pieces, and token by token, in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from solutions.attention.latent_attention import LatentBackend
from solutions.attention.paged_attention import AttentionBackend, AttentionMetadata, NaiveBackend
from solutions.attention.paged_attention_torch import TorchBackend
from solutions.models.config.model_config import ModelConfig
from solutions.models.layers import CausalLM, RMSNorm
from solutions.models.loader import load_model, resolve_model
from solutions.models.rope import RotaryEmbedding, rope_inverse_frequencies, rotate_
from solutions.tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny, make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

CPU = torch.device("cpu")
BLOCK_SIZE = 8
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@torch.inference_mode()
def run(
    model: CausalLM, config: ModelConfig, prompts: list[list[int]], pieces: list[int], plain_from: int = 4
) -> list[Tensor]:  # fmt: skip
    """Logits [length, V] of each prompt, fed together, `pieces` tokens of each at a time, through a paged cache.

    Over latents, so many tokens of a prompt and more in a step go the plain way.
    """
    num_blocks = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(1)).split(num_blocks)
    total, windows = sum(num_blocks), config.windows  # each group of layers has blocks of its own
    shape = (2, total * len(windows), BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    dtype = next(model.parameters()).dtype
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(config.num_layers)]
    tables = torch.zeros(len(prompts), max(num_blocks), dtype=torch.int32)
    for row, blocks in zip(tables, order, strict=True):
        row[: len(blocks)] = blocks
    backend: AttentionBackend = TorchBackend() if config.attention_sinks else NaiveBackend()
    if config.latent is not None:
        backend = LatentBackend()
        backend.plain_from = plain_from
    logits: list[list[Tensor]] = [[] for _ in prompts]
    start = 0
    for piece in pieces:
        spans = [range(min(start, len(p)), min(start + piece, len(p))) for p in prompts]
        active = [i for i, span in enumerate(spans) if span]
        positions = torch.tensor([p for i in active for p in spans[i]])
        rows = torch.tensor([i for i in active for _ in spans[i]])
        lengths = [len(spans[i]) for i in active]
        metadata = AttentionMetadata(
            kv_caches=caches,
            slot_mapping=tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_tables=tables[active],
            query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
            context_lens=torch.tensor([spans[i].stop for i in active]).int(),
            max_query_len=max(lengths),
            max_context_len=max(spans[i].stop for i in active),
            backend=backend,
        )
        metadata.groups = [
            replace(
                metadata, block_tables=metadata.block_tables + group * total,
                slot_mapping=metadata.slot_mapping + group * total * BLOCK_SIZE,
            )
            for group in range(len(windows))
        ]  # fmt: skip
        for each, window in zip(metadata.groups, windows, strict=True):
            each.plan = backend.plan(each, window)
        ids = torch.tensor([prompts[i][p] for i in active for p in spans[i]])
        for i, part in zip(active, model.compute_logits(model(ids, positions, metadata)).split(lengths), strict=True):
            logits[i].append(part)
        start += piece
    return [torch.cat(parts) for parts in logits]


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def assert_same_logits(
    folder: Path,
    oracle: Any,
    lengths: list[int] = [1, 8, 70],  # noqa: B006
    tolerance: dict[str, float] = TOLERANCE,
    **changes: Any,
) -> None:
    """Compare on prompts fed whole, in pieces with odd borders, and token by token."""
    source = resolve_model(str(folder))
    model = load_model(replace(source, config=replace(source.config, **changes)), torch.float32, CPU)
    prompts = random_prompts(lengths)
    with torch.inference_mode():
        expected = [oracle(torch.tensor([prompt])).logits[0] for prompt in prompts]
    longest = max(lengths)
    for pieces in ([longest], [5] * -(-longest // 5), [longest - 9, *[1] * 9]):
        for ours, theirs in zip(run(model, source.config, prompts, pieces), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)


ROPE_SCALING = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn in full": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5,
        "attention_factor": 1.3, "truncate": False,
    },
    "yarn with two scales": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE_SCALING)
def test_llama_with_each_rope_scaling(tmp_path: Path, kind: str) -> None:
    oracle = make_tiny_llama(tmp_path, rope_parameters={"rope_theta": 5000.0} | (ROPE_SCALING[kind] or {}))
    assert_same_logits(tmp_path, oracle)


def test_longrope_has_other_divisors_beyond_the_trained_context(tmp_path: Path) -> None:
    """transformers takes those of the sequence's length, here those of the longest that is served."""
    scaling = {"rope_type": "longrope", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 40}
    divisors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0]}
    oracle = make_tiny_llama(tmp_path, max_position_embeddings=160, rope_parameters=scaling | divisors)
    assert_same_logits(tmp_path, oracle, lengths=[70, 41], max_model_len=70)
    assert_same_logits(tmp_path, oracle, lengths=[40, 11], max_model_len=40)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama", "mistral", "gpt2")])
def test_each_family(tmp_path: Path, family: str) -> None:
    # transformers and we round angles of some tens apart, which four layers make more of
    assert_same_logits(tmp_path, make_tiny(family, tmp_path), tolerance={"atol": 5e-4, "rtol": 1e-4}, max_model_len=128)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("starcoder2", {"use_bias": False, "sliding_window": 24}),
        ("starcoder2", {"tie_word_embeddings": False, "hidden_act": "relu"}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True, "rope_parameters": {"partial_rotary_factor": 1.0}}),
    ],
)
def test_variants_of_families(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    if "rope_parameters" in overrides:
        overrides = overrides | {"rope_parameters": FAMILIES[family]["rope_parameters"] | overrides["rope_parameters"]}
    assert_same_logits(tmp_path, make_tiny(family, tmp_path, **overrides))


def test_gpt_neox_as_older_files_have_it(tmp_path: Path) -> None:
    """Masks and frequencies among the weights, and RoPE in two entries of its own."""
    oracle = make_tiny("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
            tensors[f"gpt_neox.layers.{layer}.attention.{name}"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.25, "rotary_emb_base": 5000}))
    assert_same_logits(tmp_path, oracle)


def test_llama_reads_rope_scaling_as_older_checkpoints_write_it(tmp_path: Path) -> None:
    oracle = make_tiny_llama(tmp_path, rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 3.0})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}))
    assert_same_logits(tmp_path, oracle)


def test_dynamic_rope_beyond_the_trained_context_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    """transformers computes the frequencies from the sequence's length, here from the longest that is served."""
    scaling = {"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 2.0}
    oracle = make_tiny_llama(tmp_path, max_position_embeddings=40, rope_parameters=scaling)
    assert_same_logits(tmp_path, oracle, lengths=[70], max_model_len=70)
    assert_same_logits(tmp_path, oracle, lengths=[39, 11], max_model_len=40)
    config = resolve_model(str(tmp_path)).config
    assert config.max_context == 80
    stretched = rope_inverse_frequencies(replace(config, max_model_len=70))
    assert not torch.allclose(stretched, rope_inverse_frequencies(config), rtol=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 20},  # heads wider than hidden / heads
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=["tied", "biases", "multi-head", "multi-query wide heads", "gelu"],
)
def test_llama_variants(tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert_same_logits(tmp_path, make_tiny_llama(tmp_path, **overrides))


@pytest.mark.parametrize("window", [None, 1, 24, 600])
def test_mistral_with_window(tmp_path: Path, window: int | None) -> None:
    """Narrower than the prompt, of one token, wider than the prompt, and none."""
    assert_same_logits(tmp_path, make_tiny_mistral(tmp_path, sliding_window=window))


def test_mistral_window_matters(tmp_path: Path) -> None:
    """The comparison above could tell a window that is one token off."""
    make_tiny_mistral(tmp_path)
    source = resolve_model(str(tmp_path))
    prompts = random_prompts([40])
    logits = []
    for window in (23, 24):
        changed = replace(source, config=replace(source.config, sliding_window=window))
        logits.append(run(load_model(changed, torch.float32, CPU), changed.config, prompts, [40])[0])
    torch.testing.assert_close(logits[0][:23], logits[1][:23], **TOLERANCE)
    assert (logits[0][30:] - logits[1][30:]).abs().amax(dim=-1).min() > 1e-2


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"n_inner": 70, "activation_function": "relu"}])
def test_gpt2(tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert_same_logits(tmp_path, make_tiny_gpt2(tmp_path, **overrides))


def test_rms_norm_computes_in_float32() -> None:
    """In bfloat16 the mean of squares alone would be off by up to one part in 256."""
    x = torch.linspace(-300, 300, 4 * 576).view(4, 576).bfloat16()
    norm = RMSNorm(576, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = torch.linspace(0.1, 2.0, 576).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    config = ModelConfig.from_hf(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 32, "intermediate_size": 8}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    )
    rope = RotaryEmbedding(config)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60)
    turned_q = rotate_(q.expand(60, 1, 16).clone(), rope(positions))
    turned_k = rotate_(k.expand(60, 1, 16).clone(), rope(positions + 4))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(60, 1))
    scores = (turned_q * turned_k).sum(-1)
    torch.testing.assert_close(scores, scores[:1].expand(60, 1), atol=1e-5, rtol=1e-5)
    assert abs(scores[0].item() - (q * k).sum().item()) > 1e-3
