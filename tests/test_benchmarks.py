"""The benchmarks measure what they say: exact workloads, hand-checked accounts of memory, the same tokens for both backends."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import memory as memory_command
from benchmarks import throughput as throughput_command
from solutions.batching.sampling_params import RequestOutputKind
from solutions.benchmarks import fairness as fairness_command
from solutions.benchmarks import overhead as overhead_command
from solutions.benchmarks import overlap as overlap_command
from solutions.benchmarks import two_phase
from solutions.benchmarks.comparison import Ratio, in_turns, rates, ratio
from solutions.benchmarks.datasets import (
    DATASETS,
    MIXED_INPUT,
    MIXED_OUTPUT,
    WORKLOADS,
    BenchRequest,
    Workload,
    check_context,
    draw_lengths,
    make_requests,
)
from solutions.benchmarks.kernels import Ceilings
from solutions.benchmarks.latency import Stream
from solutions.benchmarks.memory import (
    Buddy,
    FirstFit,
    power_of_two,
    reserve_exactly,
    reserve_max,
    reserve_power_of_two,
    simulate_contiguous,
    simulate_paged,
)
from solutions.benchmarks.overhead import PHASES, measure
from solutions.benchmarks.replicas import blocks_for, grouped_requests, summarise
from solutions.benchmarks.report import git_commit, hardware, spread, without_outputs
from solutions.benchmarks.step_profile import profile_step
from solutions.benchmarks.throughput import (
    Measurement,
    left_pad,
    load_hf,
    run_engine,
    run_hf,
    warm_up_requests,
)
from solutions.benchmarks.two_phase import chats_and_documents
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.core.platform import native
from solutions.core.simulated.engine import TEXT
from solutions.models.config.model_config import ModelConfig
from solutions.models.costs.operators import OPERATORS, costs
from solutions.models.kernels.attach import packed_of
from solutions.models.loader import resolve_model
from solutions.serving import api_server
from solutions.tests.tiny_models import make_tiny, make_tiny_llama

# Datasets


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_every_time_and_another_with_another_seed(name: str) -> None:
    assert make_requests(WORKLOADS[name]) == make_requests(WORKLOADS[name])
    assert make_requests(WORKLOADS[name]) != make_requests(WORKLOADS[name], seed=1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_token_ids_stay_in_their_range(name: str) -> None:
    tokens = [token for request in make_requests(WORKLOADS[name]) for token in request.prompt_token_ids]
    assert 1000 <= min(tokens) < max(tokens) <= 40_000


def lengths(name: str) -> list[tuple[int, int]]:
    return [(len(request.prompt_token_ids), request.output_len) for request in make_requests(WORKLOADS[name])]


def test_the_named_workloads_have_the_lengths_that_results_quote() -> None:
    assert lengths("W1") == [(128, 128)]
    assert lengths("W2") == [(128, 128)] * 32
    assert lengths("W4") == [(512 + 16, 32)] * 32
    rng = random.Random(0)
    assert lengths("W3") == [(rng.randint(16, 512), rng.randint(16, 256)) for _ in range(64)]


def test_only_the_prefix_is_shared() -> None:
    prompts = [request.prompt_token_ids for request in make_requests(Workload("shared-prefix", 8, 16, 4, 100))]
    assert len({tuple(prompt[:100]) for prompt in prompts}) == 1
    assert len({prompt[100] for prompt in prompts}) == 8
    other = [request.prompt_token_ids for request in make_requests(Workload("random", 8, 16, 4))]
    assert len({prompt[0] for prompt in other}) == 8


@pytest.mark.parametrize("vocab_size", [2, 100, 32_000])
def test_a_small_vocabulary_is_not_left(vocab_size: int) -> None:
    requests = make_requests(Workload("random", 4, 200, 1), vocab_size)
    assert max(token for request in requests for token in request.prompt_token_ids) < vocab_size


def test_lengths_do_not_depend_on_the_vocabulary() -> None:
    small = make_requests(Workload("mixed", 20), 500)
    assert [(len(r.prompt_token_ids), r.output_len) for r in small] == lengths("W3")[:20]


@pytest.mark.parametrize(
    "settings",
    [("random", 0, 1, 1), ("random", 1, 0, 1), ("random", 1, 1, 0), ("random", 1), ("mixed", 1, 5), ("mixed", 1, None, 5),
     ("shared-prefix", 1, 1, 1), ("random", 1, 1, 1, 5), ("poems", 1, 1, 1)],
)  # fmt: skip
def test_a_workload_without_sense_is_refused(settings: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        Workload(*settings)


def test_requests_fill_the_context_and_no_more() -> None:
    requests = [BenchRequest([1, 2, 3], 4), BenchRequest([1], 1)]
    check_context(requests, 7)
    with pytest.raises(ValueError, match=r"prompt of 3 and an output of 4 tokens do not fit the context of 6"):
        check_context(requests, 6)


# Memory


def test_first_fit_takes_the_lowest_hole_and_joins_neighbours() -> None:
    memory = FirstFit(10)
    assert [memory.allocate(3), memory.allocate(4), memory.allocate(3)] == [(0, 3), (3, 4), (7, 3)]
    assert memory.allocate(1) is None
    memory.free(0, 3)
    memory.free(7, 3)
    assert memory.allocate(4) is None, "six slots are free, but in two pieces"
    assert memory.allocate(2) == (0, 2)
    memory.free(0, 2)
    memory.free(3, 4)
    assert memory.allocate(10) == (0, 10)


def test_buddies_are_powers_of_two_at_multiples_of_their_size_and_join() -> None:
    memory = Buddy(12)  # pieces of 8 and 4
    assert memory.allocate(3) == (8, 4), "the smallest piece that fits"
    assert memory.allocate(1) == (0, 1)
    assert memory.allocate(3) == (4, 4)
    assert memory.allocate(2) == (2, 2)
    assert memory.allocate(2) is None, "one slot is left, at 1"
    assert memory.allocate(1) == (1, 1)
    for piece in ((0, 1), (1, 1), (2, 2), (4, 4)):
        memory.free(*piece)
    assert memory.allocate(5) == (0, 8)


def test_allocators_never_give_a_slot_twice() -> None:
    rng = random.Random(3)
    for memory in (FirstFit(1000), Buddy(1000)):
        used: set[int] = set()
        pieces: list[tuple[int, int]] = []
        for _ in range(3000):
            if pieces and rng.random() < 0.5:
                start, size = pieces.pop(rng.randrange(len(pieces)))
                memory.free(start, size)
                used -= set(range(start, start + size))
            elif (piece := memory.allocate(rng.randint(1, 60))) is not None:
                slots = set(range(piece[0], sum(piece)))
                assert not slots & used
                assert max(slots) < 1000
                used |= slots
                pieces.append(piece)
        for piece in pieces:
            memory.free(*piece)
        assert memory.allocate(512) is not None, "what was freed did not join"


def test_reservations() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 256, 257)] == [1, 2, 4, 4, 8, 256, 512]
    assert reserve_max(2048)(100, 25) == 2048
    assert reserve_power_of_two(100, 25) == 132  # the paper's example: 25 output tokens reserve 32
    assert reserve_exactly(100, 25) == 125


def test_the_account_of_a_contiguous_memory_by_hand() -> None:
    # 10 slots hold two reservations of 5. Each sequence holds 2, 3, then 4 tokens, so it never fills its fifth slot.
    # The third request waits for three steps; its own are not counted, because nobody waits then.
    usage = simulate_contiguous("x", 10, [(2, 3)] * 3, reserve_max(5), FirstFit(10))
    assert usage.steps == 3
    assert usage.running == 2
    assert usage.tokens == pytest.approx((4 + 6 + 8) / 30)
    assert usage.later == pytest.approx((4 + 2 + 0) / 30)
    assert usage.never == pytest.approx((2 + 2 + 2) / 30)
    assert usage.free == 0
    assert usage.waste == pytest.approx(12 / 30)


def test_the_account_of_a_paged_memory_by_hand() -> None:
    # Two blocks of 2. Step 1: two prompts of 2 tokens fill both. Step 2: the first needs a second block and takes the
    # other's. Step 3: the other comes back with 3 tokens in two blocks. The third request waits all the while.
    usage = simulate_paged("x", 4, [(2, 2)] * 3, 2)
    assert usage.steps == 3
    assert usage.preemptions == 1
    assert usage.running == pytest.approx((2 + 1 + 1) / 3)
    assert usage.tokens == pytest.approx((4 + 3 + 3) / 12)
    assert usage.never == pytest.approx((0 + 1 + 1) / 12)
    assert usage.later == usage.free == 0
    assert usage.waste == pytest.approx(2 / 12)


def test_room_that_a_growing_sequence_will_fill_is_not_lost() -> None:
    # One block of 8 a sequence: 2, 3, 4, 5 tokens held, 5 at the end, so 3 slots stay empty for good.
    usage = simulate_paged("x", 8, [(2, 4)] * 2, 8)
    assert usage.steps == 4
    assert usage.tokens == pytest.approx((2 + 3 + 4 + 5) / 32)
    assert usage.later == pytest.approx((3 + 2 + 1 + 0) / 32)
    assert usage.never == pytest.approx(3 / 8)


@pytest.mark.parametrize("run", [
    lambda: simulate_paged("x", 31, [(20, 12)] * 5, 16),
    lambda: simulate_contiguous("x", 31, [(20, 12)] * 5, reserve_exactly, FirstFit(31)),
    lambda: simulate_paged("x", 1000, [(20, 12)] * 5, 16),
    lambda: simulate_contiguous("x", 1000, [(20, 12)] * 5, reserve_exactly, FirstFit(1000)),
])  # fmt: skip
def test_a_memory_that_is_too_small_or_never_full_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match=r"one sequence does not fit the memory of 31|too few requests"):
        run()


def test_paging_wastes_under_four_percent_and_runs_more_sequences() -> None:
    rng = random.Random(1)
    requests = [(rng.randint(16, 512), rng.randint(16, 256)) for _ in range(300)]
    paged = simulate_paged("paged", 12_288, requests, 16)
    reserved = simulate_contiguous("max", 12_288, requests, reserve_max(2048), FirstFit(12_288))
    assert paged.waste < 0.04
    assert paged.running > 3 * reserved.running
    for usage in (paged, reserved):
        assert usage.tokens + usage.later + usage.never + usage.free == pytest.approx(1)


# Throughput


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers with random weights, saved by transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


REQUESTS = [BenchRequest(list(range(3, 3 + size)), output) for size, output in ((5, 7), (1, 2), (12, 1), (9, 11), (3, 4))]


def test_left_padding() -> None:
    input_ids, mask = left_pad([[7], [1, 2, 3]])
    assert input_ids.tolist() == [[0, 0, 7], [1, 2, 3]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_both_backends_count_the_same_useful_tokens(checkpoint: Path) -> None:
    source = resolve_model(str(checkpoint))
    llm = LLM(str(checkpoint), dtype="float32", device="cpu", num_gpu_blocks_override=64, max_num_seqs=8)
    model = load_hf(source, "auto", torch.float32, torch.device("cpu"))
    ours = run_engine(llm, REQUESTS)
    theirs = run_hf(model, REQUESTS, batch_size=2)
    for run in (ours, theirs):
        assert (run.num_requests, run.num_prompt_tokens, run.num_output_tokens) == (5, 30, 25)
        assert run.output_tokens_per_second == pytest.approx(25 / run.seconds)
        assert run.total_tokens_per_second == pytest.approx(55 / run.seconds)
    assert ours.num_computed_tokens == 25
    assert theirs.num_computed_tokens == 2 * 7 + 2 * 11 + 1 * 4, "each batch runs up to its longest output"
    assert theirs.details["num_batches"] == 3


@pytest.mark.slow
def test_random_weights_are_in_the_same_model(checkpoint: Path) -> None:
    """Transformers' is built from the same ``config.json``: of a folder, and of a name that has none on disk."""
    for name in (str(checkpoint), "gpt2"):
        source = resolve_model(name, "dummy")
        model = load_hf(source, "dummy", torch.bfloat16, torch.device("cpu"))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        built = ModelConfig.from_hf(model.config.to_dict() | {"architectures": [type(model).__name__]})
        assert replace(built, torch_dtype=None) == replace(source.config, torch_dtype=None)


