"""Beam search against transformers' own, token for token, in float32; and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from solutions.core.beams.beam_search import BeamSearch, BeamSearchParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.core.lora.registry import LoRARequest
from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, serve, until
from solutions.tests.lora_adapters import make_adapter
from solutions.tests.tiny_models import EOS, make_tiny

CASES = ((0, 1, 8, 1.0), (1, 2, 12, 1.0), (0, 4, 9, 0.0), (2, 5, 7, -1.5), (0, 3, 14, 2.0))
"""Prompt, width, tokens, penalty of lengths."""
PROMPTS = [[5, 9, 77, 30], [12], list(range(40, 75))]


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[tuple[str, LLMEngine]]:
    engine = LLMEngine(EngineConfig(str(folder), dtype="float32", max_model_len=96, num_gpu_blocks_override=64, **settings))
    try:
        with serve(AsyncEngine(engine)) as url:
            yield f"{url}/v1", engine
    finally:
        engine.close()


def theirs(
    model: Any, prompt: list[int], width: int, max_tokens: int, penalty: float = 1.0, ends: Iterable[int] = (EOS,)
) -> list[list[int]]:
    """Transformers' answers, without what fills them up behind the end."""
    ends = list(ends)
    found = model.generate(
        torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False, max_new_tokens=max_tokens,
        length_penalty=penalty, eos_token_id=ends or None, pad_token_id=0,
    )  # fmt: skip
    answers = []
    for row in found[:, len(prompt) :].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


def ours(url: str, prompt: list[int] | list[list[int]], **fields: Any) -> list[dict[str, Any]]:
    asked = body(prompt=prompt, use_beam_search=True, return_token_ids=True, **fields)
    response = httpx.post(f"{url}/completions", json=asked, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_answers_are_transformers(family: str, tmp_path: Path) -> None:
    """Ends that come early and never, one and several; lengths that pay and that cost; a penalty of 0."""
    usual = make_tiny(family, tmp_path).generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    num_early = 0
    for own in (EOS, usual[0, -1].item(), usual[0, -3].item()):  # a token that is likely ends answers soon
        model = make_tiny(family, tmp_path, eos_token_id=own)
        with served(tmp_path, block_size=4) as (url, engine):
            ends = list(engine.model_config.eos_token_ids)
            assert set(ends) == {own, EOS}  # the tokenizer's, too
            for which, width, max_tokens, penalty in CASES:
                prompt = PROMPTS[which]
                answers = theirs(model, prompt, width, max_tokens, penalty, ends)
                choices = ours(url, prompt, n=width, max_tokens=max_tokens, length_penalty=penalty)
                assert [choice["token_ids"] for choice in choices] == answers, (own, prompt, width, max_tokens, penalty)
                num_early += sum(len(answer) < max_tokens for answer in answers)
                reasons = ["stop" if answer[-1] in ends else "length" for answer in answers]
                assert [choice["finish_reason"] for choice in choices] == reasons
            (choice,) = ours(url, PROMPTS[0], n=1, max_tokens=10, ignore_eos=True)
            assert [choice["token_ids"]] == theirs(model, PROMPTS[0], 1, 10, 1.0, [])
    assert num_early > 1, "ends are to be seen"


def test_beams_share_blocks_and_leave_none(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    with served(tmp_path, block_size=4) as (url, engine):
        answers = [theirs(model, prompt, 3, 16) for prompt in PROMPTS]
        choices = ours(url, PROMPTS, n=3, max_tokens=16)
        assert [choice["token_ids"] for choice in choices] == [answer for group in answers for answer in group]
        assert [choice["index"] for choice in choices] == list(range(9))
        stats = engine.stats()
        assert stats.prefix_cache_hits > stats.prefix_cache_queries * 0.7
        assert (stats.num_running, stats.num_waiting, engine.block_manager.usage) == (0, 0, 0.0)
        engine.scheduler.check_invariants()
        text = ours(url, PROMPTS[2], n=2, max_tokens=8, include_stop_str_in_output=True)
        for choice in text:
            assert choice["text"] == engine.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"enable_prefix_caching": False}, {"speculative_config": '{"method": "ngram"}'}])
