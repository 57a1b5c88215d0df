"""Random lives of twins in the real engine, on tiny models: each token that it chooses is the one that transformers chooses.

What `twins.py` checks slot by slot in a simulated cache, this checks in the tensors: the copies, swaps and kernels as well,
tokens on trial, and keys and values in int8.
"""

from __future__ import annotations

import random
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask

from solutions.attention.hybrid_manager import blocks_of_one
from solutions.batching.sampling_params import SamplingParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.core.platform import native
from solutions.models.loader import resolve_model
from solutions.tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

TIE = {"auto": 1e-3, "int8": 0.02}
"""How far below the likeliest token a chosen one may lie, as two sums of the same numbers differ; logits are some units apart.
A key that two programs round to neighbouring integers makes more of a difference."""


@cache
def folder(name: str) -> Path:
    """A model's folder, made once for the process."""
    path = Path(tempfile.mkdtemp(prefix=f"twins-{name}-"))
    make_tiny(name, path)
    return path


def int8_scales(vectors: Tensor, backend: str) -> Tensor:
    """A float16 for each vector, as the backend's cache makes it. [..., D] -> [..., 1]

    Both are above the largest magnitude / 127: "cpu" takes the next float16, the others one that is a thousandth larger.
    """
    least = vectors.abs().amax(-1, keepdim=True) / 127
    if backend != "cpu":
        return (least * 1.001).half().float()
    nearest = least.half()
    return torch.where(nearest.float() < least, torch.nextafter(nearest, torch.full_like(nearest, torch.inf)), nearest).float()


def as_int8(vectors: Tensor, backend: str) -> Tensor:
    """What a cache of int8 makes of vectors."""
    step = int8_scales(vectors, backend).clamp_min(1e-30)
    return (vectors / step).round() * step


def of_latents(module: Any, key: Tensor, backend: str) -> list[Tensor]:
    """All heads' keys and values [1, H, T, ·] of a layer whose cache holds vectors, both halves of which were rounded."""
    vectors = torch.cat((module.kv_a_layernorm.said, key[:, 0, :, -module.qk_rope_head_dim :]), -1)
    vectors = torch.cat([as_int8(half, backend) for half in vectors.chunk(2, -1)], -1)  # [1, T, rank + turned]
    latents, turned = vectors[..., : module.kv_lora_rank], vectors[:, None, :, module.kv_lora_rank :]
    heads = module.kv_b_proj(latents).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    still, value = heads.split((module.qk_nope_head_dim, module.v_head_dim), -1)
    return [torch.cat((still, turned.expand(-1, still.shape[1], -1, -1)), -1), value]