def test_a_second_run_does_not_profit_from_the_first(checkpoint: Path) -> None:
    requests = [BenchRequest(list(range(3, 3 + 40)), 4), BenchRequest(list(range(50, 50 + 40)), 4)]
    llm = LLM(str(checkpoint), dtype="float32", device="cpu", num_gpu_blocks_override=64, max_num_seqs=8)
    assert [run_engine(llm, requests).details["prefix_cache_hit_tokens"] for _ in range(2)] == [0, 0]
    twins = run_engine(llm, [requests[0], requests[0]])
    assert twins.details["prefix_cache_hit_tokens"] == 32, "within one run the cache works"


def test_a_request_beyond_the_context_is_refused_and_not_cut(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), dtype="float32", device="cpu", num_gpu_blocks_override=64, max_num_seqs=8)
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        run_engine(llm, [BenchRequest(list(range(3, 63)), 5)])


def test_warm_up_prompts_are_not_those_of_the_measurement() -> None:
    requests = make_requests(WORKLOADS["W2"])
    warm = warm_up_requests(requests)
    assert max(request.output_len for request in warm) <= 4
    assert not {tuple(r.prompt_token_ids[:16]) for r in warm} & {tuple(r.prompt_token_ids[:16]) for r in requests}


def test_systems_run_in_turns_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []

    def runner(name: str, seconds: list[float], tokens: int = 100) -> Any:
        times = iter(seconds)

        def run() -> Measurement:
            order.append(name)
            return Measurement(name, next(times), 1, 10, tokens, tokens, {})

        return run

    results = in_turns({"engine": runner("engine", [1, 2, 1]), "hf": runner("hf", [3, 8, 3])}, 3)
    assert order == ["engine", "hf", "hf", "engine", "engine", "hf"]
    found = ratio(rates(results["engine"]), rates(results["hf"]))
    assert found.values == pytest.approx([3, 4, 3])
    assert found.mean == pytest.approx(36 ** (1 / 3))
    assert found.is_clear
    with pytest.raises(ValueError, match=r"hf did other work than the rest: .* were \(1, 10, 99\), not \(1, 10, 100\)"):
        in_turns({"engine": runner("engine", [1]), "hf": runner("hf", [1], 99)}, 1)


