"""Engines with a tier below the prefix cache: the same tokens as without, whatever moves blocks about and whatever fails."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solutions.attention import tiered_manager
from solutions.batching.sampling_params import SamplingParams
from solutions.core.beams.beam_search import BeamSearchParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.memory.cache_engine import CacheEngine
from solutions.memory.tiers import file_tier
from solutions.memory.tiers.block_files import BlockFolder
from solutions.memory.tiers.block_rows import BlockRows
from solutions.tests.engine_twins import folder
from solutions.tests.lora_adapters import make_adapter
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny_llama

ROW_BYTES = 3 * 2 * 4 * 3 * 32 * 4
"""Of a block of the tiny LLaMA: layers, keys and values, tokens, heads, elements, bytes of each."""
Answers = list[list[int]]
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "block_size": 4, "max_model_len": 64, "num_gpu_blocks_override": 36,
    "max_num_seqs": 3, "attention_backend": "torch", "enable_cpu_kernels": False,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "recompute": ("llama", {"num_gpu_blocks_override": 18}),
    "swap": ("llama", {"num_gpu_blocks_override": 18, "preemption_mode": "swap", "swap_space": 1 << 17}),
    "chunks": ("llama", {"max_num_batched_tokens": 7}),
    "whole": ("qwen3", {"enable_chunked_prefill": False}),
    "ahead": ("llama", {"async_scheduling": True, "num_gpu_blocks_override": 20}),
    "window": ("mistral", {}),
    "latents": ("deepseek_v2", {"attention_backend": "auto"}),
    "int8": ("llama", {"kv_cache_dtype": "int8"}),
    "drafts": ("llama", {"speculative_config": '{"method": "ngram", "prompt_lookup_min": 1}'}),
    "longest match": ("llama", {"scheduling_policy": "lpm"}),
}


def traffic() -> list[list[int]]:
    """Prompts with few beginnings, more than a small cache holds, in an order in which each comes back."""
    rng = random.Random(1)
    beginnings = [[rng.randrange(250) for _ in range(24)] for _ in range(5)]
    return [beginning + [rng.randrange(250) for _ in range(3 + number)] for number in range(4) for beginning in beginnings]


def serve(engine: LLMEngine, count: int = 1, prompts: list[list[int]] | None = None) -> Answers:
    """Greedy answers, requests coming one a step, with invariants checked behind each."""
    answers: dict[str, Answers] = {}
    params = SamplingParams(temperature=0, max_tokens=10, n=count, ignore_eos=True)
    asked = traffic() if prompts is None else prompts
    for number, prompt in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers[output.request_id] = [list(each.token_ids) for each in output.outputs]
            engine.scheduler.check_invariants()
            if number < len(asked) - 1:
                break
    assert engine.stats().kv_cache_usage == 0
    return [answer for number in range(len(asked)) for answer in answers[str(number)]]


def make(name: str, **settings: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(model=str(folder(name)), **(SETTINGS | settings)))


@cache
def without(case: str, count: int = 1) -> Answers:
    """What an engine without a tier says."""
    name, settings = CASES[case]
    return serve(make(name, **settings), count)


@pytest.fixture(params=["host", "files"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "host" if request.param == "host" else str(tmp_path / "kv")


@pytest.mark.parametrize(("case", "count"), slow_after(5, [*((case, 1) for case in CASES), ("recompute", 3), ("swap", 3)]))
def test_a_tier_changes_no_token_and_saves_work(case: str, count: int, where: str) -> None:
    name, settings = CASES[case]
    engine = make(name, **settings, kv_offload=where, kv_offload_size=1 << 22)
    assert serve(engine, count) == without(case, count)
    stats = engine.stats().kv_offload
    assert (stats.num_hits > 0) == (case != "longest match")  # whose order leaves nothing to come back
    assert stats.num_hits < stats.num_queries
    assert stats.load_bytes >= stats.num_hits // SETTINGS["block_size"] * engine.tiers.rows.num_bytes
    engine.close()
    assert (stats.num_bad, stats.num_failures) == (0, 0)


def test_a_tier_that_holds_little_changes_no_token(where: str) -> None:
    for blocks in (1, 3):
        size = blocks * (ROW_BYTES + 112)
        engine = make("llama", kv_offload=where, kv_offload_size=size)
        assert serve(engine) == without("chunks")
        assert 0 < engine.stats().kv_offload.num_bytes <= size
        engine.close()


def test_beams_find_what_they_find_without(where: str) -> None:
    found = []
    for settings in ({}, {"kv_offload": where, "kv_offload_size": 1 << 22}):
        llm = LLM(str(folder("llama")), **(SETTINGS | {"max_num_seqs": 4} | settings))
        prompts = [{"prompt_token_ids": prompt} for prompt in traffic()[:8]]
        outputs = [llm.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=6)) for prompt in prompts + prompts]
        found.append([[sequence.tokens for sequence in output.sequences] for (output,) in outputs])
        llm.llm_engine.close()
    assert found[0] == found[1]


def test_cached_tokens_of_a_prompt_count_what_came_back(where: str) -> None:
    llm = LLM(str(folder("llama")), **SETTINGS, kv_offload=where, kv_offload_size=1 << 22)
    first, *others = ({"prompt_token_ids": [number] * 50} for number in range(10))
    params = SamplingParams(temperature=0, max_tokens=1)
    llm.generate([first, *others], params, use_tqdm=False)
    assert len(llm.llm_engine.block_manager.prefix_cache) < 4 * 12  # the first has long left the device
    (again,) = llm.generate(first, params, use_tqdm=False)
    assert again.num_cached_tokens == 48
    stats = llm.llm_engine.stats()
    assert stats.kv_offload.num_hits == 48
    assert stats.prefix_cache_hits == 0
    llm.llm_engine.close()


def test_what_the_prefix_cache_is_told_to_forget_still_comes_back_right(where: str) -> None:
    engine = make("llama", kv_offload=where, kv_offload_size=1 << 22)
    first = serve(engine)
    engine.block_manager.prefix_cache.clear()
    assert serve(engine) == first == without("chunks")
    engine.close()


def test_a_prompt_that_is_read_whole_is_computed(where: str) -> None:
    """Its log-probabilities need logits that blocks from elsewhere would spare."""
    llm = LLM(str(folder("llama")), **SETTINGS, kv_offload=where, kv_offload_size=1 << 22)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": [number] * 50} for number in range(10)]
    for _ in range(2):
        for output in llm.generate(prompts, params, use_tqdm=False):
            assert output.num_cached_tokens == 0
            assert len(output.prompt_logprobs) == 50
    assert llm.llm_engine.stats().kv_offload.num_queries == 0
    llm.llm_engine.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"async_scheduling": True}, {"kv_cache_dtype": "int8"}], ids=str)
def test_on_a_gpu_a_tier_changes_no_token(settings: dict[str, Any], where: str) -> None:
    settings = settings | {"device": "cuda", "attention_backend": "triton"}
    engine = make("llama", **settings, kv_offload=where, kv_offload_size=1 << 22)
    assert serve(engine) == serve(make("llama", **settings))
    assert engine.stats().kv_offload.num_hits > 0
    engine.close()


# Files


def restart(path: Path, model: str = "llama", **settings: Any) -> LLMEngine:
    return make(model, **({"kv_offload": str(path), "kv_offload_size": 1 << 22} | settings))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with the blocks of an engine that has served `traffic`."""
    engine = restart(tmp_path / "kv")
    assert serve(engine) == without("chunks")
    engine.close()
    return tmp_path / "kv"


