"""Every family of models with everything that the engine can do, against transformers on the same tiny weights.

Each test is a cell of the table in docs/models.md, which ``python -m tests.models_table`` makes of those that passed: a feature
works for a family, or is refused by a message that `REFUSED` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from solutions.batching.sampling_params import SamplingParams
from solutions.core.capture import LayerReplay
from solutions.core.engine import LLM
from solutions.core.lora.registry import LoRARequest
from solutions.core.platform import native
from solutions.models.config.families import FAMILIES as KNOWN
from solutions.models.loader import resolve_model
from solutions.quantization import awq, gptq
from solutions.tests.engine_twins import check_answer, check_tokens, folder, oracle
from solutions.tests.gguf_files import write_gguf, write_gguf_header
from solutions.tests.lora_adapters import LLAMA_TARGETS, TARGETS, make_adapter
from solutions.tests.quantized_folders import Stored, check_against_transformers, describe, quantize_folder, save_pieces
from solutions.tests.tiny_models import FAMILIES, GGUF_SAYS, make_tiny

PROMPTS = [[5] * 17 + [(7 * i + j * j) % 250 for j in range(1 + 6 * i)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 8, "num_gpu_blocks_override": 200}


OVER_LATENTS = ("deepseek_v2", "deepseek_v3")
"""Families whose attention only PyTorch computes on a CPU."""


def generate(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def answers(family: str, runs: int = 1, **settings: Any) -> LLM:
    """Let an engine answer the prompts, and see that each token is the one that transformers says.

    Returns:
        The engine, closed.
    """
    settings = SETTINGS | settings
    kv, backend = settings.get("kv_cache_dtype", "auto"), settings.get("attention_backend", "torch")
    llm = LLM(str(folder(family)), **settings)
    try:
        for _ in range(runs):
            for prompt, answer in zip(PROMPTS, generate(llm), strict=True):
                assert len(answer) == GREEDY.max_tokens
                check_answer(family, kv, backend, prompt, answer)
        llm.llm_engine.scheduler.check_invariants()
        assert llm.llm_engine.stats().kv_cache_usage == 0
    finally:
        llm.llm_engine.close()
    return llm


def chunked_prefill(family: str, path: Path) -> None:
    answers(family, max_num_batched_tokens=13)


def prefix_cache(family: str, path: Path) -> None:
    assert answers(family, runs=2).llm_engine.stats().prefix_cache_hits > 100


def crowded(family: str) -> dict[str, Any]:
    """Memory for a few sequences; those with a window need less of it."""
    windows = resolve_model(str(folder(family))).config.windows
    if len(windows) > 1:  # a sequence needs less in its groups with a window where a step computes little of it
        return {"num_gpu_blocks_override": 10 * len(windows), "max_num_batched_tokens": 24, "enable_prefix_caching": False}
    return {"num_gpu_blocks_override": 18 if windows == (None,) else 15, "enable_prefix_caching": False}


def preemption(family: str, path: Path) -> None:
    assert answers(family, **crowded(family)).llm_engine.stats().num_preemptions > 0


def swapping(family: str, path: Path) -> None:
    llm = answers(family, **crowded(family), preemption_mode="swap", swap_space=1 << 24)
    assert llm.llm_engine.stats().num_preemptions > 0


def two_ranks(family: str, path: Path) -> None:
    answers(family, tensor_parallel_size=2)


def portable_layers(family: str, path: Path) -> None:
    answers(family, enable_cpu_kernels=False)


def cpu_replay(family: str, path: Path) -> None:
    """The layers are recorded, and say to the last bit what kernels that are called one by one say."""
    texts = []
    for eager in (True, False):
        llm = LLM(str(folder(family)), **SETTINGS, enforce_eager=eager)
        layers = getattr(getattr(llm.llm_engine.executor.worker.model, "model", None), "run_layers", None)
        assert isinstance(layers, LayerReplay) == (not eager), "the layers are not replayed"
        texts.append(generate(llm))
    assert texts[0] == texts[1]
    answers(family, attention_backend="cpu")


def int8_kv(family: str, path: Path) -> None:
    answers(family, kv_cache_dtype="int8", attention_backend="auto" if family in OVER_LATENTS else "cpu")


def ngram_drafts(family: str, path: Path) -> None:
    answers(family, speculative_config={"method": "ngram", "prompt_lookup_min": 1, "adaptive": False})


def draft_model(family: str, path: Path) -> None:
    """The family drafts for itself: all drafts are right, and LLaMA's are wrong, which reads no blocks behind a window."""
    for drafter in (family,) if family == "mistral" else (family, "llama"):
        draft = {"method": "draft_model", "model": str(folder(drafter)), "adaptive": False}
        stats = answers(family, speculative_config=draft).llm_engine.stats()
        share = stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens
        assert share > 0.9 if drafter == family else share < 1