@pytest.mark.parametrize("count", [2, 3, 10, 30, 31, 100])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int) -> None:
    """The truth is 1.2; pairs scatter by 10 %."""
    dice = np.random.default_rng(count)
    hits = 0
    for _ in range(2000):
        theirs = np.exp(dice.normal(0, 0.3, count))
        found = ratio(list(1.2 * theirs * np.exp(dice.normal(0, 0.1, count))), list(theirs))
        hits += found.low <= 1.2 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_single_pair_is_never_clear() -> None:
    assert ratio([2.0], [1.0]) == Ratio(2.0, 2.0, 2.0, (2.0,))
    assert not ratio([2.0], [1.0]).is_clear
    with pytest.raises(ValueError, match="needs pairs of runs, got 1 and 2"):
        ratio([1.0], [1.0, 2.0])


# Overhead


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_overhead_makes_text_and_its_phases_add_up(kind: RequestOutputKind) -> None:
    texts: dict[str, str] = {}

    def collect(outputs: list[Any]) -> None:
        for output in outputs:
            texts[output.request_id] = texts.get(output.request_id, "") + output.outputs[0].text

    result = measure(3, True, kind, rounds=1, steps=24, on_output=collect)
    assert result.phases.keys() == {*PHASES, "rest"}
    assert result.total == pytest.approx(sum(result.phases.values()))
    assert min(result.phases[name] for name in PHASES) > 0
    if kind is RequestOutputKind.FINAL_ONLY:
        assert texts == {}
    else:
        assert len(texts) == 3
        assert all(len(text) > 60 and text in TEXT * 2 for text in texts.values())


