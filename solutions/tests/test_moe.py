"""Experts: chosen, sorted and multiplied as transformers does, however a checkpoint keeps them and whichever rank has them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.config.aliases import ALIASES
from solutions.models.config.entries import ModelError
from solutions.models.config.model_config import ModelConfig
from solutions.models.costs.roofline import decode_cost, num_product_weights
from solutions.models.kernels.attach import Plan, attach
from solutions.models.kernels.experts_cpu import NativeExperts
from solutions.models.kernels.experts_triton import TritonExperts
from solutions.models.kernels.layers_triton import grouped_product
from solutions.models.loader import load_model, resolve_model
from solutions.models.sparse import SparseMLP
from solutions.parallelism.tensor_parallel import SINGLE, TensorParallel
from solutions.serving.server_metrics import ServerMetrics
from solutions.tests.engine_twins import folder
from solutions.tests.quantized_folders import check_against_transformers
from solutions.tests.test_families import SETTINGS, generate
from solutions.tests.tiny_models import make_tiny

BLOCKS = {"mixtral": MixtralSparseMoeBlock, "qwen2_moe": Qwen2MoeSparseMoeBlock, "qwen3_moe": Qwen3MoeSparseMoeBlock}
SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1,
    "vocab_size": 64,
}  # fmt: skip
QWEN: dict[str, Any] = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 160},
    "qwen3_moe": QWEN | {"norm_topk_prob": True},
}
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so nothing is packed")


def make(family: str, parallel: TensorParallel = SINGLE, **changes: Any) -> tuple[SparseMLP, torch.nn.Module]:
    """A layer of the engine, or a rank's part of it, and transformers' with the same random weights."""
    hf = AutoConfig.for_model(family, **(SIZES | CASES[family] | changes))
    theirs = BLOCKS[family](hf).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in theirs.parameters():
            param.normal_(0.0, 0.2, generator=generator)
        config = ModelConfig.from_hf(
            hf.to_dict() | {"architectures": [type(theirs).__name__.replace("SparseMoeBlock", "ForCausalLM")]}
        )
        ours = SparseMLP(config, parallel)
        weights = dict(theirs.named_parameters())
        ours.gate.weight_loader(ours.gate.weight, weights["gate.weight"], "routed")
        if "shared_expert_gate.weight" in weights:
            ours.gate.weight_loader(ours.gate.weight, weights["shared_expert_gate.weight"], "shared")
        for name, expert in ours.experts.named_children():
            gate_up, down = expert.gate_up_proj, expert.down_proj
            if int(name) == len(weights["experts.down_proj"]):
                gate_up.weight_loader(gate_up.weight, weights["shared_expert.gate_proj.weight"], "gate")
                gate_up.weight_loader(gate_up.weight, weights["shared_expert.up_proj.weight"], "up")
                down.weight_loader(down.weight, weights["shared_expert.down_proj.weight"])
            else:
                gate_up.weight_loader(gate_up.weight, weights["experts.gate_up_proj"][int(name)])
                down.weight_loader(down.weight, weights["experts.down_proj"][int(name)])
    return ours, theirs


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(seed))


# A layer


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": False}, {"norm_topk_prob": True}], ids=["", "plain", "renormalised"]
)
@pytest.mark.parametrize("family", BLOCKS)
def test_a_layer_says_what_transformers_says(family: str, changes: dict[str, bool]) -> None:
    ours, theirs = make(family, **changes)
    for count in (1, 2, 40):
        x = tokens(count)
        with torch.no_grad():
            expected = theirs(x[None])[0]
            torch.testing.assert_close(ours(x, None), expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(ours(x, x.clone()), expected + x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_ranks_add_up_to_the_layer(family: str, size: int, whole: bool) -> None:
    x, (full, theirs) = tokens(9), make(family)
    ranks = [make(family, TensorParallel(rank, size, None, whole))[0] for rank in range(size)]
    with torch.no_grad():
        total = sum((rank(x, x.clone()) for rank in ranks), torch.zeros_like(x))  # rank 0 alone adds the residual stream
        torch.testing.assert_close(total, theirs(x[None])[0] + x, atol=2e-5, rtol=1e-4)
    count = len(full.experts.load)
    owned = [[name for name, _ in rank.experts.named_children()] for rank in ranks]
    assert [name for names in owned for name in names] == [str(i) for i in range(count)] * (1 if whole else size)
    params = [sum(p.numel() for p in rank.experts.parameters()) for rank in ranks]
    assert sum(params) == sum(p.numel() for p in full.experts.parameters())


NARROW = {"intermediate_size": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}


@pytest.mark.parametrize("kernels", [None, pytest.param("cpu", marks=needs_compiler), "triton"])
@pytest.mark.parametrize(("size", "whole", "sizes"), [(9, True, {}), (2, False, NARROW)], ids=["no expert", "no column"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_rank_may_have_nothing(family: str, size: int, whole: bool, sizes: dict[str, int], kernels: str | None) -> None:
    x, (_, theirs) = tokens(9), make(family, **sizes)
    ranks = [make(family, TensorParallel(rank, size, None, whole), **sizes)[0] for rank in range(size)]
    assert not sum(param.numel() for param in ranks[-1].experts.parameters())
    with torch.no_grad():
        for rank in ranks:
            attach(rank, Plan(kernels))
        total = sum((rank(x, x.clone()) for rank in ranks), torch.zeros_like(x))
        torch.testing.assert_close(total, theirs(x[None])[0] + x, atol=1e-4, rtol=1e-3)


def test_load_counts_tokens_of_all_experts() -> None:
    ours, theirs = make("qwen2_moe", TensorParallel(0, 2, None, True))
    x = tokens(40)
    with torch.no_grad():
        chosen = (x @ theirs.gate.weight.t()).topk(3).indices
        ours(x, None)
        ours(x[:5], None)
    expected = chosen.flatten().bincount(minlength=7) + chosen[:5].flatten().bincount(minlength=7)
    assert ours.experts.load.tolist() == [*expected.tolist(), 45]


# The kernels of a CPU


@needs_compiler
@pytest.mark.parametrize(("dtype", "quantization", "most"), [
    (torch.float32, None, 1e-5), (torch.bfloat16, None, 0.02), (torch.float32, "int8", 0.05), (torch.bfloat16, "int8", 0.05),
    (torch.float32, "int4", 0.3), (torch.bfloat16, "int4", 0.3),
])  # fmt: skip
@pytest.mark.parametrize("family", BLOCKS)
def test_the_kernel_says_what_the_layer_says(family: str, dtype: torch.dtype, quantization: str | None, most: float) -> None:
    for parallel in (SINGLE, TensorParallel(1, 2, None, True), TensorParallel(1, 2)):
        plain, _ = make(family, parallel)
        fast = copy.deepcopy(plain).to(dtype)
        attach(fast, Plan("cpu", quantization))
        assert isinstance(fast.experts.forward, NativeExperts)
        with torch.no_grad():
            for count in (1, 5, 70):
                x, logits = tokens(count).to(dtype), plain.gate(tokens(count)).to(dtype)
                expected = plain.experts(x.float(), logits.float(), x.float().clone())
                found = fast.experts(x, logits, x.clone())
                assert float((found.float() - expected).abs().max()) < most * float(expected.abs().max())
                alone = torch.cat([fast.experts(x[i : i + 1], logits[i : i + 1]) for i in range(count)])
                assert torch.equal(alone, fast.experts(x, logits))
        assert fast.experts.load.equal(3 * plain.experts.load)


@needs_compiler
def test_experts_of_a_layer_may_be_kept_in_several_ways() -> None:
    """As where a checkpoint leaves some as they are: neighbours of one kind are one loop, and a kind may come again."""
    plain, _ = make("qwen2_moe")
    kinds: dict[str, list[str | None]] = {"all": [None] * 8, "turns": [None, "int8"] * 4, "shared": ["int8"] * 7 + [None]}
    layers = {}
    for name, quantizations in kinds.items():
        layer = copy.deepcopy(plain)
        for number, quantization in enumerate(quantizations):
            attach(layer.experts.own[number], Plan("cpu", quantization))
        layers[name] = NativeExperts(layer.experts, torch.float32)
    x = tokens(40)
    with torch.no_grad():
        logits = plain.gate(x)
        expected = plain.experts(x, logits)
        errors = {name: float((layer(x, logits) - expected).abs().max()) for name, layer in layers.items()}
    assert errors["all"] < 1e-5 * float(expected.abs().max()) < errors["turns"]
    assert max(errors["turns"], errors["shared"]) < 0.05 * float(expected.abs().max())


@needs_compiler
def test_experts_that_no_token_chose_are_not_read() -> None:
    """Their weights are NaN, and nothing comes of it."""
    for quantization in (None, "int4"):
        ours, _ = make("qwen3_moe")
        attach(ours, Plan("cpu", quantization))
        with torch.no_grad():
            x = tokens(1)
            expected, chosen = ours(x, None).clone(), set(ours.experts.load.nonzero().flatten().tolist())
            assert len(chosen) == 3
            for name, expert in ours.experts.named_children():
                if int(name) not in chosen:
                    for layer in (expert.gate_up_proj, expert.down_proj):
                        layer.weight.data.view(torch.uint8).fill_(255)
            assert torch.equal(ours(x, None), expected)


@needs_compiler
def test_logits_that_are_no_numbers_or_equal_choose_some_experts() -> None:
    ours, _ = make("mixtral")
    attach(ours, Plan("cpu"))
    logits = torch.tensor([[float("nan")] * 5, [1.0] * 5, [float("inf"), 0, 0, 0, 0], [-1e38, -1e38, 0, -1e38, -1e38]])
    with torch.no_grad():
        y = ours.experts(tokens(4), logits)
    assert ours.experts.load.sum() == 8
    assert y[[1, 3]].isfinite().all()


@needs_compiler
def test_of_equally_good_experts_the_first_are_chosen() -> None:
    for family in ("mixtral", "qwen3_moe"):
        ours, _ = make(family)
        attach(ours, Plan("cpu"))
        count, most = len(ours.experts.load), ours.experts.mixture.chosen
        with torch.no_grad():
            ours.experts(tokens(4), torch.zeros(4, count))
            assert ours.experts.load.tolist() == [4] * most + [0] * (count - most)
            logits = torch.full((4, count), 2.0)
            logits[:, -1] = 3.0  # all but this one are equal
            ours.experts(tokens(4), logits)
        assert ours.experts.load.tolist() == [8] * (most - 1) + [4] + [0] * (count - most - 1) + [4]


@needs_compiler
@pytest.mark.parametrize("family", BLOCKS)
def test_large_logits_and_one_expert_for_all_tokens(family: str) -> None:
    """No exponential overflows, and what the kernel fills up a row of scores with weighs nothing."""
    plain, _ = make(family, norm_topk_prob=False)
    fast = copy.deepcopy(plain)
    attach(fast, Plan("cpu"))
    x = tokens(40)
    for logits in (300 * plain.gate(x), plain.gate(x) - 40, torch.eye(len(plain.experts.load))[[2] * 40] * 1000):
        with torch.no_grad():
            torch.testing.assert_close(fast.experts(x, logits), plain.experts(x, logits), atol=2e-5, rtol=1e-4)
    assert fast.experts.load[2] >= 40


# Triton, interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 3, 0, 1], [17, 0, 40, 70], [1], [0, 0]])
def test_a_grouped_product_is_a_product_for_each_expert(counts: list[int], dtype: torch.dtype) -> None:
    for outputs, inputs in ((70, 96), (64, 33)):
        x, weights = torch.randn(sum(counts) + 2, inputs).to(dtype), torch.randn(len(counts), outputs, inputs).to(dtype)
        bounds = torch.tensor([1, *counts]).cumsum(0)
        out = grouped_product(x, weights, bounds, torch.full((len(x), outputs), 7.0, dtype=dtype))
        parts = zip(x[1:-1].float().split(counts), weights.float(), strict=True)
        untouched = torch.full((1, outputs), 7.0)
        expected = torch.cat([untouched, *(part @ weight.t() for part, weight in parts), untouched]).to(dtype)
        torch.testing.assert_close(out, expected, atol=1e-4 if dtype is torch.float32 else 0.1, rtol=1e-2)


@pytest.mark.parametrize("family", BLOCKS)
def test_triton_says_what_the_layer_says(family: str) -> None:
    x = tokens(9)
    for parallel in (SINGLE, TensorParallel(0, 2, None, True), TensorParallel(1, 2, None, True)):
        plain, _ = make(family, parallel)
        fast = copy.deepcopy(plain)
        attach(fast, Plan("triton"))
        assert isinstance(fast.experts.multiply, TritonExperts)
        storages = {param.untyped_storage().data_ptr() for param in fast.experts.parameters()}
        assert len(storages) <= 2 + 2 * (family == "qwen2_moe")
        with torch.no_grad():
            logits = plain.gate(x)
            torch.testing.assert_close(fast.experts(x, logits), plain.experts(x, logits), atol=2e-5, rtol=1e-4)


# What a step costs


def test_a_step_costs_the_experts_that_it_reads() -> None:
    """Mixtral has 46.7 billion weights, of which a token is multiplied with 12.7; the embedding is a row."""
    mixtral = ALIASES["mixtral-8x7b"].config
    experts, attention, head = 32 * 8 * 3 * 4096 * 14336, 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024), 32000 * 4096
    assert num_product_weights(mixtral) == attention + head + experts // 4
    assert num_product_weights(mixtral, 1000) == attention + head + experts
    cost = decode_cost(mixtral, 2, 0)
    assert cost.weight_bytes == 2 * (attention + head + experts * 7 // 16)  # the second meets a quarter of the first one's
    assert cost.product_operations == 2 * 2 * (attention + head + experts // 4)


# Checkpoints


def fused(source: Path, target: Path) -> None:
    """The same weights as transformers 5 keeps them in memory: a tensor for all experts of a layer, gate and up in one."""
    tensors, experts = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        before, _, rest = name.partition(".experts.")
        if rest:
            number, matrix, _ = rest.split(".")
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix, matrix)
            experts.setdefault(before.replace("block_sparse_moe", "mlp"), {}).setdefault(matrix, {})[int(number)] = tensor
        else:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensor
    for before, matrices in experts.items():
        stacks = {matrix: torch.stack([of[i] for i in range(len(of))]) for matrix, of in matrices.items()}
        tensors[f"{before}.experts.gate_up_proj"] = torch.cat((stacks["gate_proj"], stacks["up_proj"]), dim=1)
        tensors[f"{before}.experts.down_proj"] = stacks["down_proj"]
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def weights_of(path: Path, parallel: TensorParallel = SINGLE) -> dict[str, Tensor]:
    model = load_model(resolve_model(str(path)), torch.float32, torch.device("cpu"), parallel, progress=False)
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", BLOCKS)
def test_one_tensor_for_all_experts_is_a_tensor_for_each(family: str, tmp_path: Path) -> None:
    fused(folder(family), tmp_path / "fused")
    for parallel in (SINGLE, TensorParallel(1, 2), TensorParallel(1, 2, None, True)):
        apart, together = weights_of(folder(family), parallel), weights_of(tmp_path / "fused", parallel)
        assert apart.keys() == together.keys()
        assert all(torch.equal(apart[name], together[name]) for name in apart)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok must be a whole number from 1 to 5, got 6"),
        ({"num_local_experts": 4}, "which is no weight of a MixtralForCausalLM"),
        ({"num_local_experts": 6}, r"expected shape \[6, 192\], the checkpoint has \[5, 192\]"),
        ({"num_local_experts": 1 << 30}, "must be a whole number from 1 to 4096"),
        ({"num_local_experts": 4096, "intermediate_size": 1 << 20}, "config.json and weights are of different models"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_experts_is_refused(wrong: dict[str, int], message: str, tmp_path: Path) -> None:
    source = folder("mixtral")
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | wrong))
    with pytest.raises(ModelError, match=message):
        weights_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_some_layers_may_have_one_mlp(dense: dict[str, Any], tmp_path: Path) -> None:
    make_tiny("qwen3_moe", tmp_path, **dense)
    check_against_transformers(tmp_path, tmp_path)


def test_prometheus_reads_how_often_each_expert_was_chosen() -> None:
    llm = LLM(str(folder("qwen2_moe")), dtype="float32", max_model_len=64, num_gpu_blocks_override=16)
    llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), use_tqdm=False
    )
    text = ServerMetrics("m", llm.llm_engine).text().decode()
    found = dict(re.findall(r'byov:expert_tokens_total\{expert="(\d+)",model_name="m"\} (\S+)', text))
    counts = [float(found[str(number)]) for number in range(7)]
    assert counts[6] == 3 * (3 + 8)  # layers, and the tokens that were computed
    assert sum(counts[:6]) == 2 * counts[6]


# Expert parallelism


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True, "enable_cpu_kernels": False}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_ranks_with_whole_experts_say_what_one_rank_says(family: str, settings: dict[str, Any]) -> None:
    said = []
    for parallel in ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}):
        llm = LLM(str(folder(family)), **(SETTINGS | settings | parallel))
        said.append(generate(llm))
        llm.llm_engine.close()
    if "dtype" in settings:  # sums of rounded numbers differ, and with them some tokens
        assert sum(a == b for one, two in zip(*said, strict=True) for a, b in zip(one, two, strict=True)) > 60
    else:
        assert said[0] == said[1]


def test_expert_parallelism_is_refused_where_there_is_nothing_to_deal_out() -> None:
    with pytest.raises(ValueError, match="needs --tensor-parallel-size above 1"):
        LLM(str(folder("mixtral")), enable_expert_parallel=True)
    with pytest.raises(ValueError, match="has no experts; leave the flag out"):
        LLM(str(folder("qwen3")), enable_expert_parallel=True, tensor_parallel_size=2)
