"""gpt-oss in small: attention sinks, clamped gates, biases of experts, and MXFP4 files; against transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP as TheirMLP

from solutions.attention.paged_attention_cpu import CpuBackend
from solutions.attention.paged_attention_torch import TorchBackend
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.models.config.model_config import ModelConfig
from solutions.models.gpt_oss import GptOssMLP
from solutions.models.kernels.attach import Plan, attach
from solutions.models.loader import load_model, resolve_model
from solutions.parallelism.tensor_parallel import SINGLE, TensorParallel
from solutions.quantization.layout.mxfp4 import Mxfp4Format
from solutions.tests.attention_cases import make_case
from solutions.tests.engine_twins import check_answer, folder, oracle
from solutions.tests.test_families import GREEDY, PROMPTS, SETTINGS, generate
from solutions.tests.test_models import CPU, assert_same_logits
from solutions.tests.tiny_models import FAMILIES, make_tiny

SMALL = FAMILIES["gpt_oss"]


@pytest.mark.parametrize(
    "changes", [{"attention_bias": False, "sliding_window": 5}, {"num_key_value_heads": 1}, {"layer_types": None}]
)
def test_variants_say_what_transformers_says(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_same_logits(tmp_path, make_tiny("gpt_oss", tmp_path, **changes), tolerance={"atol": 5e-4, "rtol": 1e-4})


def test_logits_of_the_engine() -> None:
    """Prompts in chunks, longer than the window; log-probabilities within 1e-3."""
    llm = LLM(str(folder("gpt_oss")), **SETTINGS, max_num_batched_tokens=24)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    assert llm.llm_engine.executor.worker.backend.sinks is None  # or a head that drafts would have the last layer's
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        check_answer("gpt_oss", "auto", "torch", prompt, list(output.outputs[0].token_ids))
        with torch.inference_mode():
            expected = oracle("gpt_oss", "auto", "torch")(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place, entry in enumerate(output.prompt_logprobs[1:], 1):
            assert entry[prompt[place]].logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-3)


BACKENDS = {"torch": TorchBackend, "cpu": partial(CpuBackend, 4), "cpu, in order": partial(CpuBackend, 4, batch_invariant=True)}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("window", [None, 7])
def test_a_sink_takes_its_share_of_the_softmax(window: int | None, name: str) -> None:
    """Written out: a column of sinks beside the scores, and no value for it. A sink of −∞ is none. The last context is cut into
    parts, which are merged."""
    if name != "torch" and native.compiler() is None:
        pytest.skip("no C++ compiler here")
    case = make_case([1, 5, 70, 1, 1], [1, 5, 90, 40, 2600], heads=(4, 2), head_dim=32, block_size=8, window=window)
    backend = BACKENDS[name]()

    def attend(sinks: Tensor | None) -> Tensor:
        metadata = case.metadata(backend)
        metadata.plan, backend.sinks = backend.plan(metadata, window), sinks
        return backend.attend(0, case.query, case.key, case.value, metadata, case.scale, window).clone()

    torch.testing.assert_close(attend(torch.full((4,), -torch.inf)), attend(None))
    sinks = torch.tensor([-2.0, 0.0, 300.0, 30.0])
    for out, q, k, v in zip(
        attend(sinks).split(case.query_lens), case.query.split(case.query_lens), case.keys, case.values, strict=True
    ):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        places, count = torch.arange(len(k)), len(q)
        at = places[-count:, None]
        hidden = (places > at) | (places <= at - (window or len(k) + 1))
        scores = (torch.einsum("qhd,lhd->hql", q, k) * case.scale).masked_fill(hidden, -torch.inf)
        weights = torch.cat((scores, sinks.view(4, 1, 1).expand(4, count, 1)), -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(out, torch.einsum("hql,lhd->qhd", weights, v), atol=2e-5, rtol=1e-4)


def make_layer(parallel: TensorParallel = SINGLE) -> tuple[GptOssMLP, TheirMLP]:
    """A layer's router and experts, or a rank's part, and transformers' with the same weights."""
    reference = AutoConfig.for_model("gpt_oss", **SMALL)
    theirs = TheirMLP(reference).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in theirs.parameters():
            param.normal_(0.0, 0.3, generator=generator)
        config = ModelConfig.from_hf(reference.to_dict() | {"architectures": ["GptOssForCausalLM"]})
        ours, of = GptOssMLP(config, parallel), dict(theirs.named_parameters())
        ours.gate.weight_loader(ours.gate.weight, of["router.weight"])
        ours.gate.weight_loader(ours.gate.bias, of["router.bias"])
        for name, expert in ours.experts.named_children():
            number, gate_up, down = int(name), expert.gate_up_proj, expert.down_proj
            matrix, bias = of["experts.gate_up_proj"][number].t(), of["experts.gate_up_proj_bias"][number]
            for first, piece in enumerate(("gate", "up")):
                gate_up.weight_loader(gate_up.weight, matrix[first::2], piece)
                gate_up.weight_loader(gate_up.bias, bias[first::2], piece)
            down.weight_loader(down.weight, of["experts.down_proj"][number].t())
            down.weight_loader(down.bias, of["experts.down_proj_bias"][number])
    return ours, theirs