def test_the_server_settles_its_heap_as_the_benchmark_does(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    door = SimpleNamespace(start_compiling=lambda: order.append("compiler"))
    engine = SimpleNamespace(startup_summary=list, config=EngineConfig(), input=door, close=lambda: order.append("closed"))
    monkeypatch.setattr("solutions.core.engine.LLMEngine", lambda config: order.append("engine") or engine)
    monkeypatch.setattr(api_server, "settle_heap", lambda: order.append("settled"))
    monkeypatch.setattr(api_server, "create_app", lambda *_, **__: None)
    monkeypatch.setattr(api_server, "AsyncEngine", lambda engine, *_: engine)
    monkeypatch.setattr(api_server.uvicorn.Server, "run", lambda self, sockets: [order.append("served"), sockets[0].close()])
    assert api_server.main(["--host", "127.0.0.1", "--port", "0"]) == 0
    assert order == ["engine", "settled", "compiler", "served", "closed"]


# Commands


def run_command(command: Any, flags: str, path: Path) -> dict[str, Any]:
    command.main([*flags.split(), "--output-json", str(path)])
    return json.loads(path.read_text())


def test_throughput_writes_its_record(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        f"--model {checkpoint} --dtype float32 --device cpu --backend both --repeats 2 --num-prompts 3 --input-len 8 "
        "--output-len 4 --num-gpu-blocks-override 32 --max-num-seqs 4"
    )
    contents = run_command(throughput_command, flags, tmp_path / "new" / "r.json")
    assert contents["hardware"].keys() >= {"processor", "cores_used", "memory_bytes", "instruction_sets"}
    assert contents["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert contents["flags"]["num_prompts"] == 3
    assert "output_json" not in contents["flags"]
    results = contents["results"]
    assert [run["num_output_tokens"] for run in results["engine"]["runs"] + results["hf"]["runs"]] == [12] * 4
    assert len(results["ratio_engine_to_hf"]["values"]) == 2
    assert results["peak_memory_bytes"] > 50 << 20
    printed = capsys.readouterr().out
    assert "3 requests, 24 prompt tokens, 12 output tokens" in printed
    assert "this engine / transformers" in printed


def test_memory_writes_its_record_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "memory.png"
    flags = f"--num-requests 60 --kv-cache-memory-bytes 2GiB --block-sizes 16 --max-model-lens 1024 --plot {plot}"
    contents = run_command(memory_command, flags, tmp_path / "r.json")
    # a LLaMA-7B token takes 2 (K, V) x 32 layers x 32 heads x 128 numbers x 2 bytes = 512 KiB
    assert contents["results"]["capacity_tokens"] == (2 << 30) // (512 << 10)
    assert [system["system"] for system in contents["results"]["systems"]] == [
        "contiguous, max 1024", "contiguous, pow2", "contiguous, oracle (buddy)", "contiguous, oracle (first fit)", "paged, 16",
        "paged, 16, int8",
    ]  # fmt: skip
    assert contents["results"]["systems"][0]["running"] == 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "paged, 16" in capsys.readouterr().out


@pytest.mark.slow
def test_overhead_writes_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead_command, "pin_to_one_core", lambda: None)  # the test process runs others after this
    contents = run_command(overhead_command, "--num-seqs 2 4 --steps 2 --rounds 2", tmp_path / "r.json")
    rows = contents["results"]["microseconds_per_sequence_and_step"]
    assert [(row["prefix_caching"], row["output_kind"], row["num_seqs"]) for row in rows] == [
        (caching, kind, n) for caching in (True, False) for kind in ("DELTA", "FINAL_ONLY") for n in (2, 4)
    ]
    assert "prefix cache on, DELTA: a sequence costs" in capsys.readouterr().out


@pytest.mark.slow
def test_overlap_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap_command, "pin_to_one_core", lambda: None)
    contents = run_command(overlap_command, "--num-seqs 2 --steps 4 --device-ms 1 50", tmp_path / "r.json")
    short, long = contents["results"]["milliseconds"]
    assert (short["device"], long["device"]) == (1, 50)
    assert short["host"] == long["host"]
    assert long["next step decided ahead"] >= 49
    assert long["host and device in turn"] >= 50


