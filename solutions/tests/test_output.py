"""Outputs that callers see: text, tokens, logprobs and metrics of requests, in deltas, in full, or once at the end.

The text is checked against the definition: decode all ids so far and search all of it for stop strings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from solutions.batching.sampling_params import RequestOutputKind, SamplingParams
from solutions.batching.sequence import Sequence
from solutions.core.output import OutputProcessor, RequestOutput
from solutions.core.text.detokenizer import Detokenizer
from solutions.models.loader import load_tokenizer, resolve_model

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
VOCAB_SIZE = 49_152
SAMPLE = (
    "The quick brown fox, 12,345 times.\n\n\tdef f(x): return x ** 2\n Zażółć gęślą jaźń; crème brûlée 今天天气如何？"
    "日本語の文章。한국어 🙂 ok 🎉🎉 👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 e\u0301 a\u0308\u0304 กำลัง שלום עולם 𝔘𝔫𝔦 𐍈 end. "
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("smollm2-135m"))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass
class TokenLogprobs:
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Run:
    """A processor fed by hand: `step` plays the engine, which appends tokens, and gives the outputs of the step."""

    def __init__(self, tokenizer: Any) -> None:
        self.processor = OutputProcessor(tokenizer)
        self.next_id = 0

    def add(self, prompt: list[int], params: SamplingParams, name: str = "r", arrival: float = 0.0) -> list[Sequence]:
        seqs = []
        for index in range(params.n):
            seqs.append(
                Sequence(self.next_id, prompt, params, request_id=name, index=index, eos_token_ids=(2,), arrival_time=arrival)
            )
            self.next_id += 1
        request = SimpleNamespace(request_id=name, prompt=None, prompt_token_ids=prompt, params=params, arrival_time=arrival)
        self.processor.add(request, seqs)
        return seqs

    def step(
        self, tokens: dict[Sequence, list[int] | int], now: float = 0.0, logprobs: dict[Sequence, list[Any]] | None = None
    ) -> list[RequestOutput]:
        self.processor.add_logprobs(logprobs or {}, [])
        for seq, new in tokens.items():
            for token in [new] if isinstance(new, int) else new:
                if seq.append_token(token):
                    break  # an engine appends nothing behind an end
        return self.processor.emit(list(tokens), now)

    def abort(self, name: str) -> RequestOutput | None:
        for seq in self.processor.sequences(name):
            if not seq.finished:
                seq.finish("abort")
        return self.processor.abort(name)


def run_request(
    tokenizer: Any, prompt: list[int], ids: list[int], params: SamplingParams, chunks: list[int] | None = None
) -> tuple[list[RequestOutput], Run]:
    """All outputs of one request that samples `ids`, some tokens a step (one unless `chunks` says more)."""
    run = Run(tokenizer)
    (seq,) = run.add(prompt, replace(params, max_tokens=len(ids), min_tokens=min(params.min_tokens, len(ids))))
    outputs, sizes, done = [], iter(chunks or []), 0
    while not seq.finished:
        size = next(sizes, 1)
        outputs += run.step({seq: ids[done : done + size]})
        done += size
    assert run.processor.num_requests == 0
    return outputs, run


def joined(outputs: list[RequestOutput]) -> tuple[str, list[int], str | None, Any]:
    """What a client of a stream of deltas ends with."""
    text = "".join(output.outputs[0].text for output in outputs)
    ids = [token for output in outputs for token in output.outputs[0].token_ids]
    return text, ids, outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason


def test_delta_gives_each_token_once_and_the_text_when_it_is_whole(tokenizer: Any) -> None:
    ids = encode(tokenizer, "Hi 🌶!")
    outputs, _ = run_request(tokenizer, [5, 6], ids, SamplingParams(output_kind=DELTA))
    assert [output.outputs[0].token_ids for output in outputs] == [[token] for token in ids]
    texts = [output.outputs[0].text for output in outputs]
    assert "".join(texts) == "Hi 🌶!"
    assert "" in texts[:-1], "the first bytes of the pepper have no text yet, but their tokens are out"
    assert [output.finished for output in outputs] == [False] * (len(ids) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert outputs[-2].outputs[0].finish_reason is None


def test_cumulative_grows_and_final_only_comes_once(tokenizer: Any) -> None:
    ids = encode(tokenizer, "Hello there, 你好 world")
    cumulative, _ = run_request(tokenizer, [5, 6], ids, SamplingParams())
    assert [output.outputs[0].token_ids for output in cumulative] == [ids[: n + 1] for n in range(len(ids))]
    texts = [output.outputs[0].text for output in cumulative]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == "Hello there, 你好 world"
    assert texts[0] == "Hello", "earlier outputs keep what they held"
    final, _ = run_request(tokenizer, [5, 6], ids, SamplingParams(output_kind=FINAL_ONLY))
    assert len(final) == 1
    assert final[0].finished
    assert (final[0].request_id, final[0].prompt_token_ids) == ("r", [5, 6])
    assert final[0].outputs == cumulative[-1].outputs


def test_incomplete_character_at_the_end_comes_out_as_replacement(tokenizer: Any) -> None:
    ids = encode(tokenizer, "Hi 🌶")[:-1]
    for kind in (DELTA, CUMULATIVE, FINAL_ONLY):
        outputs, _ = run_request(tokenizer, [5], ids, SamplingParams(output_kind=kind))
        text = joined(outputs)[0] if kind is DELTA else outputs[-1].outputs[0].text
        assert text == tokenizer.decode(ids)
        assert text.endswith("\ufffd")


def random_case(tokenizer: Any, rng: random.Random) -> tuple[list[int], list[int], SamplingParams, list[int]]:
    """A prompt, output ids, params and sizes of steps; stop strings are often cut from the text, so that they match.

    Some outputs are cut at characters, some at tokens with any tokens between, so that characters break.
    """
    broken = rng.random() < 0.3
    pool = encode(tokenizer, SAMPLE)

    def piece(size: int) -> list[int]:
        at = rng.randrange(len(SAMPLE))
        return pool[at : at + size] if broken else encode(tokenizer, SAMPLE[at : at + size])

    prompt, ids = piece(10) or [5], []
    while len(ids) < rng.randint(1, 40):
        ids += piece(rng.randint(1, 12))
        if broken and rng.random() < 0.3:
            ids.append(rng.randrange(VOCAB_SIZE))
        if rng.random() < 0.1:
            ids.append(rng.randrange(3))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stops = []
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.randrange(max(1, len(text)))
        stops.append(text[at : at + rng.randint(1, 9)] or "never")
        if rng.random() < 0.3:
            stops.append(stops[-1][:2])
        if rng.random() < 0.3:
            stops.append(stops[-1] + "#")
    params = SamplingParams(
        max_tokens=None, stop=stops, min_tokens=rng.choice([0, 0, 3, 12]), ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.sample(ids, 1) if rng.random() < 0.2 else [],
        include_stop_str_in_output=rng.random() < 0.4, skip_special_tokens=rng.random() < 0.7,
    )  # fmt: skip
    return prompt, ids, params, [rng.randint(1, 5) for _ in ids]


def expected_text(tokenizer: Any, prompt: list[int], ids: list[int], params: SamplingParams) -> tuple[str, str | None]:
    """Straight from the definition: decode everything after each token and search all of it."""
    skip = params.skip_special_tokens
    min_tokens = min(params.min_tokens, len(ids))
    end, ended_by_token = len(ids), False
    for n, token in enumerate(ids, 1):
        if n >= min_tokens and (token in params.stop_token_ids or (token == 2 and not params.ignore_eos)):
            end, ended_by_token = n, True
            break
    if ended_by_token and not params.include_stop_str_in_output:
        end -= 1
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    previous = gate = 0
    for n in range(1, end + 2):  # one round more for what is held back at the end
        text = tokenizer.decode(prompt + ids[: min(n, end)], skip_special_tokens=skip)[len(before) :]
        if n <= end:
            text = text.rstrip("\ufffd") if len(text.rstrip("\ufffd")) > previous else text[:previous]
        if min(n, end) <= min_tokens:
            previous = gate = len(text)
            continue
        hits = []
        for order, stop in enumerate(params.stop):
            at = text.find(stop, max(0, max(previous, gate) - len(stop) + 1))
            if at >= 0:
                hits.append((at, order))
        if hits:
            at, order = min(hits)
            stop = params.stop[order]
            return text[: at + len(stop) if params.include_stop_str_in_output else at], stop
        previous = len(text)
    return tokenizer.decode(prompt + ids[:end], skip_special_tokens=skip)[len(before) :], None


@pytest.mark.parametrize("seed", range(500))
def test_stream_and_final_text_agree_with_the_definition(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    prompt, ids, params, chunks = random_case(tokenizer, rng)
    stream, _ = run_request(tokenizer, prompt, ids, replace(params, output_kind=DELTA))
    cumulative, _ = run_request(tokenizer, prompt, ids, params)
    final, _ = run_request(tokenizer, prompt, ids, replace(params, output_kind=FINAL_ONLY))
    several, _ = run_request(tokenizer, prompt, ids, replace(params, output_kind=DELTA), chunks)
    completion = final[-1].outputs[0]
    result = (completion.text, completion.token_ids, completion.finish_reason, completion.stop_reason)
    assert joined(stream) == result
    assert joined(several) == result, "the number of tokens a step changes nothing"
    assert cumulative[-1].outputs[0] == completion
    if "\ufffd" in tokenizer.decode(prompt) + tokenizer.decode(prompt + ids):
        return  # what comes of incomplete characters is the detokenizer's affair, tested above
    text, stop = expected_text(tokenizer, prompt, ids, params)
    assert completion.text == text
    if stop is not None:
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
def test_stop_string_ends_a_running_sequence(tokenizer: Any, kind: RequestOutputKind) -> None:
    ids = encode(tokenizer, "Answer: 42\n\nUser: more and more")
    params = SamplingParams(stop=["\nUser:", "zzz"], output_kind=kind, logprobs=0)
    run = Run(tokenizer)
    (seq,) = run.add([5], replace(params, max_tokens=100))
    outputs = []
    for token in ids:
        outputs += run.step({seq: token}, logprobs={seq: [TokenLogprobs([token], [-0.5], [1])]})
        if seq.finished:
            break
    assert (seq.finish_reason, seq.stop_reason) == ("stop", "\nUser:")
    assert len(outputs) == (1 if kind is FINAL_ONLY else seq.num_output_tokens)
    assert tokenizer.decode(seq.output_token_ids).endswith("User:")
    completion = outputs[-1].outputs[0]
    text = joined(outputs)[0] if kind is DELTA else completion.text
    assert text == "Answer: 42\n"
    assert (completion.finish_reason, completion.stop_reason, outputs[-1].finished) == ("stop", "\nUser:", True)
    carried = joined(outputs)[1] if kind is DELTA else completion.token_ids
    assert carried == seq.output_token_ids
    assert run.processor.num_requests == 0


def test_stop_string_in_the_last_token_is_a_stop(tokenizer: Any) -> None:
    """The token that completes the string is also the last that the request allows."""
    ids = encode(tokenizer, "one two")
    outputs, _ = run_request(tokenizer, [5], ids, SamplingParams(stop=["two"], output_kind=DELTA))
    assert joined(outputs) == ("one ", ids, "stop", "two")


def test_tokens_behind_a_stop_string_in_one_step_are_not_appended(tokenizer: Any) -> None:
    ids = encode(tokenizer, "a b c d e f")
    outputs, _ = run_request(tokenizer, [5], [*ids, *ids], SamplingParams(stop=["c"], output_kind=DELTA), [5] * 9)
    assert len(outputs) == 1
    assert outputs[0].outputs[0].text == "a b "
    assert tokenizer.decode(outputs[0].outputs[0].token_ids) == "a b c"
    assert outputs[0].outputs[0].stop_reason == "c"


def test_min_tokens_gates_stop_strings(tokenizer: Any) -> None:
    ids = encode(tokenizer, " a a a a a a")
    assert len(ids) == 6
    for min_tokens in range(6):
        outputs, _ = run_request(tokenizer, [5], ids, SamplingParams(stop=["a"], min_tokens=min_tokens))
        assert outputs[-1].outputs[0].token_ids == ids[: min_tokens + 1]
        assert outputs[-1].outputs[0].text == " a" * min_tokens + " "
    straddling, _ = run_request(tokenizer, [5], ids, SamplingParams(stop=["a a"], min_tokens=3))
    assert straddling[-1].outputs[0].text == " a a ", "completed by the fourth token"


@pytest.mark.parametrize("token_kind", ["eos", "stop_token"])
def test_text_of_the_token_that_ended_it_is_left_out(tokenizer: Any, token_kind: str) -> None:
    last = 2 if token_kind == "eos" else encode(tokenizer, " end")[0]
    ids = [*encode(tokenizer, "The"), last]
    params = SamplingParams(skip_special_tokens=False, stop_token_ids=[] if token_kind == "eos" else [last])
    for kind in (DELTA, CUMULATIVE, FINAL_ONLY):
        for stop in ([], ["zzzz"]):
            case = replace(params, output_kind=kind, stop=stop)
            outputs, _ = run_request(tokenizer, [5], [*ids, 7], case)
            text, carried, reason, stop_reason = joined(outputs)
            completion = outputs[-1].outputs[0]
            assert (text if kind is DELTA else completion.text) == "The"
            assert (carried if kind is DELTA else completion.token_ids) == ids
            assert (reason, stop_reason) == ("stop", None if token_kind == "eos" else last)
            outputs, _ = run_request(tokenizer, [5], [*ids, 7], replace(case, include_stop_str_in_output=True))
            text = joined(outputs)[0] if kind is DELTA else outputs[-1].outputs[0].text
            assert text == tokenizer.decode(ids)


def test_several_sequences(tokenizer: Any) -> None:
    words = [encode(tokenizer, text) for text in (" red fox", " green", " blue sky today")]
    assert [len(ids) for ids in words] == [2, 1, 3]
    results = {}
    for kind in (DELTA, CUMULATIVE, FINAL_ONLY):
        run = Run(tokenizer)
        a, b, c = run.add([5], SamplingParams(n=3, max_tokens=8, output_kind=kind))
        ends = {a: 2, b: 1, c: 3}
        steps = []
        for turn in range(3):
            moving = [seq for seq in (c, a, b) if ends[seq] > turn]
            for seq in moving:
                if ends[seq] == turn + 1:
                    seq.finish("length")
            steps.append(run.step({seq: words[seq.index][turn] for seq in moving}))
            assert run.processor.num_requests == (turn < 2)
        results[kind] = steps
    assert [len(step) for step in results[DELTA]] == [1, 1, 1]
    deltas = [[(c.index, c.text, c.finish_reason) for c in step[0].outputs] for step in results[DELTA]]
    assert [sorted(step, key=str) for step in deltas] == [
        [(0, " red", None), (1, " green", "length"), (2, " blue", None)],
        [(0, " fox", "length"), (2, " sky", None)],
        [(2, " today", "length")],
    ]
    assert [step[0].finished for step in results[DELTA]] == [False, False, True]
    cumulative = [[(c.index, c.text, c.finish_reason) for c in step[0].outputs] for step in results[CUMULATIVE]]
    assert cumulative == [
        [(0, " red", None), (1, " green", "length"), (2, " blue", None)],
        [(0, " red fox", "length"), (1, " green", "length"), (2, " blue sky", None)],
        [(0, " red fox", "length"), (1, " green", "length"), (2, " blue sky today", "length")],
    ]
    assert [len(step) for step in results[FINAL_ONLY]] == [0, 0, 1]
    assert [c.text for c in results[FINAL_ONLY][2][0].outputs] == [" red fox", " green", " blue sky today"]


def test_requests_side_by_side(tokenizer: Any) -> None:
    run = Run(tokenizer)
    (a,) = run.add([5], SamplingParams(output_kind=DELTA), "a")
    (b,) = run.add([5, 6], SamplingParams(output_kind=FINAL_ONLY, max_tokens=2), "b")
    one, two = encode(tokenizer, " one two")
    assert [output.request_id for output in run.step({a: one, b: two})] == ["a"]
    outputs = run.step({b: one, a: two})
    assert [(output.request_id, output.outputs[0].text) for output in outputs] == [("b", " two one"), ("a", " two")]
    assert run.processor.num_requests == 1
    with pytest.raises(KeyError):  # a finished request is forgotten
        run.step({b: one})


def test_final_only_reads_no_token_on_the_way(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(Detokenizer, "step", lambda self: steps.append(self.offset) or "")
    ids = encode(tokenizer, "one two three")
    outputs, _ = run_request(tokenizer, [5], ids, SamplingParams(output_kind=FINAL_ONLY))
    assert (outputs[0].outputs[0].text, steps) == ("one two three", [])


def test_abort(tokenizer: Any) -> None:
    ids = encode(tokenizer, "Hi 🌶")[:-1]
    for kind in (DELTA, CUMULATIVE, FINAL_ONLY):
        for stop in ([], ["Hello world"]):
            run = Run(tokenizer)
            (seq,) = run.add([5], SamplingParams(output_kind=kind, max_tokens=100, stop=stop))
            streamed = "".join(output.outputs[0].text for token in ids for output in run.step({seq: token}))
            output = run.abort("r")
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
            assert (streamed if kind is DELTA else "") + output.outputs[0].text == tokenizer.decode(ids)
            assert output.outputs[0].token_ids == ([] if kind is DELTA else ids)
            assert output.metrics.finished_time is not None
            assert run.processor.num_requests == 0
            assert run.abort("r") is None


def test_abort_before_the_first_token_and_after_one_of_two(tokenizer: Any) -> None:
    run = Run(tokenizer)
    run.add([5], SamplingParams(), "waiting")
    output = run.abort("waiting")
    assert (output.outputs[0].text, output.outputs[0].token_ids, output.metrics.first_token_time) == ("", [], None)
    for kind, expected in ((DELTA, [(1, "", "abort")]), (CUMULATIVE, [(0, "Hi", "stop"), (1, "Hi", "abort")])):
        a, b = run.add([5], SamplingParams(n=2, output_kind=kind), "two")
        (hi,) = encode(tokenizer, "Hi")
        run.step({a: hi, b: hi})
        run.step({a: 2})
        output = run.abort("two")
        assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == expected


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
def test_logprobs(tokenizer: Any, kind: RequestOutputKind) -> None:
    ids = encode(tokenizer, " red fox")
    other = encode(tokenizer, " blue")[0]
    run = Run(tokenizer)
    (quiet,) = run.add([5], SamplingParams(output_kind=kind), "quiet")
    (seq,) = run.add([5], SamplingParams(output_kind=kind, logprobs=1, max_tokens=2))
    outputs = []
    for token, logprob, rank in ((ids[0], -2.0, 3), (ids[1], -0.25, 1)):
        entry = TokenLogprobs([other, token], [-0.125, logprob], [1, rank])
        outputs += [o for o in run.step({quiet: 7, seq: token}, logprobs={seq: [entry]}) if o.request_id == "r"]
    last = outputs[-1].outputs[0]
    records = [record for output in outputs for record in output.outputs[0].logprobs] if kind is DELTA else last.logprobs
    assert [set(record) for record in records] == [{other, ids[0]}, {other, ids[1]}]
    assert [(r[t].logprob, r[t].rank) for r, t in zip(records, ids, strict=True)] == [(-2.0, 3), (-0.25, 1)]
    assert [record[other].decoded_token for record in records] == [" blue", " blue"]
    assert [r[t].decoded_token for r, t in zip(records, ids, strict=True)] == [" red", " fox"]
    assert last.cumulative_logprob == -2.25
    if kind is DELTA:
        assert [len(output.outputs[0].logprobs) for output in outputs] == [1, 1]
    if kind is CUMULATIVE:
        assert len(outputs[0].outputs[0].logprobs) == 1, "an earlier output does not grow"
    output = run.abort("quiet")
    assert (output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None, None)


@pytest.mark.parametrize(("kind", "carrying"), [(DELTA, [0, 2]), (CUMULATIVE, [0, 1, 2]), (FINAL_ONLY, [0])])
def test_prompt_logprobs(tokenizer: Any, kind: RequestOutputKind, carrying: list[int]) -> None:
    prompt = encode(tokenizer, "one two three four")
    run = Run(tokenizer)
    (seq,) = run.add(prompt, SamplingParams(output_kind=kind, prompt_logprobs=0, max_tokens=3))
    entries = [TokenLogprobs([token], [-float(n)], [n]) for n, token in enumerate(prompt)]
    run.processor.add_logprobs({}, [("r", 1, entries[1:3])])
    run.processor.add_logprobs({}, [("r", 2, entries[2:])])  # a chunk computed again
    outputs = [output for token in (7, 8, 9) for output in run.step({seq: token})]
    assert [n for n, output in enumerate(outputs) if output.prompt_logprobs is not None] == carrying
    records = outputs[-1].prompt_logprobs
    assert records[0] is None
    assert [record[token].logprob for record, token in zip(records[1:], prompt[1:], strict=True)] == [-1.0, -2.0, -3.0]
    assert records[1][prompt[1]].decoded_token == " two"


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
def test_metrics(tokenizer: Any, kind: RequestOutputKind) -> None:
    run = Run(tokenizer)
    a, b = run.add([5], SamplingParams(n=2, output_kind=kind, max_tokens=2), arrival=10.0)
    a.first_scheduled_time, b.first_scheduled_time = 11.0, 99.0
    a.num_cached_tokens = 1
    run.step({b: 7}, now=12.0)
    run.step({a: 7}, now=13.0)
    a.num_preemptions, b.num_preemptions = 2, 3
    outputs = run.step({a: 7, b: 7}, now=14.0)
    metrics = outputs[-1].metrics
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (10.0, 11.0, 12.0)
    assert (metrics.last_token_time, metrics.finished_time, metrics.num_preemptions) == (14.0, 14.0, 5)
    assert outputs[-1].num_cached_tokens == 1


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY])
def test_without_text(tokenizer: Any, kind: RequestOutputKind) -> None:
    ids = encode(tokenizer, "one two")
    for source, params in ((None, SamplingParams()), (tokenizer, SamplingParams(detokenize=False))):
        outputs, _ = run_request(source, [5], ids, replace(params, output_kind=kind, logprobs=None))
        text, carried, reason, _ = joined(outputs)
        assert (text, reason) == ("", "length")
        assert (carried if kind is DELTA else outputs[-1].outputs[0].token_ids) == ids


def test_bad_requests_are_refused(tokenizer: Any) -> None:
    run = Run(None)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        run.add([5], SamplingParams(stop=["x"]))
    assert run.processor.num_requests == 0