def test_other_settings_change_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    with served(tmp_path, **settings) as (url, _):
        for prompt in PROMPTS:
            answers = theirs(model, prompt, 4, 10)
            assert [choice["token_ids"] for choice in ours(url, prompt, n=4, max_tokens=10)] == answers


def test_it_ends_where_the_context_does(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    with served(tmp_path) as (url, _):
        prompt = list(range(20, 110))
        asked = {"model": "fake", "messages": [{"role": "user", "content": "a" * 50}], "use_beam_search": True, "n": 2}
        chat = httpx.post(f"{url}/chat/completions", json=asked, timeout=60).json()
        assert chat["usage"]["total_tokens"] >= 96
        answers = theirs(model, prompt, 2, 6)
        assert [choice["token_ids"] for choice in ours(url, prompt, n=2, max_tokens=6)] == answers


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"stream": True}, "stream", "cannot be combined with use_beam_search"),
        ({"n": 2, "best_of": 3}, "best_of", "n is the number of beams"), ({"n": 11}, "n", "at most 10 beams"),
        ({"stop": "x"}, "stop", "cannot be"), ({"stop_token_ids": [1]}, "stop_token_ids", "cannot be"),
        ({"min_tokens": 1}, "min_tokens", "cannot be"), ({"presence_penalty": 1}, "presence_penalty", "cannot be"),
        ({"frequency_penalty": 1}, "frequency_penalty", "cannot be"), ({"repetition_penalty": 2}, "repetition_penalty", ""),
        ({"logit_bias": {"1": 1}}, "logit_bias", "cannot be"), ({"allowed_token_ids": [1]}, "allowed_token_ids", "cannot be"),
        ({"bad_words": ["x"]}, "bad_words", "cannot be"), ({"logprobs": 1}, "logprobs", "cannot be"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "cannot be"), ({"guided_regex": "a"}, "guided_regex", "cannot be"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty", "needs use_beam_search"),
        ({"length_penalty": 10.5}, "length_penalty", "from -10 to 10"),
    ],
)  # fmt: skip
def test_what_excludes_it_is_named(fields: dict[str, Any], param: str, says: str, fake_url: str) -> None:
    response = httpx.post(f"{fake_url}/v1/completions", json=body(use_beam_search=True) | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    engine = FakeEngine()
    engine.model_config.eos_token_ids = (2,)
    with serve(engine) as url:
        yield url
    assert engine.submitted == []


def test_what_changes_no_likelihood_is_taken(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path)
    answers = theirs(model, PROMPTS[0], 2, 6)
    with served(tmp_path) as (url, _):
        for fields in ({"temperature": 1.7, "top_p": 0.5, "seed": 3}, {"presence_penalty": 0, "stop": [], "stream": False}):
            assert [choice["token_ids"] for choice in ours(url, PROMPTS[0], n=2, max_tokens=6, **fields)] == answers


def test_a_client_that_leaves_ends_the_search() -> None:
    engine = FakeEngine()
    with serve(engine) as url:
        asked = body(use_beam_search=True, max_tokens=4000)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=asked, timeout=0.5)
        until(lambda: not engine.running)
        steps = engine.num_steps
        assert httpx.post(f"{url}/v1/completions", json=body()).status_code == 200
        assert engine.num_steps <= steps + 4  # those of the second request


def test_a_queue_that_is_full_is_told() -> None:
    with serve(FakeEngine(max_waiting=0)) as url:
        response = httpx.post(f"{url}/v1/completions", json=body(use_beam_search=True))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")