def test_every_request_of_both_clients_is_counted_from_when_it_was_due(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, max_position_embeddings=1024, vocab_size=50000)
    args = Namespace(model=str(tmp_path), seats=1, flood=3, questions=2, every=0.01)
    alone, fcfs, fair = (fairness_command.measure(args, *case, seed=0) for case in fairness_command.CASES.values())
    assert list(alone) == list(fcfs) == list(fair) == list(fairness_command.FIGURES)
    assert alone["flood's latency, p50"] == 0.0 < fair["flood's latency, p50"]
    for found in (alone, fcfs, fair):
        assert 0 < found["a question's TTFT, p50"] <= found["TTFT, p99"] <= found["latency, p99"]


@pytest.mark.parametrize(
    ("command", "flags", "complaint"),
    [
        (throughput_command, "--dataset poems", "invalid choice: 'poems'"),
        (throughput_command, "--num-prompts 0", "number of prompts must be at least 1, got 0"),
        (throughput_command, "--output-len -3", "output length must be at least 1"),
        (throughput_command, "--dataset mixed --input-len 5", "mixed draws its lengths"),
        (throughput_command, "--prefix-len 5", "prefix length"),
        (throughput_command, "--workload W3 --num-prompts 5", "--workload W3 sets dataset and lengths"),
        (throughput_command, "--repeats 0", "--repeats must be at least 1, got 0"),
        (throughput_command, "--batch-size 0", "--batch-size must be at least 1, got 0"),
        (throughput_command, "--modle x", "unrecognized arguments: --modle"),
        (throughput_command, "--model no-such-model", "there is no model 'no-such-model'"),
        (throughput_command, "--input-len 8000 --output-len 500", "do not fit the context of 8192"),
        (memory_command, "--max-model-lens 500", "--max-model-lens must be at least 768"),
        (memory_command, "--block-sizes 16 0", "--block-sizes must be at least 1, got 0"),
        (memory_command, "--plot chart.txt", "--plot must end in .png"),
        (memory_command, "--kv-cache-memory-bytes 1MiB", "one sequence does not fit the memory of 2 tokens"),
        (memory_command, "--kv-cache-memory-bytes much", "'much' is not a size"),
        (overhead_command, "--num-seqs 0", "--num-seqs must be at least 1, got 0"),
    ],
)
def test_a_bad_flag_gets_one_clear_line(
    command: Any, flags: str, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead_command, "pin_to_one_core", lambda: None)
    with pytest.raises(SystemExit) as stop:
        command.main(flags.split())
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip()
    assert stop.value.code not in (0, None)
    assert message.startswith("error: ")
    assert complaint in message
    assert "\n" not in message


