"""Tensor parallelism: parts of layers add up to the whole, and engines of several ranks say what one rank says."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.step_arrays import StepArrays
from solutions.core.engine import LLM
from solutions.core.worker_process import StepBoard, WorkerDiedError
from solutions.models.config.model_config import ModelConfig
from solutions.models.loader import resolve_model
from solutions.parallelism.tensor_parallel import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    Shard,
    TensorParallel,
    VocabParallelEmbedding,
)
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

CONFIG = ModelConfig(
    "LlamaForCausalLM", vocab_size=50, hidden_size=24, intermediate_size=96, num_layers=1, num_heads=9, num_kv_heads=3,
    head_dim=4, max_position_embeddings=64, norm_eps=1e-5, hidden_act="silu", attention_bias=True, mlp_bias=True,
)  # fmt: skip
START_STOP_CYCLES = int(os.environ.get("START_STOP_CYCLES", "3"))
"""Each takes some seconds; 200 show what a few cannot."""
GENERATOR = torch.Generator().manual_seed(0)


def ranks(size: int) -> list[TensorParallel]:
    """All ranks in this process; without a communicator, their sums are left to the test."""
    return [TensorParallel(rank, size) for rank in range(size)]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


# Who has what


@pytest.mark.parametrize("units", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_even_and_complete(units: int, size: int) -> None:
    shares = [parallel.share(units) for parallel in ranks(size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(units))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [(0, 9, 0, 3)]),
        (2, [(0, 6, 0, 2), (6, 9, 2, 3)]),
        (3, [(0, 3, 0, 1), (3, 6, 1, 2), (6, 9, 2, 3)]),
        (9, [(i, i + 1, i // 3, i // 3 + 1) for i in range(9)]),
    ],
)
def test_query_heads_stay_with_their_kv_head(size: int, expected: list[tuple[int, int, int, int]]) -> None:
    got = [parallel.heads(CONFIG) for parallel in ranks(size)]
    assert [(q.start, q.stop, kv.start, kv.stop) for q, kv in got] == expected


@pytest.mark.parametrize("size", [4, 6, 10, 27])
def test_ranks_that_heads_cannot_be_dealt_out_to(size: int) -> None:
    with pytest.raises(ValueError, match=r"9 heads over 3 KV heads .* --tensor-parallel-size must be one of 1, 2, 3, 9$"):
        TensorParallel(0, size).heads(CONFIG)


def test_the_mlp_is_cut_in_whole_vectors() -> None:
    assert [len(p.mlp(CONFIG)) for p in ranks(2)] == [64, 32]
    assert [len(p.mlp(replace(CONFIG, intermediate_size=100))) for p in ranks(3)] == [36, 32, 32]
    assert [len(p.mlp(replace(CONFIG, intermediate_size=7))) for p in ranks(2)] == [4, 3]


def test_the_vocabulary_is_padded() -> None:
    assert [(p.vocabulary(CONFIG).start, p.vocabulary(CONFIG).stop) for p in ranks(3)] == [(0, 17), (17, 34), (34, 51)]


# Layers


def load(layer: torch.nn.Module, **tensors: torch.Tensor) -> torch.nn.Module:
    """Give a layer a checkpoint's tensors, by "parameter" or "parameter__shard"."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter, _, shard = name.partition("__")
            layer.weight_loader(getattr(layer, parameter), tensor, shard or None)
    return layer


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("fused", [False, True])
def test_qkv(size: int, fused: bool) -> None:
    """Each rank's outputs are its heads of the whole; a checkpoint may keep the three apart or in one."""
    weights, biases = [rand(n * 4, 24) for n in (9, 3, 3)], [rand(n * 4) for n in (9, 3, 3)]
    tensors = {"weight": torch.cat(weights), "bias": torch.cat(biases)}
    if not fused:
        tensors = {f"{kind}__{name}": t for kind, many in (("weight", weights), ("bias", biases))
                   for name, t in zip("qkv", many, strict=True)}  # fmt: skip
    x = rand(5, 24)
    whole = [F.linear(x, w, b).view(5, -1, 4) for w, b in zip(weights, biases, strict=True)]
    for parallel in ranks(size):
        heads, kv_heads = parallel.heads(CONFIG)
        parts = (heads, kv_heads, kv_heads)
        expected = torch.cat([w[:, part.start : part.stop].flatten(1) for w, part in zip(whole, parts, strict=True)], dim=1)
        torch.testing.assert_close(load(QKVParallelLinear(CONFIG, parallel), **tensors)(x), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mlp(size: int) -> None:
    gate, up, down = rand(96, 24), rand(96, 24), rand(24, 96)
    gate_bias, up_bias, down_bias = rand(96), rand(96), rand(24)
    x, residual = rand(5, 24), rand(5, 24)
    expected = F.linear(F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)
    total, with_residual = torch.zeros(5, 24), torch.zeros(5, 24)
    for parallel in ranks(size):
        first = load(
            GateUpParallelLinear(CONFIG, parallel), weight__gate=gate, weight__up=up, bias__gate=gate_bias, bias__up=up_bias
        )
        second = load(RowParallelLinear(parallel.mlp(CONFIG), 24, True, parallel), weight=down, bias=down_bias)
        total += second(first(x))
        with_residual += second(first(x), residual.clone())
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_residual, residual + expected, rtol=1e-4, atol=1e-4)


