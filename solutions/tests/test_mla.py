"""DeepSeek in small: latents in pages, two ways through them, experts chosen group by group; against transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from benchmarks.memory import per_token, token_bytes
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.lora.registry import LoRARequest
from solutions.core.platform import native
from solutions.models.config.aliases import ALIASES
from solutions.models.config.entries import ModelError
from solutions.models.config.model_config import ModelConfig
from solutions.models.costs.roofline import decode_cost, num_product_weights, prefill_cost
from solutions.models.deepseek import DeepseekMLP
from solutions.models.kernels.attach import Plan, attach
from solutions.models.kernels.experts_cpu import NativeExperts
from solutions.models.kernels.experts_triton import TritonExperts
from solutions.models.loader import load_model, resolve_model
from solutions.models.mla import UpProjection
from solutions.parallelism.tensor_parallel import SINGLE, TensorParallel
from solutions.tests.engine_twins import check_answer, folder, oracle
from solutions.tests.lora_adapters import likeliest, make_adapter
from solutions.tests.test_families import GREEDY, PROMPTS, SETTINGS, generate
from solutions.tests.test_models import CPU, assert_same_logits, random_prompts, run
from solutions.tests.tiny_models import FAMILIES, make_tiny

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 163840,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip
"""What the hub's config.json says where it is not transformers' default."""
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so nothing is packed")


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A tiny model's config.json."""
    hf = AutoConfig.for_model(family, **(FAMILIES[family] | changes)).to_dict()
    version = family.removeprefix("deepseek_").upper()
    return hf | {"architectures": [f"Deepseek{version}ForCausalLM"]}