def test_the_default_workload_is_what_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    args, workload = throughput_command.parse_flags(["--input-len", "128", "--output-len", "256"])
    assert workload == Workload("random", 32, 128, 256)
    assert args.backend == "engine"
    assert throughput_command.parse_flags(["--dataset", "mixed"])[1] == WORKLOADS["W3"]
    assert throughput_command.parse_flags(["--dataset", "shared-prefix"])[1] == WORKLOADS["W4"]
    with pytest.raises(SystemExit) as stop:
        throughput_command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in DATASETS if f"\n  {name} " not in text] == []


def test_records_do_not_name_where_they_were_written() -> None:
    command = "--a 1 --output-json /x/y.json --plot=/x/z.png --b --plot q.png"
    assert without_outputs(command.split()) == ["--a", "1", "--b"]


def test_spread_and_machine() -> None:
    assert spread([3, 1, 2, 10]) == {"median": 2.5, "min": 1, "max": 10, "values": [3, 1, 2, 10]}
    machine = hardware()
    assert 1 <= machine["cores_used"] <= machine["cores"]
    assert machine["memory_bytes"] > 1 << 30
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 12


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so no step is replayed")
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_profile_accounts_for_a_whole_step(tmp_path: Path, quantization: str | None) -> None:
    make_tiny_llama(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96)
    engine = LLMEngine(EngineConfig(str(tmp_path), dtype="float32", device="cpu", max_model_len=64, quantization=quantization))
    model, worker = engine.model_config, engine.executor.worker
    weight = 1 if quantization else 4
    packed = [p for p in map(packed_of, worker.model.modules()) if p is not None]
    weights = weight * sum(p.num_rows * p.num_columns for p in packed)  # what lies between them is left out
    assert sum(num_bytes for num_bytes, _ in costs(model, 0, 0, weight, 4).values()) == weights
    ceilings = Ceilings(read_bytes=1e9, operations={"float32": 1e9, "int8": 2e9})
    rows = {row.operator: row for row in profile_step(engine, ceilings, quantization or "float32", 3, 40, 4)}
    assert list(rows) == [*OPERATORS, "lm_head", "arg-max", "everything else"]
    keys_and_values = 2 * model.num_layers * 3 * 40 * model.num_kv_heads * model.head_dim * 4
    assert rows["attention"].bytes == keys_and_values + 2 * model.num_layers * 3 * (64 + 32) * 4
    head = rows["lm_head"]
    assert head.operations == 2 * 3 * 64 * model.vocab_size
    assert head.floor == max(head.bytes / 1e9, head.operations / (2e9 if quantization else 1e9))
    assert all(row.seconds > 0 for row in rows.values() if row.floor is not None)
    assert not engine.has_unfinished_requests()