def test_a_restart_finds_what_was_evicted_and_what_was_not(kept: Path) -> None:
    engine = restart(kept)
    assert serve(engine) == without("chunks")
    assert engine.stats().kv_offload.store_bytes == 0
    first = traffic()[0]
    again = restart(kept)
    params = SamplingParams(temperature=0, max_tokens=1)
    again.add_request("0", {"prompt_token_ids": first}, params)
    (output,) = again.step()
    assert output.num_cached_tokens == (len(first) - 1) // 4 * 4
    engine.close()
    again.close()


@pytest.mark.parametrize(
    "settings",
    [{"block_size": 8}, {"kv_cache_dtype": "int8"}, {"attention_backend": "naive"}, {"dtype": "bfloat16"}],
    ids=lambda settings: next(iter(settings)),
)
def test_another_way_to_compute_is_another_identity(kept: Path, settings: dict[str, Any]) -> None:
    engine = restart(kept, **settings)
    serve(engine, prompts=traffic()[:3])
    assert engine.stats().kv_offload.num_hits == 0
    engine.close()


def test_weights_that_differ_in_one_number_are_another_model(tmp_path: Path) -> None:
    """In the same folder, of the same size, with the same times."""
    model, kv = tmp_path / "model", tmp_path / "kv"
    model.mkdir()
    make_tiny_llama(model)
    weights = model / "model.safetensors"
    times = weights.stat().st_mtime_ns
    answers = []
    for scale in (1.0, 1.5):
        tensors = load_file(weights)
        tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] *= scale
        save_file(tensors, weights, {"format": "pt"})
        os.utime(weights, ns=(times, times))
        engine = LLMEngine(EngineConfig(model=str(model), **SETTINGS, kv_offload=str(kv), kv_offload_size=1 << 22))
        answers.append(serve(engine, prompts=traffic()[:5]))
        assert engine.stats().kv_offload.num_hits == 0
        engine.close()
    plain = LLMEngine(EngineConfig(model=str(model), **SETTINGS))
    assert answers[1] == serve(plain, prompts=traffic()[:5])