class Gathered:
    """Stands for the communicator of a rank whose others' parts are known."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.parts)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("size", [1, 2, 3, 60])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary(size: int, tied: bool) -> None:
    """More ranks than tokens leave some with padding alone."""
    config = replace(CONFIG, tie_word_embeddings=tied)
    table, head = rand(50, 24), rand(50, 24)
    ids, hidden = torch.arange(50), rand(4, 24)
    total, logits = torch.zeros(50, 24), []
    for parallel in ranks(size):
        parallel = replace(parallel, communicator=Gathered([]))
        embedding = load(VocabParallelEmbedding(config, parallel), weight=table)
        total += embedding(ids)
        lm_head = ParallelLMHead(config, embedding, parallel)
        if not tied:
            load(lm_head, weight=head)
        logits.append(F.linear(hidden, lm_head.weight))
    torch.testing.assert_close(total, table, rtol=0, atol=0)
    lm_head.parallel = TensorParallel(size - 1, size, Gathered(logits))
    torch.testing.assert_close(lm_head(hidden), F.linear(hidden, table if tied else head))


@pytest.mark.parametrize(
    ("layer", "tensors"),
    [
        (ColumnParallelLinear(24, {"a": Shard(10, 0, 5)}, False), {"weight__a": torch.zeros(9, 24)}),
        (ColumnParallelLinear(24, {"a": Shard(10, 0, 5)}, False), {"weight": torch.zeros(9, 24)}),
        (ColumnParallelLinear(24, {"a": Shard(10, 0, 5)}, False), {"weight": torch.zeros(10, 23)}),
        (RowParallelLinear(Shard(10, 0, 5), 24, False, TensorParallel()), {"weight": torch.zeros(24, 5)}),
        (VocabParallelEmbedding(CONFIG, TensorParallel()), {"weight": torch.zeros(49, 24)}),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        load(layer, **tensors)


# Steps on the board


def test_a_step_is_read_as_it_was_written() -> None:
    writer = StepBoard()
    reader = StepBoard(os.dup(writer.descriptor))
    for length in (3, 50_000, 1):  # it grows, and what is left of a longer step does not matter
        ids = torch.arange(length).numpy()
        tables = torch.arange(2 * length).view(length, 2).int().numpy()
        empty = torch.empty(0, 2, dtype=torch.int64).numpy()
        step = StepArrays(
            ids + 2, tables, ids.astype("int32"), ids.astype("int32"), ids, ids + 1, ids, empty, empty, empty, ids, ids
        )
        got = reader.read(writer.write(step))
        assert got.input_ids.tolist() == ids.tolist()
        assert got.block_tables.tolist() == tables.tolist()
        assert got.copies.shape == (0, 2)
        writer.write(StepArrays(*([ids * 0] * 12)))
        assert got.positions.tolist() == (ids + 1).tolist()  # a copy


# Engines


SETTINGS = {
    "dtype": "float32",
    "max_model_len": 128,
    "block_size": 4,
    "num_gpu_blocks_override": 40,
    "max_num_batched_tokens": 16,
}


def outputs(path: Path, size: int, **settings: object) -> list[tuple]:
    """All that a small, crowded engine says: chunked prefill, a common prefix, preemption, sampling, branches and logprobs."""
    llm = LLM(str(path), tensor_parallel_size=size, **SETTINGS, **settings)
    try:
        prompts = [{"prompt_token_ids": [5] * 9 + [(7 * i + j) % 250 for j in range(1 + 5 * i)]} for i in range(7)]
        params = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True) for _ in prompts]
        params[2] = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True, n=2)
        params[3] = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        results = llm.generate(prompts, params, use_tqdm=False)
        assert llm.llm_engine.stats().num_preemptions > 0
        assert llm.llm_engine.stats().prefix_cache_hits > 0
        return [tuple(tuple(c.token_ids) for c in r.outputs) for r in results] + [
            [round(max(p.logprob for p in entry.values()), 3) for entry in results[3].prompt_logprobs[1:]]
        ]
    finally:
        llm.llm_engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_mistral, make_tiny_gpt2])
def test_engines_of_several_ranks_say_the_same(tmp_path: Path, make: Callable[..., object]) -> None:
    """Four ranks are more than LLaMA and Mistral have KV heads."""
    make(tmp_path)
    expected = outputs(tmp_path, 1)
    for size in (2, 4):
        assert outputs(tmp_path, size) == expected
    if make is make_tiny_llama:  # sums by gloo, and by the rings of the course
        assert outputs(tmp_path, 2, enable_cpu_kernels=False) == expected
        assert outputs(tmp_path, 4, collective_backend="ring") == expected
    assert children() == []


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "worker_process" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_real_model(size: int) -> None:
    source = resolve_model("smollm2-135m")
    prompts, params = ["The capital of France is", "Two and two"], SamplingParams(temperature=0, max_tokens=12)
    texts = []
    for ranks_now in (1, size):
        llm = LLM(str(source.path), dtype="float32", max_model_len=64, tensor_parallel_size=ranks_now)
        texts.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
        llm.llm_engine.close()
    assert texts[0] == texts[1]


def test_a_model_that_cannot_be_cut_is_refused_at_once(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    with pytest.raises(ValueError, match="must be one of 1, 2, 4"):
        LLM(str(tmp_path), tensor_parallel_size=3, **SETTINGS)
    assert children() == []


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_rank_that_is_killed_ends_the_engine(tmp_path: Path, when: str) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), tensor_parallel_size=2, **SETTINGS)
    engine = llm.llm_engine
    engine.add_request("a", {"prompt_token_ids": [1, 2]}, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    engine.step()
    engine.check_health()
    (worker,) = children()
    worker.send_signal(signal.SIGSTOP if when == "in a step" else signal.SIGKILL)
    start = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {worker.pid} 2>/dev/null"])
    if when == "idle":
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # all of its threads are gone; its exit code stays
        with pytest.raises(WorkerDiedError, match="rank 1 has ended, killed by SIGKILL"):
            engine.check_health()
    with pytest.raises(WorkerDiedError, match="rank 1 has ended, killed by SIGKILL"):
        engine.step()
    engine.close()
    assert time.monotonic() - start < 10
    killer.wait()
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_engine(tmp_path: Path, how: signal.Signals) -> None:
    make_tiny_llama(tmp_path)
    code = (
        "import sys, time; from solutions.core.engine import LLM\n"
        f"llm = LLM({str(tmp_path)!r}, tensor_parallel_size=2, **{SETTINGS!r}); print('ready', flush=True); time.sleep(60)"
    )
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert engine.stdout.readline() == "ready\n"
    workers = psutil.Process(engine.pid).children(recursive=True)
    assert len(workers) == 1
    engine.send_signal(how)
    engine.wait(10)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


# Start and stop


@pytest.mark.slow
def test_many_starts_and_stops_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, descriptor, mapped or named memory, port, file, and no restriction to some of the cores."""
    make_tiny_llama(tmp_path, num_hidden_layers=1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    me = psutil.Process()

    def holdings() -> tuple[object, ...]:
        shared = sorted(p.name for p in Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else []
        mapped = sum("byov" in m.path for m in me.memory_maps(grouped=False)) if hasattr(me, "memory_maps") else 0
        descriptors = me.num_fds() if hasattr(me, "num_fds") else 0
        listening = sorted(c.laddr.port for c in me.net_connections() if c.status == psutil.CONN_LISTEN)
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        return children(), shared, mapped, descriptors, listening, cores, sorted(scratch.iterdir())

    def cycle() -> None:
        llm = LLM(str(tmp_path), tensor_parallel_size=2, **SETTINGS)
        llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
        llm.llm_engine.close()

    cycle()  # what is loaded once and stays
    gc.collect()
    before = holdings()
    for _ in range(START_STOP_CYCLES):
        cycle()
        gc.collect()
    assert holdings() == before