@pytest.mark.slow
def test_only_layers_of_the_known_kernels_can_be_profiled(tmp_path: Path) -> None:
    """Qwen3's have two norms more."""
    make_tiny("qwen3", tmp_path)
    engine = LLMEngine(EngineConfig(str(tmp_path), dtype="float32", device="cpu", max_model_len=64))
    with pytest.raises(ValueError, match="of LLaMA's layers"):
        profile_step(engine, Ceilings(1e9, {"float32": 1e9}), "float32", 1, 32, 4)


def test_only_replayed_steps_can_be_profiled(checkpoint: Path) -> None:
    engine = LLMEngine(EngineConfig(str(checkpoint), dtype="float32", device="cpu", max_model_len=64, enforce_eager=True))
    with pytest.raises(ValueError, match="enforce-eager"):
        profile_step(engine, Ceilings(1e9, {"float32": 1e9}), "float32", 1, 32, 4)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so no step is replayed")
@pytest.mark.parametrize("batch", [3, 9])
def test_a_profile_needs_the_whole_batch_in_a_step(tmp_path: Path, batch: int) -> None:
    make_tiny_llama(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96)
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 80, "max_model_len": 64}
    engine = LLMEngine(EngineConfig(str(tmp_path), dtype="float32", device="cpu", **settings))
    with pytest.raises(ValueError, match=f"{batch} sequences of .* 8 sequences and 80 tokens"):
        profile_step(engine, Ceilings(1e9, {"float32": 1e9}), "float32", batch, 40 if batch == 3 else 8, 4)
    assert not engine.has_unfinished_requests()


# Replicas


def test_chats_and_documents_come_at_their_rates_in_one_order() -> None:
    """The same for every arrangement of a round, and new ones in the next; the rates are those of two Poisson processes."""
    args = Namespace(chat_rate=5.0, chat_output=9, document_rate=0.5, document_len=70, seconds=400)
    requests, times = chats_and_documents(args, False, seed=3)
    assert (requests, times) == chats_and_documents(args, False, seed=3)
    assert requests[:3] != chats_and_documents(args, False, seed=4)[0][:3]
    assert times == sorted(times)
    shapes = Counter((len(request.prompt_token_ids), request.output_len) for request in requests)
    assert shapes == {(32, 9): 2000, (70, 4): 200}
    assert times[-1] == pytest.approx(400, rel=0.25)
    late = [request for request, time in zip(requests, times, strict=True) if time > 200]
    assert 40 < sum(len(request.prompt_token_ids) == 70 for request in late) < 160
    at_once, now = chats_and_documents(args, True, seed=3)
    assert set(now) == {0.0}
    assert len(at_once) == 2200