def test_salts_and_adapters_find_their_own_blocks_alone(tmp_path: Path, where: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tiny = make_tiny_llama(model)
    make_adapter(tmp_path / "adapter", tiny)
    settings = SETTINGS | {"enable_lora": True, "lora_modules": (f"poet={tmp_path / 'adapter'}",)}
    llm = LLM(str(model), **settings, kv_offload=where, kv_offload_size=1 << 22)
    engine, params = llm.llm_engine, SamplingParams(temperature=0, max_tokens=1)

    def cached(salt: str | None = None, adapter: str | None = None) -> int:
        prompt = {"prompt_token_ids": [9] * 50} | ({"cache_salt": salt} if salt else {})
        request = engine.prepare("one", prompt, params)
        request.adapter = adapter
        engine.submit(request)
        (output,) = engine.step()
        for number in range(10):  # it leaves the device
            llm.generate({"prompt_token_ids": [number + 100] * 50}, params, use_tqdm=False)
        return output.num_cached_tokens

    assert [cached(), cached("a"), cached("b"), cached(None, "poet"), cached("a", "poet")] == [0] * 5
    assert [cached(), cached("a"), cached("b"), cached(None, "poet"), cached("a", "poet")] == [48] * 5
    engine.close()


def test_damage_costs_a_recomputation_and_a_line(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = sorted(kept.rglob("*.kv"))
    for number, path in enumerate(files):
        content = bytearray(path.read_bytes())
        content[-1 - number] ^= 1 << number % 8
        match number % 4:
            case 0:
                path.write_bytes(content)
            case 1:
                os.truncate(path, 200)
            case 2:
                path.write_text("a poem")
            case 3:
                path.write_bytes(files[0].read_bytes())
    engine = restart(kept)
    with caplog.at_level(logging.WARNING):
        assert serve(engine) == without("chunks")
    stats = engine.stats().kv_offload
    assert stats.num_bad == len(caplog.records) > 0
    assert all("the KV block is computed again" in record.message for record in caplog.records)
    engine.close()


class Disk:
    """Stands before a folder's files: fails, or lets nothing pass until it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.passes = threading.Event()
        self.passes.set()
        for name in ("write", "read"):
            monkeypatch.setattr(BlockFolder, name, self._before(getattr(BlockFolder, name)))

    def _before(self, method: Any) -> Any:
        def call(*args: Any) -> None:
            assert self.passes.wait(60)
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error))
            method(*args)

        return call


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.passes.set()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_fails_costs_one_line(
    kept: Path, disk: Disk, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is tried again when it has rested."""
    disk.error = error
    engine = restart(kept)
    with caplog.at_level(logging.WARNING):
        assert serve(engine) == without("chunks")
    assert [os.strerror(error) in record.message for record in caplog.records] == [True]
    assert engine.stats().kv_offload.num_failures >= 1
    assert engine.stats().kv_offload.num_hits == 0
    disk.error = None
    engine.tiers.tier._rests_until = 0.0
    assert serve(engine) == without("chunks")
    assert engine.stats().kv_offload.num_hits > 0
    engine.close()


def test_while_blocks_are_read_those_that_run_go_on(kept: Path, disk: Disk) -> None:
    engine = restart(kept)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("runs", {"prompt_token_ids": [1, 2, 3]}, params)
    engine.step()
    disk.passes.clear()
    asked = traffic()[0]
    engine.add_request("waits", {"prompt_token_ids": asked}, params)
    for _ in range(5):
        assert [output.request_id for output in engine.step()] == ["runs"]
    disk.passes.set()
    assert engine.block_manager._fetches[1].wait(60)
    outputs = {output.request_id: output for output in engine.step()}
    assert outputs["waits"].num_cached_tokens == (len(asked) - 1) // 4 * 4
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()


def test_one_that_leaves_while_its_blocks_are_read_leaves_nothing_behind(kept: Path, disk: Disk) -> None:
    engine = restart(kept)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("runs", {"prompt_token_ids": [1, 2, 3]}, params)
    engine.step()
    disk.passes.clear()
    engine.add_request("leaves", {"prompt_token_ids": traffic()[0]}, params)
    engine.step()
    assert engine.tiers.tier._num_fetched > 0
    engine.abort_request("leaves")
    disk.passes.set()
    engine.close()
    assert engine.tiers.tier._num_fetched == 0
    assert engine.block_manager._fetches == {}


def test_a_disk_that_hangs_is_given_up(kept: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered_manager, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(tiered_manager, "CLOSE_SECONDS", 0.05)
    disk.passes.clear()
    engine = restart(kept)
    assert serve(engine) == without("chunks")
    assert engine.stats().kv_offload.num_hits == 0
    engine.close()


def test_more_than_can_be_written_is_not_kept(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written is bounded, and what of it is wanted again is found there."""
    monkeypatch.setattr(file_tier, "IN_FLIGHT", 6 * ROW_BYTES)
    disk.passes.clear()
    engine = restart(tmp_path / "kv")
    assert serve(engine) == without("chunks")
    stats = engine.stats().kv_offload
    assert stats.num_skipped > 0
    assert stats.store_bytes == 0
    assert len(engine.tiers.tier._waiting) <= 6
    disk.passes.set()
    engine.close()


def test_what_a_failed_step_was_to_fill_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = traffic()[0]
    engine = restart(tmp_path / "kv")
    monkeypatch.setattr(engine.executor.worker, "forward", lambda *_: 1 / 0)
    engine.add_request("0", {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=4))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert len(engine.block_manager.prefix_cache) > 0
    engine.close()
    assert list((tmp_path / "kv").rglob("*.kv")) == []


def test_what_had_not_come_when_a_step_failed_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix cache knows these blocks, but what they hold is somebody else's."""
    engine, stored = restart(kept), []
    monkeypatch.setattr(engine.batch, "build", lambda *_: 1 / 0)  # the step has moved nothing
    engine.add_request("0", {"prompt_token_ids": traffic()[0]}, SamplingParams(temperature=0, max_tokens=4))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert len(engine.block_manager._coming) == 6
    monkeypatch.setattr(engine.tiers.tier, "wants", lambda _: True)
    monkeypatch.setattr(engine.tiers.tier, "store", lambda hashes, *_: stored.extend(hashes))
    engine.close()
    assert stored == []


def test_an_engine_that_is_dropped_keeps_its_blocks(tmp_path: Path) -> None:
    """`LLM` is rarely closed."""
    llm = LLM(str(folder("llama")), **SETTINGS, kv_offload=str(tmp_path / "kv"), kv_offload_size=1 << 22)
    llm.generate({"prompt_token_ids": traffic()[0]}, SamplingParams(max_tokens=1), use_tqdm=False)
    tier = llm.llm_engine.tiers.tier
    del llm
    tier._threads[1].join(60)
    assert len(list((tmp_path / "kv").rglob("*.kv"))) == len(traffic()[0]) // 4


def test_engines_that_share_a_folder_find_each_others_blocks_at_once(tmp_path: Path) -> None:
    """In turns of one step, each with a folder that is too small for both."""
    engines = [restart(tmp_path / "kv", kv_offload_size=20 * (ROW_BYTES + 112)) for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    answers: list[dict[str, list[int]]] = [{}, {}]
    for number, prompt in enumerate(traffic() + traffic()):
        for engine, answered in zip(engines, answers, strict=True):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            for output in engine.step():
                answered[output.request_id] = list(output.outputs[0].token_ids)
    for engine, answered in zip(engines, answers, strict=True):
        while engine.has_unfinished_requests():
            for output in engine.step():
                answered[output.request_id] = list(output.outputs[0].token_ids)
        stats = engine.stats().kv_offload
        assert stats.num_hits > 0
        assert (stats.num_bad, stats.num_failures) == (0, 0)
        engine.close()
    for answered in answers:
        assert [answered[str(number)] for number in range(40)] == without("chunks") * 2


def test_a_path_that_is_no_folder_and_a_size_that_holds_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for settings, message in (
        ({"kv_offload": str(tmp_path / "file" / "kv")}, "--kv-offload .*: Not a directory; give a folder"),
        (
            {"kv_offload": str(tmp_path), "kv_offload_size": ROW_BYTES},
            f"no KV block, whose file has {ROW_BYTES + 112} bytes",
        ),
        ({"kv_offload": "host", "kv_offload_size": ROW_BYTES - 1}, f"holds no KV block of {ROW_BYTES} bytes"),
        ({"kv_offload": "host", "kv_offload_size": 1 << 50}, "of host memory are free"),
    ):
        with pytest.raises(ValueError, match=message):
            make("llama", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_hold_whole_blocks_and_nothing_else_changes(dtype: torch.dtype) -> None:
    cache = CacheEngine(3, 7, 4, 2, 8, dtype, "cpu")
    tensors = [*cache.kv_caches, *cache.kv_scales]
    for tensor in tensors:
        tensor.copy_(torch.randint(-100, 100, tensor.shape).to(tensor.dtype))
    rows, before = BlockRows(tensors), [tensor.clone() for tensor in tensors]
    assert rows.num_bytes == sum(tensor.nbytes for tensor in tensors) // 7
    kept = rows.read([5, 0, 2])
    for tensor in tensors:
        tensor[:, [5, 0, 2]] = 1
    rows.write([*kept], [5, 0, 2])
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))
    rows.write([kept[0]], [1])
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(tensor[:, 1], was[:, 5])
        assert torch.equal(tensor[:, 2:], was[:, 2:])
