"""Prompts as vectors: encoders and causal models against transformers, pooled as sentence-transformers pools."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from solutions.attention.backends import make_backend
from solutions.batching.pooling import POOLING_TYPES, Pooling, PoolingParams
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.input import ContextLengthError
from solutions.models.config.entries import ModelError
from solutions.models.loader import resolve_model
from solutions.tests.embedding_models import CONTEXT, TEXTS, WORDS, describe, make_bert, oracle, tokens
from solutions.tests.engine_twins import folder

LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 48, CONTEXT - 1, CONTEXT]
PROMPTS = [[(7 * i + j * j) % len(WORDS) for j in range(length)] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertModel]:
    path = tmp_path_factory.mktemp("bert")
    return path, make_bert(path)


@pytest.fixture
def described(bert: tuple[Path, BertModel], tmp_path: Path) -> Path:
    """A folder with the same model, to be described."""
    for file in bert[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def make(path: Path, kind: str | None = None, normalize: bool = True, **settings: Any) -> LLM:
    if kind is not None:
        settings["pooler_config"] = json.dumps({"pooling_type": kind.upper(), "normalize": normalize})
    return LLM(str(path), **({"dtype": "float32"} | settings))


def embed(llm: LLM, prompts: list[Any], **options: Any) -> np.ndarray:
    wanted = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.embed(wanted, use_tqdm=False, **options)
    llm.llm_engine.scheduler.check_invariants()
    stats = llm.llm_engine.stats()
    assert (stats.kv_cache_usage, stats.num_generation_tokens) == (0, 0)
    return np.array([output.outputs.embedding for output in outputs])


# Encoders


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", POOLING_TYPES)
def test_an_encoder_says_what_transformers_says(bert: tuple[Path, BertModel], kind: str, normalize: bool) -> None:
    llm = make(bert[0], kind, normalize)
    np.testing.assert_allclose(embed(llm, PROMPTS), oracle(bert[1], PROMPTS, kind, normalize), atol=3e-6)
    assert llm.llm_engine.stats().num_steps == 1, "they fit into one step"
    assert llm.llm_engine.executor.worker.cache.kv_caches == []


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_act": "gelu_new"}, {"type_vocab_size": 1, "num_attention_heads": 8}, {"layer_norm_eps": 0.1}],
    ids=lambda overrides: next(iter(overrides)),
)
def test_what_a_config_can_say_of_an_encoder(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = make_bert(tmp_path, **overrides)
    np.testing.assert_allclose(embed(make(tmp_path), PROMPTS), oracle(model, PROMPTS), atol=3e-6)


def test_alone_and_all_at_once_are_the_same(bert: tuple[Path, BertModel]) -> None:
    together = embed(make(bert[0]), PROMPTS)
    narrow = make(bert[0], max_num_batched_tokens=CONTEXT, max_num_seqs=3, block_size=5)
    alone = np.concatenate([embed(narrow, [prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(embed(narrow, PROMPTS[::-1])[::-1], alone, atol=1e-6)
    assert narrow.llm_engine.stats().num_steps > len(PROMPTS)


def test_attention_is_that_of_a_mask_which_hides_nothing() -> None:
    """Each sequence by itself in float64, whatever shares its group."""
    lengths, heads, size = [1, 16, 7, 16, 40, 33], 3, 8
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = torch.randn(3, int(starts[-1]), heads, size, generator=torch.Generator().manual_seed(1))
    backend = make_backend("full", "cpu", torch.float32, size)
    metadata: Any = type("Metadata", (), {"query_start_loc": starts})()
    metadata.plan = backend.plan(metadata, None)
    out = backend.attend(0, q, k, v, metadata, 0.3)
    for first, last in itertools.pairwise(starts):
        scores = torch.einsum("qhd,khd->hqk", q[first:last].double(), k[first:last].double()) * 0.3
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last].double())
        torch.testing.assert_close(out[first:last].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("settings", "apart"), [({"dtype": "bfloat16"}, 0.01), ({"quantization": "int8"}, 0.02)])
def test_an_encoder_in_fewer_bits(bert: tuple[Path, BertModel], settings: dict[str, Any], apart: float) -> None:
    cosines = (embed(make(bert[0], **settings), PROMPTS) * oracle(bert[1], PROMPTS)).sum(1)
    assert 0 < 1 - cosines.min() < apart


@pytest.mark.slow
def test_an_encoder_over_two_ranks(bert: tuple[Path, BertModel]) -> None:
    llm = make(bert[0], tensor_parallel_size=2)
    try:
        np.testing.assert_allclose(embed(llm, PROMPTS), oracle(bert[1], PROMPTS), atol=3e-6)
    finally:
        llm.llm_engine.close()


def test_random_weights_make_vectors(bert: tuple[Path, BertModel]) -> None:
    vectors = embed(make(bert[0], load_format="dummy"), PROMPTS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_tensors_may_be_named_as_inside_a_larger_model(described: Path, bert: tuple[Path, BertModel]) -> None:
    """With a prefix, with heads for training, and with the numbers that old files hold."""
    weights = {f"bert.{name}": tensor for name, tensor in load_file(bert[0] / "model.safetensors").items()}
    weights |= {"cls.predictions.bias": torch.ones(3), "bert.embeddings.position_ids": torch.arange(CONTEXT)[None]}
    (described / "model.safetensors").unlink()
    save_file(weights, described / "model.safetensors")
    np.testing.assert_allclose(embed(make(described), PROMPTS), oracle(bert[1], PROMPTS), atol=3e-6)


# Folders of sentence-transformers


@pytest.mark.parametrize("has_json", [True, False])
def test_a_folder_of_sentence_transformers(described: Path, bert: tuple[Path, BertModel], has_json: bool) -> None:
    if not has_json:  # an old folder has the words alone
        (described / "tokenizer.json").unlink()
    describe(described)
    llm = make(described)
    assert llm.llm_engine.model_config.pooling == Pooling("mean", normalize=True)
    np.testing.assert_allclose(embed(llm, TEXTS), oracle(bert[1], tokens(bert[0], TEXTS)), atol=3e-6)


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "x": False}, Pooling("mean", False)),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True}, Pooling("cls", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_lasttoken": True}, Pooling("last")),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode": "lasttoken", "include_prompt": True}, Pooling("last")),
        (["Transformer", "Pooling"], {"pooling_mode": "cls"}, Pooling("cls", False)),
    ],
)  # fmt: skip
def test_how_a_folder_says_it(described: Path, modules: list[str], pooling: dict[str, Any], expected: Pooling) -> None:
    describe(described, tuple(modules), pooling)
    assert resolve_model(str(described)).config.pooling == expected
    assert make(described, "mean").llm_engine.model_config.pooling == Pooling("mean"), "the flag counts more"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: describe(path, ("Transformer", "Pooling", "Dense")), "embeddings that pass a Dense"),
        (lambda path: describe(path, pooling={"pooling_mode_max_tokens": True}), "pooling by max_tokens is not supported"),
        (lambda path: describe(path, pooling={"pooling_mode": ["mean", "cls"]}), "not supported; mean, last or cls is"),
        (lambda path: describe(path, pooling={}), "pooling by nothing is not supported"),
        (lambda path: (path / "modules.json").write_text('[{"type": 3}]'), "must be a list of modules"),
        (lambda path: (path / "modules.json").write_text("{"), "must be a list of modules"),
        (lambda path: (path / "1_Pooling" / "config.json").unlink(), "cannot read"),
        (lambda path: (path / "sentence_bert_config.json").write_text('{"do_lower_case": true}'), "do_lower_case"),
        (lambda path: (path / "sentence_bert_config.json").write_text('{"max_seq_length": "x"}'), "max_seq_length must be"),
    ],
)  # fmt: skip
def test_what_a_folder_asks_for_and_is_not_supported(described: Path, change: Callable[[Path], Any], says: str) -> None:
    describe(described)
    change(described)
    with pytest.raises(ModelError, match=says):
        resolve_model(str(described))


@pytest.mark.parametrize(
    ("file", "content"),
    [("sentence_bert_config.json", {"max_seq_length": 12}), ("tokenizer_config.json", {"model_max_length": 12})],
)
def test_the_longest_text_is_the_folder_s(
    described: Path, bert: tuple[Path, BertModel], file: str, content: dict[str, int]
) -> None:
    describe(described)
    before = json.loads((bert[0] / file).read_text()) if (bert[0] / file).is_file() else {}
    (described / file).unlink(missing_ok=True)
    (described / file).write_text(json.dumps(before | content))
    llm = make(described)
    with pytest.raises(ContextLengthError, match="the prompt has 13 tokens; with max_model_len 12 at most 12 are possible"):
        embed(llm, TEXTS)
    assert len(embed(llm, [[5] * 12])) == 1
    assert len(embed(make(described, max_model_len=CONTEXT), TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [-1, 7, 3, 2, 1])
def test_a_text_that_is_cut_keeps_what_stands_around_it(bert: tuple[Path, BertModel], side: str, limit: int) -> None:
    llm = make(bert[0], max_model_len=15)
    params = PoolingParams(truncate_prompt_tokens=limit, truncation_side=side)
    given = [output.prompt_token_ids for output in llm.generate(TEXTS, params, use_tqdm=False)]
    if limit > 2:
        assert given == tokens(bert[0], TEXTS, limit, side)
    elif limit == -1:
        assert given == tokens(bert[0], TEXTS, 15, side)
    else:  # there is room for nothing else
        assert {len(prompt) for prompt in given} == {limit}


# Causal models


@pytest.mark.parametrize("kind", POOLING_TYPES)
@pytest.mark.parametrize("crowd", [{"num_gpu_blocks_override": 200}, {"num_gpu_blocks_override": 14}])
def test_a_causal_model_says_what_transformers_says(kind: str, crowd: dict[str, Any]) -> None:
    """In chunks, with little memory, and twice, so that the second time finds blocks."""
    path = folder("llama")
    settings = {"max_num_batched_tokens": 13, "block_size": 8, "max_model_len": 96, **crowd}
    llm, expected = make(path, kind, **settings), oracle(make_llama(path), PROMPTS, kind)
    for _ in range(2):
        np.testing.assert_allclose(embed(llm, PROMPTS), expected, atol=2e-5)
    hits = llm.llm_engine.stats().prefix_cache_hits
    assert hits > 100 if kind == "last" and crowd["num_gpu_blocks_override"] > 100 else kind == "last" or hits == 0


def make_llama(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_vectors_and_answers_come_from_the_same_steps(mode: str) -> None:
    """Half of the requests write, so that memory runs out while prompts are half computed."""
    path = folder("llama")
    settings = {"num_gpu_blocks_override": 16, "block_size": 8, "max_model_len": 96, "max_num_batched_tokens": 24}
    llm = make(path, preemption_mode=mode, swap_space=1 << 22, **settings)
    engine, writes = llm.llm_engine, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    alone = [o.outputs[0].token_ids for o in llm.generate([{"prompt_token_ids": p} for p in PROMPTS], writes, use_tqdm=False)]
    before = engine.stats()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(f"w{index}", {"prompt_token_ids": prompt}, writes)
        engine.add_request(f"v{index}", {"prompt_token_ids": prompt}, PoolingParams(pooling=Pooling("mean")))
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.scheduler.check_invariants()
    assert engine.stats().num_preemptions > before.num_preemptions
    vectors = np.stack([finished[f"v{index}"].pooled for index in range(len(PROMPTS))])
    np.testing.assert_allclose(vectors, oracle(make_llama(path), PROMPTS), atol=2e-5)
    assert [finished[f"w{index}"].outputs[0].token_ids for index in range(len(PROMPTS))] == alone
    assert all(finished[f"w{index}"].pooled is None for index in range(len(PROMPTS)))
    written = engine.stats().num_generation_tokens - before.num_generation_tokens
    assert written >= sum(map(len, alone))
    assert engine.stats().kv_cache_usage == 0


def test_drafts_leave_vectors_alone() -> None:
    path = folder("llama")
    llm = make(path, speculative_config='{"method": "ngram", "prompt_lookup_min": 1}', max_model_len=96)
    prompts = [[5, 6] * 20, *PROMPTS]
    np.testing.assert_allclose(embed(llm, prompts), oracle(make_llama(path), prompts), atol=2e-5)


def test_an_aborted_prompt_has_no_vector_and_frees_its_blocks() -> None:
    llm = make(folder("llama"), max_num_batched_tokens=13, max_model_len=96)
    engine = llm.llm_engine
    engine.add_request("a", {"prompt_token_ids": PROMPTS[-1]}, PoolingParams())
    engine.step()
    assert engine.stats().kv_cache_usage > 0
    output = engine.abort_request("a")
    assert output is not None
    assert (output.pooled, output.outputs[0].finish_reason) == (None, "abort")
    assert engine.stats().kv_cache_usage == 0


def test_fewer_dimensions_are_the_first_ones(bert: tuple[Path, BertModel]) -> None:
    llm, raw = make(bert[0]), oracle(bert[1], PROMPTS, normalize=False)
    for count in (1, 10, 64):
        cut = raw[:, :count]
        np.testing.assert_allclose(
            embed(llm, PROMPTS, dimensions=count), cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=3e-6
        )
    np.testing.assert_allclose(embed(make(bert[0], "mean", False), PROMPTS, dimensions=10), raw[:, :10], atol=3e-6)
    with pytest.raises(ValueError, match="dimensions must be at most 64, got 65"):
        embed(llm, PROMPTS, dimensions=65)
    with pytest.raises(ValueError, match="dimensions must be at least 1, got 0"):
        embed(llm, PROMPTS, dimensions=0)


# Refusals


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"kv_cache_memory_bytes": 1 << 20}, "--kv-cache-memory-bytes"), ({"kv_cache_dtype": "int8"}, "--kv-cache-dtype"),
        ({"touch_kv_cache": True}, "--touch-kv-cache"), ({"num_gpu_blocks_override": 9}, "--num-gpu-blocks-override"),
        ({"preemption_mode": "swap"}, "--preemption-mode"), ({"batch_invariant": True}, "--batch-invariant"),
        ({"long_prefill_token_threshold": 9}, "--long-prefill-token-threshold"),
        ({"attention_backend": "torch"}, "--attention-backend"), ({"scheduling_policy": "lpm"}, "--scheduling-policy"),
        ({"speculative_config": '{"method": "ngram"}'}, "--speculative-config"),
    ],
)  # fmt: skip
def test_settings_that_are_not_for_an_encoder(bert: tuple[Path, BertModel], settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} is not for .*: an encoder reads a text in one step and has no KV cache$"):
        make(bert[0], **settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"), ('{"pooling_type": "max"}', "must be one of mean, last, cls; got 'max'"),
        ('{"pooling": "mean"}', "must be like"), ('["mean"]', "must be like"), ('{"normalize": 1}', "must be like"),
    ],
)  # fmt: skip
def test_a_pooler_config_that_is_none(bert: tuple[Path, BertModel], text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LLM(str(bert[0]), pooler_config=text)


def test_an_encoder_writes_nothing(bert: tuple[Path, BertModel]) -> None:
    with pytest.raises(ValueError, match="this model is an encoder, which writes no text"):
        make(bert[0]).generate("the sea")
    with pytest.raises(ValueError, match="the draft model is an encoder"):
        make(folder("llama"), speculative_config=json.dumps({"method": "draft_model", "model": str(bert[0])}))
    with pytest.raises(ValueError, match="--attention-backend full: a token would see those behind it"):
        make(folder("llama"), attention_backend="full")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"position_embedding_type": "relative_key"}, "BERT with relative positions"), ({"is_decoder": True}, "as a decoder"),
        ({"num_attention_heads": 5}, "hidden_size, 64, is no multiple of num_attention_heads, 5"),
        ({"architectures": ["XLMRobertaModel"]}, "'XLMRobertaModel' is not supported; supported are .*, BertModel"),
    ],
)  # fmt: skip
def test_encoders_that_are_not_supported(described: Path, bert: tuple[Path, BertModel], change: Any, says: str) -> None:
    config = json.loads((bert[0] / "config.json").read_text())
    (described / "config.json").unlink()
    (described / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=says):
        resolve_model(str(described))


def test_a_prompt_that_is_too_long_or_nothing(bert: tuple[Path, BertModel]) -> None:
    llm = make(bert[0])
    with pytest.raises(ContextLengthError, match=f"the prompt has {CONTEXT + 1} tokens"):
        embed(llm, [[5] * (CONTEXT + 1)])
    for nothing in ("", []):
        with pytest.raises(ValueError, match="the prompt is empty"):
            embed(llm, [nothing])
    with pytest.raises(ValueError, match="-1 is not a token id"):
        embed(llm, [[-1]])


def test_params_are_those_of_a_prompt() -> None:
    params = PoolingParams()
    assert (params.max_tokens, params.reads_prompt, params.how.assumed) == (1, True, True)
    assert not replace(params, pooling=Pooling("last")).reads_prompt
    assert SamplingParams(prompt_logprobs=0).reads_prompt
    assert not SamplingParams().reads_prompt