def test_waits_of_chats_and_of_documents_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat's tokens come 10 ms apart but for one that waits 100; a document's first token comes after 2 s."""
    args = Namespace(model="m", chat_rate=1.0, chat_output=9, document_rate=0.5, document_len=70, seconds=4)

    async def answer(self: Any, requests: list[BenchRequest], times: list[float]) -> list[Stream]:
        gaps = [0.01] * 7 + [0.1]
        chat = [0.5 + sum(gaps[:n]) for n in range(9)]
        return [Stream(0.0, chat if r.output_len == 9 else [2.0, 2.5, 3.0, 4.0], r.output_len) for r in requests]

    monkeypatch.setattr(two_phase.Client, "open_loop", answer)
    found = two_phase.measure(args, False, "http://nowhere/v1", 0)
    expected = (10, 100, 100, 500, 2000, (4 * 9 + 2 * 4) / 4.0)
    assert list(found.values()) == pytest.approx(expected, rel=0.01)


def test_groups_begin_alike_and_are_mixed() -> None:
    groups = Namespace(groups=3, requests=4, prefix_len=20, input_len=5, output_len=2)
    requests = grouped_requests(groups, seed=0)
    assert requests == grouped_requests(groups, seed=0) != grouped_requests(groups, seed=1)
    assert {(len(request.prompt_token_ids), request.output_len) for request in requests} == {(25, 2)}
    beginnings = [tuple(request.prompt_token_ids[:20]) for request in requests]
    assert sorted(beginnings.count(beginning) for beginning in set(beginnings)) == [4, 4, 4]
    assert len({request.prompt_token_ids[20] for request in requests}) > 9
    assert len(set(beginnings[:4])) > 1


def test_an_engine_holds_its_share_of_the_beginnings_only() -> None:
    args = Namespace(replicas=2, groups=8, prefix_len=512, input_len=64, output_len=32, concurrency=8)
    assert blocks_for(args, 16) == 4 * 32 + 8 * 7 < 8 * 32
    args.groups = 2
    assert blocks_for(args, 16) == 4 * (32 + 7)  # what runs needs more


def test_what_is_reported_of_replicas() -> None:
    requests = [BenchRequest([1] * 50, 4) for _ in range(4)]
    streams = [Stream(1.0, [1.0 + wait, 9.0], 4, 50, cached) for wait, cached in ((0.4, 0), (0.1, 32), (0.2, 48), (0.3, 40))]
    found = summarise(requests, streams, 8.0)
    assert found["hit_rate"] == 120 / 200
    assert (found["ttft_p50"], found["ttft_p99"]) == pytest.approx((250, 397))  # between the two longest
    assert found["output_tokens_per_second"] == 2.0
    streams[0].num_tokens = 3
    with pytest.raises(RuntimeError, match="asked for 4 tokens and got 3"):
        summarise(requests, streams, 8.0)


@pytest.mark.parametrize(("inputs", "outputs"), [((3, 5), (7, 8)), ((4, 4), (1, 3)), (None, None)])
def test_lengths_lie_in_their_ranges_ends_included(inputs: tuple[int, int] | None, outputs: tuple[int, int] | None) -> None:
    """Notebooks give ranges of their own; the rest takes those of the mixed workload."""
    ranges = (MIXED_INPUT, MIXED_OUTPUT) if inputs is None or outputs is None else (inputs, outputs)
    own = {} if inputs is None else {"inputs": inputs, "outputs": outputs}
    columns = zip(*draw_lengths(9000, random.Random(0), **own), strict=True)
    assert [(min(column), max(column)) for column in columns] == list(ranges)