def test_a_search_by_hand() -> None:
    """Width 2, token 9 ends. The likeliest first token leads to a worse answer than the second one."""
    beams = BeamSearch(2, 3, (9,), 1.0)
    assert beams.num_candidates == 4
    beams.advance([{1: -0.5, 2: -0.7, 9: -3.0}])
    assert [(beam.token_ids, beam.logprob) for beam in beams.running] == [((1,), -0.5), ((2,), -0.7)]
    assert beams.answers == []  # that end was the third
    beams.advance([{3: -2.0, 4: -2.5}, {9: -0.1, 5: -1.0}])
    assert [beam.token_ids for beam in beams.answers] == [(2, 9)]
    assert [beam.token_ids for beam in beams.running] == [(2, 5), (1, 3)]
    beams.advance([{6: -1.0, 7: -1.5}, {6: -0.1, 9: -4.0}])
    assert [beam.token_ids for beam in beams.answers] == [(2, 9), (1, 3, 6)]  # -0.8 / 2 and -2.6 / 3, before -2.7 / 3
    assert beams.running == []


def test_offline_answers_are_transformers(tmp_path: Path) -> None:
    """All prompts at once, whose searches end at different steps; a prompt that is text, and one with an adapter."""
    usual = make_tiny("llama", tmp_path).generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    model = make_tiny("llama", tmp_path, eos_token_id=usual[0, -3].item())
    merged = make_adapter(tmp_path / "adapter", model, seed=1)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=96, num_gpu_blocks_override=64, block_size=4, enable_lora=True)
    tokenizer, ends = llm.get_tokenizer(), llm.llm_engine.model_config.eos_token_ids
    salted = [{"prompt_token_ids": prompt, "cache_salt": "a"} for prompt in PROMPTS]
    prompts: list[Any] = [*salted, "Hello there", {"prompt_token_ids": PROMPTS[0]}]
    adapters = [None] * 4 + [LoRARequest("one", 1, str(tmp_path / "adapter"))]
    for keep in (False, True):
        params = BeamSearchParams(beam_width=3, max_tokens=9, length_penalty=0.5, include_stop_str_in_output=keep)
        outputs = llm.beam_search(prompts, params, lora_request=adapters)
        num_ended = 0
        for prompt, adapter, output in zip(prompts, adapters, outputs, strict=True):
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt["prompt_token_ids"]
            answers = theirs(merged if adapter else model, ids, 3, 9, 0.5, ends)
            num_ended += (ended := [answer[-1] in ends for answer in answers]).count(True)
            wanted = [ids + (a if keep or not end else a[:-1]) for a, end in zip(answers, ended, strict=True)]
            assert [each.tokens for each in output.sequences] == wanted
            assert [each.text for each in output.sequences] == [tokenizer.decode(each) for each in wanted]
            assert [each.finish_reason for each in output.sequences] == ["stop" if end else "length" for end in ended]
        assert 0 < num_ended < 15
    stats = llm.llm_engine.stats()
    assert (stats.num_running, stats.num_waiting, llm.llm_engine.block_manager.usage) == (0, 0, 0.0)
    alone = llm.beam_search({"prompt_token_ids": PROMPTS[1]}, BeamSearchParams(2, 4, ignore_eos=True))
    assert [each.tokens[1:] for each in alone[0].sequences] == theirs(model, PROMPTS[1], 2, 4, 1.0, [])
    long = {"prompt_token_ids": list(range(1, 95))}  # two tokens fit behind it
    assert [len(each.tokens) for each in llm.beam_search(long, BeamSearchParams(2, 9, ignore_eos=True))[0].sequences] == [
        96,
        96,
    ]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (BeamSearchParams(11, 4), "at most 10 beams are possible, got 11"), (BeamSearchParams(0, 4), "n must be"),
        (BeamSearchParams(2, 0), "max_tokens must be"), (BeamSearchParams(2, 4, length_penalty=99), "length_penalty"),
    ],
)  # fmt: skip
def test_offline_searches_that_cannot_be_are_refused(params: BeamSearchParams, said: str, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=96, num_gpu_blocks_override=64)
    with pytest.raises(ValueError, match=said):
        llm.beam_search({"prompt_token_ids": [1]}, params)