def batch_invariance(family: str, path: Path) -> None:
    """Log-probabilities to the last bit, whatever else is in the steps and however prompts are cut."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    seen = []
    for count, budget in ((1, 96), (len(PROMPTS), 11)):
        llm = LLM(str(folder(family)), **SETTINGS, batch_invariant=True, max_num_batched_tokens=budget)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        batches = [prompts[i : i + count] for i in range(0, len(prompts), count)]
        outputs = [output.outputs[0] for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
        seen.append([[{t: p.logprob for t, p in entry.items()} for entry in output.logprobs] for output in outputs])
    assert seen[0] == seen[1]


def rounded(family: str, quantization: str, most: float) -> None:
    """Log-probabilities of the prompts stay near those of the whole weights; `most` is how far they are off on the average."""
    llm = LLM(str(folder(family)), **SETTINGS, quantization=quantization)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    off = []
    for output in outputs:
        tokens = output.prompt_token_ids
        with torch.inference_mode():
            expected = oracle(family, "auto", "torch")(torch.tensor([tokens])).logits[0].log_softmax(-1)
        entries = enumerate(output.prompt_logprobs[1:], 1)
        off += [abs(entry[tokens[i]].logprob - float(expected[i - 1, tokens[i]])) for i, entry in entries]
    assert 0 < sum(off) / len(off) < most


def int8_weights(family: str, path: Path) -> None:
    rounded(family, "int8", 0.6)


def int4_weights(family: str, path: Path) -> None:
    rounded(family, "int4", 6.0)


def stored(family: str, path: Path, form: Stored, config: dict[str, Any]) -> None:
    """A quantized checkpoint says what transformers says of the plain weights that it stands for."""
    make_tiny(family, path / "plain")
    form_of = lambda name: None if name == "lm_head" or name.endswith(("gate", "router", "_bias")) else form  # noqa: E731
    packed = quantize_folder(path / "plain", path / "packed", form_of)
    save_pieces(packed, path / "packed")
    describe(path / "packed", config)
    for ranks in (1, 2):
        check_against_transformers(path / "plain", path / "packed", 2e-3, tensor_parallel_size=ranks)


def gptq_files(family: str, path: Path) -> None:
    stored(
        family, path, Stored(size=32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    )


def awq_files(family: str, path: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    stored(family, path, Stored("awq", size=32), config)


def made(family: str, path: Path, method: Any, most: float) -> None:
    """The command makes a checkpoint of 4 bits whose log-probabilities are near those of the whole weights."""
    text = path / "text.txt"
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(3000)))
    flags = {"model": folder(family), "output": path / "made", "group-size": 32, "num-samples": 8, "sequence-length": 64}
    method.main([f"--{name}={value}" for name, value in (flags | {"calibration-file": text}).items()])
    llm = LLM(str(path / "made"), **SETTINGS)
    assert llm.llm_engine.model_config.quantization is not None
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    off = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False):
        tokens = output.prompt_token_ids
        with torch.inference_mode():
            expected = oracle(family, "auto", "torch")(torch.tensor([tokens])).logits[0].log_softmax(-1)
        entries = enumerate(output.prompt_logprobs[1:], 1)
        off += [abs(entry[tokens[i]].logprob - float(expected[i - 1, tokens[i]])) for i, entry in entries]
    assert 0 < sum(off) / len(off) < most


def gptq_made(family: str, path: Path) -> None:
    made(family, path, gptq, 6.0)


def awq_made(family: str, path: Path) -> None:
    made(family, path, awq, 6.0)


def dummy_weights(family: str, path: Path) -> None:
    llm = LLM(str(folder(family)), **SETTINGS, load_format="dummy")
    assert all(len(answer) == GREEDY.max_tokens for answer in generate(llm))


def gguf_file(family: str, path: Path) -> None:
    """A file as llama.cpp writes it says what the model says that it was made of."""
    native.load()  # where they are kept is about to change
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYOV_CACHE", str(path / "cache"))
        says = GGUF_SAYS.get(family)
        model = oracle(family, "auto", "torch") if says is None else make_tiny(family, path, **says)
        write = write_gguf_header if (family, "GGUF") in REFUSED else write_gguf
        llm = LLM(str(write(path / "model.gguf", model)), **SETTINGS)
    assert llm.llm_engine.model_config.architecture == type(model).__name__
    for prompt, answer in zip(PROMPTS, generate(llm), strict=True):
        check_tokens(model, prompt, answer)


def adapters(family: str, path: Path) -> None:
    """One that changes all linear layers, experts and routers that the family lets it, in every second request."""
    plain = make_tiny(family, path / "model")
    merged = make_adapter(path / "adapter", plain, targets=TARGETS.get(family, LLAMA_TARGETS))
    llm = LLM(str(path / "model"), **SETTINGS, enable_lora=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    requests = [LoRARequest("adapter", 1, str(path / "adapter")) if i % 2 else None for i in range(len(PROMPTS))]
    for i, output in enumerate(llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=requests)):
        check_tokens(merged if i % 2 else plain, PROMPTS[i], list(output.outputs[0].token_ids))


FEATURES: dict[str, Callable[[str, Path], None]] = {
    "chunked prefill": chunked_prefill,
    "prefix cache": prefix_cache,
    "preemption": preemption,
    "swapping": swapping,
    "two ranks": two_ranks,
    "PyTorch's layers": portable_layers,
    "CPU kernels, replayed": cpu_replay,
    "batch invariance": batch_invariance,
    "int8 KV": int8_kv,
    "LoRA adapters": adapters,
    "n-gram drafts": ngram_drafts,
    "draft model": draft_model,
    "int8": int8_weights,
    "int4": int4_weights,
    "GPTQ": gptq_files,
    "AWQ": awq_files,
    "making GPTQ": gptq_made,
    "making AWQ": awq_made,
    "dummy weights": dummy_weights,
    "GGUF": gguf_file,
}
"""What a column is called: its test."""

REFUSED = {
    **{
        (family, "CPU kernels, replayed"): "the layers are not replayed"
        for family in ("gpt2", "olmo3", "gemma2", "gemma3_text", "starcoder2", "gpt_neox", "gpt_oss", *OVER_LATENTS)
    },
    ("gpt2", "GGUF"): "GGUF architecture 'gpt2' is not supported",
    ("gpt2", "making GPTQ"): "cannot be quantized",
    ("gpt2", "making AWQ"): "cannot be quantized",
}
"""What a family does not do: the message that says so."""


@pytest.mark.slow
@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family: str, feature: str, tmp_path: Path) -> None:
    message = REFUSED.get((family, feature))
    if message is None:
        FEATURES[feature](family, tmp_path)
    else:
        with pytest.raises((ValueError, AssertionError, SystemExit), match=message):
            FEATURES[feature](family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "phi3", "olmo2", "starcoder2"])
def test_ranks_that_share_kv_heads(family: str, tmp_path: Path) -> None:
    """Four query heads over one KV head, which both ranks then hold."""
    sizes = {} if family == "qwen3" else {"hidden_size": 128}
    model = make_tiny(family, tmp_path, num_attention_heads=4, num_key_value_heads=1, **sizes)
    llm = LLM(str(tmp_path), **SETTINGS, tensor_parallel_size=2)
    try:
        for prompt, answer in zip(PROMPTS, generate(llm), strict=True):
            check_tokens(model, prompt, answer)
    finally:
        llm.llm_engine.close()


def test_every_family_is_here() -> None:
    assert set(FAMILIES) == {family.model_type for family in KNOWN.values()}
    found = {name: KNOWN[resolve_model(str(folder(name))).config.architecture].model_type for name in FAMILIES}
    assert found == {name: name for name in FAMILIES}


@pytest.mark.parametrize(
    "family", [family if family == "qwen3" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_crowded_engine(family: str) -> None:
    """All at once, for the quick suite: chunks, cached prefixes, preemption by swapping, drafts and the fastest kernels."""
    blocks = 22 * len(resolve_model(str(folder(family))).config.windows)
    answers(
        family, num_gpu_blocks_override=blocks, max_num_batched_tokens=24, preemption_mode="swap", swap_space=1 << 24,
        speculative_config={"method": "ngram", "prompt_lookup_min": 1, "adaptive": False},
    )  # fmt: skip