def attend_int8(
    backend: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> Any:  # fmt: skip
    """Plain attention over keys and values that were rounded to int8. query: [1, H, T, D], key, value: [1, H_kv, T, D]"""
    stored = [as_int8(x, backend) for x in (key, value)]
    if hasattr(module, "kv_b_proj"):
        stored = of_latents(module, key, backend)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in stored)
    scores = query @ key.transpose(-1, -2) * scaling  # [1, H, T, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask[..., : key.shape[-2]]
    if s_aux is not None:  # sinks, [H]
        scores = torch.cat((scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    return (scores.softmax(-1)[..., : value.shape[-2]] @ value).transpose(1, 2), None


@cache
def oracle(name: str, kv_cache_dtype: str, backend: str) -> PreTrainedModel:
    """transformers' model; with "int8" keys and values are rounded as the backend's cache rounds them."""
    attention = "eager" if kv_cache_dtype == "auto" else f"int8_kv_{backend}"
    if kv_cache_dtype == "int8":
        AttentionInterface.register(attention, partial(attend_int8, backend))
        AttentionMaskInterface.register(attention, eager_mask)
    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32, attn_implementation=attention).eval()
    for module in model.modules():
        if hasattr(module, "kv_a_layernorm"):  # what a model with latents caches
            module.kv_a_layernorm.register_forward_hook(lambda norm, _, said: setattr(norm, "said", said))
    return model


def check_answer(name: str, kv_cache_dtype: str, backend: str, prompt: list[int], answer: list[int]) -> None:
    """`check_tokens` of a family's model."""
    check_tokens(oracle(name, kv_cache_dtype, backend), prompt, answer, TIE[kv_cache_dtype])


def check_tokens(model: PreTrainedModel, prompt: list[int], answer: list[int], tie: float = TIE["auto"]) -> None:
    """See that each token of an answer is, within `tie`, the likeliest one behind those before it.

    Raises:
        AssertionError: one is not.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    behind = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    wrong = (behind > tie).nonzero()
    assert not len(wrong), (
        f"token {int(wrong[0])} of {len(answer)} behind {prompt} is {answer[int(wrong[0])]}, which is "
        f"{float(behind[wrong[0]]):.3f} less likely than {int(logits[int(wrong[0])].argmax())}"
    )


def draw_settings(rng: random.Random, name: str) -> dict[str, Any]:
    """An engine's settings: memory for a few sequences, and any mixture of what moves blocks about."""
    size = rng.choice([2, 4, 8, 16])
    max_model_len = rng.randint(40, 96)
    policy = rng.choice(["fcfs", "priority", "lpm", "fair"])
    drafts: list[Any] = [None, {"method": "ngram", "prompt_lookup_min": 1}]
    drafts += [{"method": "draft_model", "model": str(folder(name))}]
    draft = rng.choice(drafts)
    if draft is not None:
        draft = draft | {"num_speculative_tokens": rng.randint(1, 5), "disable_by_batch_size": rng.choice([2, 4, 64])}
        draft = draft | {"adaptive": rng.random() < 0.3}
    chunked = rng.random() < 0.8
    backend = "torch" if native.compiler() is None else rng.choice(["torch", "cpu", "cpu"])
    kv = rng.choice(["auto", "auto", "int8"])
    if "deepseek" in name:  # which has a backend of its own
        backend, kv = "auto", "auto"
    kernels = rng.random() < 0.5
    windows = resolve_model(str(folder(name))).config.windows
    needed = blocks_of_one(windows, max_model_len, size, max(64, max_model_len))
    fits = kernels and (backend == "cpu" or ("deepseek" in name and native.compiler() is not None))
    return {
        "dtype": "float32", "block_size": size, "max_model_len": max_model_len,
        "num_gpu_blocks_override": needed + rng.choice([0, 1, 2, 8]),
        "preemption_mode": rng.choice(["recompute", "swap"]), "swap_space": rng.choice([0, 1 << 14, 1 << 16, 1 << 20]),
        "scheduling_policy": policy, "enable_prefix_caching": policy == "lpm" or rng.random() < 0.8,
        "enable_chunked_prefill": chunked, "max_num_batched_tokens": rng.choice([7, 16, 64]) if chunked else max_model_len,
        "long_prefill_token_threshold": rng.choice([0, 0, 5]), "max_num_seqs": rng.choice([3, 7]) if chunked else 7,
        "kv_cache_dtype": kv, "attention_backend": backend,
        "enable_cpu_kernels": kernels, "batch_invariant": fits and rng.random() < 0.3,
        "speculative_config": draft, "async_scheduling": draft is None and rng.random() < 0.5,
    }  # fmt: skip


def run_engine_twins(rng: random.Random, kv_offload: str | None = None) -> None:
    """One life of twins in the engine, some of them ended before their time; with a tier where the engine can have one.

    Raises:
        AssertionError: a token is not the likeliest one, an invariant broke, an answer is short, or blocks were left over.
    """
    name = rng.choice(list(FAMILIES))
    settings = draw_settings(rng, name)
    has_groups, drafts = "gemma" in name or name == "gpt_oss", settings["speculative_config"]
    if kv_offload is not None and not has_groups and settings["enable_prefix_caching"]:
        settings |= {"kv_offload": kv_offload, "kv_offload_size": 1 << 18}
        if drafts is not None and drafts["method"] == "draft_model":
            settings["speculative_config"] = None
    engine = LLMEngine(EngineConfig(model=str(folder(name)), **settings))
    longest = settings["max_model_len"] // 2
    beginning = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, settings["block_size"], 20]))]
    prompts = [
        (beginning + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))])[:longest]
        for _ in range(rng.randint(1, 3))
    ]
    asked: dict[str, tuple[list[int], int, int]] = {}
    answered: dict[str, list[list[int]]] = {}
    aborted: set[str] = set()

    def step() -> None:
        for output in engine.step():
            answered[output.request_id] = [list(each.token_ids) for each in output.outputs]
        engine.scheduler.check_invariants()

    for number in range(rng.randint(3, 7)):
        prompt, count, length = rng.choice(prompts), rng.choice([1, 1, 2, 3]), rng.randint(1, longest)
        params = SamplingParams(temperature=0, max_tokens=length, n=count, ignore_eos=True)
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params, priority=rng.randint(0, 2))
        asked[str(number)] = prompt, count, length
        for _ in range(rng.choice([0, 0, 0, rng.randint(1, 8)])):
            step()
        if rng.random() < 0.15:
            victim = rng.choice(list(asked))
            ended = engine.abort_request(victim)
            if ended is not None:
                aborted.add(victim)
                answered[victim] = [list(each.token_ids) for each in ended.outputs]
    while engine.has_unfinished_requests():
        step()
    stats = engine.stats()
    engine.close()
    assert stats.kv_cache_usage == 0, "blocks are left over"
    told = f"{name}, {settings}"
    for request_id, (prompt, count, length) in asked.items():
        answers = answered[request_id]
        lengths = [len(answer) for answer in answers]
        assert request_id in aborted or lengths == [length] * count, f"{lengths} tokens, {count} times {length} asked: {told}"
        for answer in answers:
            if answer:
                try:
                    check_answer(name, settings["kv_cache_dtype"], settings["attention_backend"], prompt, answer)
                except AssertionError as error:
                    raise AssertionError(f"{error}: {told}") from None