@pytest.mark.parametrize("kernels", [None, "cpu", "triton"])
def test_experts_say_what_transformers_says(kernels: str | None) -> None:
    """Gates and ups on both sides of the limit; experts that get no token."""
    ours, theirs = make_layer()
    attach(torch.nn.ModuleDict({"mlp": ours}), Plan(kernels))
    for count in (1, 3, 60):
        x = 2 * torch.randn(count, 96, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            torch.testing.assert_close(ours(x, None), theirs(x[None])[0][0].view_as(x), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_ranks_add_up_to_the_layer(whole: bool) -> None:
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        total = sum(make_layer(TensorParallel(rank, 2, None, whole))[0](x, x.clone()) for rank in range(2))
        torch.testing.assert_close(total, make_layer()[1](x[None])[0][0].view_as(x) + x, atol=2e-4, rtol=1e-4)


# MXFP4


def packed(source: Path, target: Path) -> None:
    """The checkpoint with random experts in MXFP4, laid out as the published ones, and what transformers makes of them in
    `source`."""
    tensors, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    stored = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = tensors[name].shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(122, 126, (count, outputs, inputs // 32), generator=generator).to(torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plain = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in stored}
    target.mkdir()
    save_file(plain | stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    description = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": description}))


@pytest.mark.parametrize("parallel", [SINGLE, TensorParallel(1, 2), TensorParallel(1, 2, None, True)])
def test_mxfp4_files_are_the_weights_that_transformers_reads(parallel: TensorParallel, tmp_path: Path) -> None:
    make_tiny("gpt_oss", tmp_path / "plain")
    packed(tmp_path / "plain", tmp_path / "packed")
    plain, unpacked = (
        dict(load_model(resolve_model(str(tmp_path / name)), torch.float32, CPU, parallel, progress=False).named_parameters())
        for name in ("plain", "packed")
    )
    assert plain.keys() == unpacked.keys()
    assert all(torch.equal(plain[name], unpacked[name]) for name in plain)


def test_an_engine_runs_an_mxfp4_checkpoint(tmp_path: Path) -> None:
    make_tiny("gpt_oss", tmp_path / "plain")
    packed(tmp_path / "plain", tmp_path / "packed")
    one, other = (generate(LLM(str(tmp_path / name), **SETTINGS)) for name in ("plain", "packed"))
    assert one == other
    assert all(len(answer) == GREEDY.max_tokens for answer in one)


def test_every_number_of_mxfp4() -> None:
    """All 16, exponents at both ends, and which half of a byte comes first."""
    blocks = torch.arange(16).mul(16).add(torch.arange(15, -1, -1)).to(torch.uint8).view(1, 1, 1, 16).repeat(1, 3, 1, 1)
    scales = torch.tensor([0, 127, 250], dtype=torch.uint8).view(1, 3, 1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    torch.testing.assert_close(Mxfp4Format().unpack({"blocks": blocks, "scales": scales}).float(), expected, rtol=0, atol=0)
    assert expected[0, 1, :4].tolist() == [-6, 0, -4, 0.5]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_scales"), "should have blocks and scales of bytes"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.down_proj_scales": torch.ones(5, 96, 2).byte()}),
            r"the quantized layer model\.layers\.1\.mlp\.experts\.down_proj cannot be read: blocks \[5, 96, 3, 16\] do not fit",
        ),
    ],
)
def test_damaged_mxfp4_files_are_refused(change: Any, what: str, tmp_path: Path) -> None:
    make_tiny("gpt_oss", tmp_path / "plain")
    packed(tmp_path / "plain", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=what):
        load_model(resolve_model(str(tmp_path / "packed")), torch.float32, CPU, progress=False)


@pytest.mark.parametrize("backend", ["cuda", "naive"])
def test_other_backends_are_refused(backend: str) -> None:
    with pytest.raises(
        ValueError, match=f"--attention-backend {backend}: attention with sinks is computed by torch, cpu and triton alone"
    ):
        LLM(str(folder("gpt_oss")), **SETTINGS, attention_backend=backend)