# Two ways through one cache


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"q_lora_rank": 48, "attention_bias": True, "topk_method": "greedy", "n_group": None}),
        ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False, "v_head_dim": 80, "n_group": 1, "topk_group": 1}),
    ],
)
def test_variants_say_what_transformers_says(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Queries with and without a latent, biases, pairs in another order, values wider than keys, one group."""
    assert_same_logits(tmp_path, make_tiny(family, tmp_path, **changes), tolerance={"atol": 5e-4, "rtol": 1e-4})


def test_both_ways_are_the_same_attention() -> None:
    """Prompts of one step may go either way, whatever way their beginning went."""
    source = resolve_model(str(folder("deepseek_v3")))
    model, prompts = load_model(source, torch.float32, CPU, progress=False), random_prompts([1, 9, 40])
    expanded: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        expanded.append(len(inputs[0]))

    for layer in model.modules():
        if isinstance(layer, UpProjection):
            layer.register_forward_hook(count)
    run(model, source.config, prompts[:1], [1])  # which makes the matrices of the absorbed way
    logits, counts = [], []
    for plain_from in (1, 5, 1000):
        expanded.clear()
        logits.append(run(model, source.config, prompts, [6, 4, 30], plain_from))
        counts.append(sorted(set(expanded)))
    assert counts == [[1, 6, 9, 10, 40], [6, 40], []]
    for other in logits[1:]:
        for one, two in zip(logits[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_cached_once_for_all_heads(dtype: torch.dtype) -> None:
    """DeepSeek-V2-Lite: 576 numbers a layer, where 16 heads would take 5,120 and GQA with four KV heads of 128 takes 1,024."""
    config = ALIASES["deepseek-v2-lite"].config
    assert config.latent.cached == 576
    assert token_bytes("deepseek-v2-lite", dtype) == 27 * 576 * dtype.itemsize
    shown = "deepseek-v2-lite: 30.4 KiB a token; keys and values of all heads would take 270.0"
    assert per_token("deepseek-v2-lite") == shown
    llm = LLM(str(folder("deepseek_v2")), **SETTINGS)
    caches, latent = llm.llm_engine.executor.worker.cache.kv_caches, llm.llm_engine.model_config.latent
    assert sum(cache.numel() for cache in caches) == 3 * 200 * 8 * latent.cached == 3 * 200 * 8 * (96 + 32)


def test_costs_are_those_of_the_papers() -> None:
    """DeepSeek-V3 multiplies a token with 37 billion of its weights, V2-Lite with 2.4; the absorbed way reads latents alone."""
    lite, v3 = ALIASES["deepseek-v2-lite"].config, ModelConfig.from_hf(V3)
    assert num_product_weights(lite) == pytest.approx(2.4e9, rel=0.05)
    assert num_product_weights(v3) == pytest.approx(37e9, rel=0.03)
    assert v3.attention_scale == pytest.approx(192**-0.5 * (0.1 * torch.log(torch.tensor(40.0)).item() + 1) ** 2)
    cost = decode_cost(lite, 4, 1000)
    assert cost.kv_bytes == 4 * 1000 * 27 * 576 * 2
    assert cost.attention_operations == 4 * 1000 * 27 * 16 * 2 * (576 + 576)
    assert prefill_cost(lite, 10).attention_operations == 55 * 27 * 16 * 2 * (192 + 128)


# Experts


def layer_and_router(family: str, **changes: Any) -> tuple[DeepseekMLP, torch.nn.Module]:
    """A layer of the engine, and transformers' router with the same random weights."""
    reference = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    theirs = (DeepseekV2TopkRouter if family == "deepseek_v2" else DeepseekV3TopkRouter)(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ours = DeepseekMLP(ModelConfig.from_hf(small(family, **changes)), SINGLE)
        for param in ours.parameters():
            param.normal_(0.0, 0.2, generator=generator)
        theirs.weight.copy_(ours.gate.weight)
        if family == "deepseek_v3":
            theirs.e_score_correction_bias.copy_(ours.experts.e_score_correction_bias)
    return ours, theirs


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_group": 1}),
        ("deepseek_v2", {"topk_group": 3, "routed_scaling_factor": 16.0}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 6}),
        ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    ],
)
def test_experts_are_those_that_transformers_chooses(family: str, changes: dict[str, Any]) -> None:
    ours, theirs = layer_and_router(family, **changes)
    x = torch.randn(50, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected_weights, expected = theirs(x)
        torch.testing.assert_close(ours.gate(x), logits)
        weights, chosen = ours.experts.choose(logits)
    assert (chosen[:, -1] == 12).all()  # the shared one
    assert (weights[:, -1] == 1).all()
    order, theirs_order = chosen[:, :-1].argsort(1), expected.argsort(1)
    assert torch.equal(chosen[:, :-1].gather(1, order), expected.gather(1, theirs_order))
    torch.testing.assert_close(weights[:, :-1].gather(1, order), expected_weights.gather(1, theirs_order))


@pytest.mark.parametrize("kernels", [pytest.param("cpu", marks=needs_compiler), "triton"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_kernels_take_the_choice_that_the_family_makes(family: str, kernels: str) -> None:
    plain, _ = layer_and_router(family)
    fast, x = copy.deepcopy(plain), torch.randn(23, 192, generator=torch.Generator().manual_seed(2))
    attach(torch.nn.ModuleDict({"mlp": fast}), Plan(kernels))
    kind = NativeExperts if kernels == "cpu" else TritonExperts
    assert isinstance(fast.experts.forward if kernels == "cpu" else fast.experts.multiply, kind)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, x.clone()), plain(x, x.clone()), atol=5e-4, rtol=1e-4)
    assert torch.equal(fast.experts.load, plain.experts.load)
    assert fast.experts.load[-1] == 23


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up_to_the_layer(size: int, whole: bool) -> None:
    full, _ = layer_and_router("deepseek_v3")
    weights, x = full.state_dict(), torch.randn(9, 192, generator=torch.Generator().manual_seed(3))
    total = torch.zeros_like(x)
    for rank in range(size):
        with torch.no_grad():
            part = DeepseekMLP(ModelConfig.from_hf(small("deepseek_v3")), TensorParallel(rank, size, None, whole))
            for name, layer in part.named_modules():
                for key, param in layer.named_parameters(recurse=False):
                    layer.weight_loader(param, weights[f"{name}.{key}"])
            total += part(x, x.clone())  # rank 0 alone adds the residual stream
    with torch.no_grad():
        torch.testing.assert_close(total, full(x, x.clone()), atol=5e-4, rtol=1e-4)


# The engine


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_logits_of_the_engine(family: str) -> None:
    """Prompts in chunks, some of which go the plain way, beside others that decode; log-probabilities within 1e-3."""
    llm = LLM(str(folder(family)), **SETTINGS, max_num_batched_tokens=24)
    llm.llm_engine.executor.worker.backend.plain_from = 12
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        check_answer(family, "auto", "torch", prompt, answer)
        with torch.inference_mode():
            expected = oracle(family, "auto", "torch")(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place, entry in enumerate(output.prompt_logprobs[1:], 1):
            token = prompt[place]
            assert entry[token].logprob == pytest.approx(float(expected[place - 1, token]), abs=1e-3)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("changes", [{"tensor_parallel_size": 2, "enable_expert_parallel": True}, {"tensor_parallel_size": 3}])
def test_ranks_have_whole_experts_or_parts(changes: dict[str, Any]) -> None:
    llm = LLM(str(folder("deepseek_v2")), **SETTINGS, **changes)
    try:
        for prompt, answer in zip(PROMPTS, generate(llm), strict=True):
            check_answer("deepseek_v2", "auto", "torch", prompt, answer)
    finally:
        llm.llm_engine.close()


def test_adapters_of_queries_work_and_those_of_latents_are_refused(tmp_path: Path) -> None:
    model = oracle("deepseek_v3", "auto", "torch")
    merged = make_adapter(tmp_path / "good", model, targets=("q_b_proj", "o_proj"))
    make_adapter(tmp_path / "bad", model, targets=("kv_b_proj",))
    llm = LLM(str(folder("deepseek_v3")), **SETTINGS, enable_lora=True)
    good = LoRARequest("good", 1, str(tmp_path / "good"))
    prompt = PROMPTS[2]
    output = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False, lora_request=good)[0]
    said = list(output.outputs[0].token_ids)
    assert said == likeliest(merged, prompt, said) != likeliest(model, prompt, said)
    with pytest.raises(ModelError, match=r"the adapter changes model\.layers\.0\.self_attn\.kv_b_proj, and only linear layers"):
        llm.llm_engine.executor.worker.adapters.read(tmp_path / "bad")


def test_what_predicts_one_token_more_is_passed_over(tmp_path: Path) -> None:
    """V3's files hold a layer behind the last one; older ones give `rope_scaling`, and each expert's matrices."""
    path = folder("deepseek_v3")
    tensors = load_file(path / "model.safetensors")
    assert "model.layers.2.mlp.gate.e_score_correction_bias" in tensors
    for name in ("eh_proj.weight", "self_attn.q_a_proj.weight", "mlp.gate.e_score_correction_bias"):
        tensors[f"model.layers.3.{name}"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    loaded = load_model(resolve_model(str(tmp_path)), torch.float32, CPU, progress=False)
    assert len(loaded.model.layers) == 3


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"attention_backend": "cpu"}, "--attention-backend cpu: attention over latents is computed by torch and triton alone"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8: not with a model that caches latents"),
        (
            {"batch_invariant": True, "enable_cpu_kernels": False},
            "--batch-invariant: it needs the C\\+\\+ kernels of a CPU, and attention runs on torch",
        ),
        ({"tensor_parallel_size": 4}, "cannot be cut for 4 ranks; --tensor-parallel-size must be one of 1, 2, 3, 6"),
    ],
)
def test_what_cannot_be_had_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        LLM(str(folder("deepseek_v2")), **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' and scoring_func 'softmax' is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "renormalised weights of experts"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "experts in some layers alone"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "another topk_method than noaux_tc, or scoring_func than sigmoid"),
        ("deepseek_v3", {"n_group": 5}, "n_routed_experts, 12, cannot be dealt out to 5 groups"),
        ("deepseek_v3", {"n_group": 12, "topk_group": 6}, "cannot be dealt out to 12 groups"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group must be a whole number from 1 to 4"),
        ("deepseek_v3", {"num_experts_per_tok": 7}, "num_experts_per_tok must be a whole number from 1 to 6"),
        ("deepseek_v3", {"kv_lora_rank": 95}, "kv_lora_rank \\+ qk_rope_head_dim must be even, got 127"),
        ("deepseek_v3", {"qk_rope_head_dim": 3, "kv_lora_rank": 97}, "heads of 3 elements are not supported"),
        ("deepseek_v3", {"kv_lora_rank": None}, "no entry 'kv_lora_rank'"),
    ],
)
def test_other_deepseeks_are_refused(family: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelError, match=what):
        ModelConfig.from_hf(json.loads(json.dumps(small(family) | changes)))
