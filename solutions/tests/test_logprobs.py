"""Texts of tokens in log-probabilities: joined they are the text, whatever the tokenizer, the pieces and the stop strings.

Oracles: the same request without log-probabilities, whose text other tests check; the tokenizers' own decode; a detokenizer
that reads the alternative in place of the token; arithmetic.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from solutions.batching.sampling_params import RequestOutputKind, SamplingParams
from solutions.core.output import CompletionOutput, RequestOutput
from solutions.core.sampling.sampler import Sampler
from solutions.core.text.detokenizer import Detokenizer, special_token_ids
from solutions.models.config.entries import Entries
from solutions.models.gguf_tokenizer import tokenizer_from_gguf
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.serving.openai_protocol import CompletionRequest
from solutions.serving.responses import CompletionReply
from solutions.serving.token_logprobs import chat_logprobs, completion_logprobs
from solutions.tests.test_output import Run, TokenLogprobs, encode

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS += ["▁", "▁▁", "▁Hello", "▁world", "He", "llo", "a", "A", "!", "▁.", "\n", "é", "你", "\ufffd", "▁[/INST]"]


def wrapped(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS[:3]])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False), AddedToken("ö x", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


def of_words(decoder: Any) -> Any:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoder
    return wrapped(tokenizer)


def unspaced(*last: Any) -> Any:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


KINDS = {
    "bytes": lambda: load_tokenizer(resolve_model("smollm2-135m")),
    "llama": lambda: of_words(unspaced(decoders.Strip(" ", 1, 0))),
    "no prefix": lambda: of_words(unspaced()),
    "metaspace": lambda: of_words(decoders.Metaspace()),
    "word pieces": lambda: of_words(decoders.WordPiece(prefix="He", cleanup=True)),
}
LOW = {"bytes": 400}
"""Ids below this are special tokens, single bytes and short pieces."""


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = KINDS[request.param]()
    made.kind = request.param
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return KINDS["llama"]()


@pytest.fixture(scope="module")
def smollm() -> Any:
    return KINDS["bytes"]()


def some_tokens(tokenizer: Any, rng: random.Random, count: int) -> list[int]:
    """Tokens of all kinds: any, bytes and special ones, and characters of several tokens."""
    tokens: list[int] = []
    while len(tokens) < count:
        if rng.random() < 0.4:
            characters = "".join(rng.choices(["😀", "é", "你", "Hello", " world", "a", " ", ".", "\n"], k=3))
            tokens += tokenizer.encode(characters, add_special_tokens=False)[: rng.randint(1, 12)]
        else:
            tokens.append(rng.randrange(LOW.get(tokenizer.kind, len(tokenizer)) if rng.random() < 0.5 else len(tokenizer)))
    return tokens[:count]


def answer(
    tokenizer: Any,
    prompt: list[int],
    ids: list[int],
    params: SamplingParams,
    k: int | None,
    sizes: list[int],
    rng: random.Random,
) -> list[CompletionOutput]:
    """The outputs of one request that samples `ids` in steps of these sizes, each beside k random alternatives."""
    run = Run(tokenizer)
    (seq,) = run.add(prompt, replace(params, max_tokens=len(ids), min_tokens=0, logprobs=k))
    outputs, done = [], 0
    for size in sizes:
        if seq.finished:
            break
        entries = []
        for token in ids[done : done + size]:
            others = [other for other in some_tokens(tokenizer, rng, k or 0) if other != token]
            top = sorted({*others, token})
            entries.append(
                TokenLogprobs(
                    [token, *top],
                    [-1.0 * top.index(token) - 1, *(-1.0 - i for i in range(len(top)))],
                    [top.index(token) + 1, *range(1, len(top) + 1)],
                )
            )
        outputs += run.step({seq: ids[done : done + size]}, logprobs={seq: entries} if k is not None else None)
        done += size
    return [output.outputs[0] for output in outputs]


def own(completion: CompletionOutput) -> list[str]:
    return [entry[token].decoded_token for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]


def joined(outputs: list[CompletionOutput]) -> CompletionOutput:
    whole = replace(outputs[0])
    for later in outputs[1:]:
        whole.join(later)
    return whole


@pytest.mark.parametrize("seed", range(40))
def test_joined_texts_are_the_text(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    prompt, ids = some_tokens(tokenizer, rng, rng.randint(1, 9)), some_tokens(tokenizer, rng, rng.randint(1, 40))
    text = tokenizer.decode(ids)
    stops = [text[at : at + rng.randint(1, 6)] or "?" for at in rng.choices(range(len(text) + 1), k=rng.choice([0, 1, 2]))]
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=rng.random() < 0.4, skip_special_tokens=rng.random() < 0.6,
        ignore_eos=rng.random() < 0.5, stop_token_ids=rng.sample(ids, 1) if rng.random() < 0.3 else [],
    )  # fmt: skip
    sizes, k = [rng.randint(1, 4) for _ in ids], rng.choice([0, 1, 5])
    plain = answer(tokenizer, prompt, ids, replace(params, output_kind=FINAL_ONLY), None, sizes, rng)[0]
    final = answer(tokenizer, prompt, ids, replace(params, output_kind=FINAL_ONLY), k, sizes, random.Random(seed))[0]
    assert (final.text, final.token_ids, final.stop_reason) == (plain.text, plain.token_ids, plain.stop_reason)
    assert "".join(own(final)) == final.text
    assert final.cumulative_logprob == sum(e[t].logprob for t, e in zip(final.token_ids, final.logprobs, strict=True))
    pieces = answer(tokenizer, prompt, ids, replace(params, output_kind=DELTA), k, sizes, random.Random(seed))
    assert joined(pieces) == final
    assert ["".join(own(piece)) for piece in pieces] == [piece.text for piece in pieces]
    steps = answer(tokenizer, prompt, ids, replace(params, output_kind=CUMULATIVE), k, sizes, random.Random(seed))
    assert steps[-1] == final
    assert ["".join(own(step)) for step in steps] == [step.text for step in steps]
    check_answers(tokenizer, pieces, final, k)
    check_alternatives(tokenizer, prompt, ids, final, params)


def check_answers(tokenizer: Any, pieces: list[CompletionOutput], final: CompletionOutput, k: int) -> None:
    """Both of OpenAI's forms, whole and in pieces."""
    whole = completion_logprobs(final.token_ids, final.logprobs, 0, [])
    assert "".join(whole.tokens) == final.text
    assert whole.text_offset == [sum(map(len, whole.tokens[:i])) for i in range(len(whole.tokens))]
    for text, logprob, top, position in zip(
        whole.tokens, whole.token_logprobs, whole.top_logprobs, final.logprobs, strict=True
    ):
        assert top[text] == logprob
        assert sorted(top.values()) == sorted(entry.logprob for entry in position.values())
    tokens, offset = [], 0
    for piece in pieces:
        part = completion_logprobs(piece.token_ids, piece.logprobs, offset, [])
        tokens += zip(part.tokens, part.token_logprobs, part.top_logprobs, part.text_offset, strict=True)
        offset += len(piece.text)
    assert tokens == [*zip(whole.tokens, whole.token_logprobs, whole.top_logprobs, whole.text_offset, strict=True)]
    chat = chat_logprobs(tokenizer, final.token_ids, final.logprobs, k).content
    assert b"".join(bytes(entry.bytes) for entry in chat).decode(errors="replace") == final.text
    assert [entry.token for entry in chat] == whole.tokens
    assert [len(entry.top_logprobs) for entry in chat] == [min(k, len(position)) for position in final.logprobs]
    streamed = [entry for piece in pieces for entry in chat_logprobs(tokenizer, piece.token_ids, piece.logprobs, k).content]
    assert streamed == chat


def check_alternatives(
    tokenizer: Any, prompt: list[int], ids: list[int], final: CompletionOutput, params: SamplingParams
) -> None:
    backend = tokenizer.backend_tokenizer
    special = special_token_ids(backend) if params.skip_special_tokens else frozenset()
    for i, position in enumerate(final.logprobs):
        for other in position.keys() - {ids[i]}:
            detokenizer = Detokenizer(backend, [*prompt, *ids[:i], other], len(prompt), special)
            text = [detokenizer.step() for _ in range(i + 1)][-1]
            if "\ufffd" not in text:
                assert position[other].decoded_token == (text or backend.decode([other], skip_special_tokens=False))


def position(*tokens: int) -> TokenLogprobs:
    """The entries of the first of some tokens, which are the likeliest in this order."""
    logprobs, ranks = [-float(rank) for rank in range(1, len(tokens) + 1)], [*range(1, len(tokens) + 1)]
    return TokenLogprobs([tokens[0], *tokens], [-1.0, *logprobs], [1, *ranks])


def scored(tokenizer: Any, prompt: list[int], rows: list[list[int]], **params: Any) -> CompletionOutput:
    """An answer of the first token of each row, with the others as alternatives."""
    run = Run(tokenizer)
    (seq,) = run.add(prompt, SamplingParams(max_tokens=len(rows), output_kind=FINAL_ONLY, logprobs=9, **params))
    outputs: list[RequestOutput] = []
    for row in rows:
        outputs += run.step({seq: row[0]}, logprobs={seq: [position(*row)]}) if not seq.finished else []
    return outputs[-1].outputs[0]


def test_a_sentencepiece_token_begins_with_its_space(llama: Any) -> None:
    hello, world, space, byte = (llama.convert_tokens_to_ids(word) for word in ("▁Hello", "▁world", "▁", "<0xE4>"))
    rows = [[world, hello, byte, 2], [space, world], [hello]]
    got = scored(llama, [1, hello], rows)
    assert own(got) == [" world", " ", " Hello"]
    assert [e.decoded_token for e in got.logprobs[0].values()] == [" world", " Hello", "\ufffd", "</s>"]
    first = scored(llama, [1], rows)
    assert own(first) == ["world", " ", " Hello"], "but not at the beginning of the text"
    assert first.logprobs[0][hello].decoded_token == "Hello"


def test_the_token_that_completes_a_character_carries_it(smollm: Any) -> None:
    ids = encode(smollm, "a🌶b")
    assert len(ids) > 3
    other = encode(smollm, "🌷")[-1]
    got = scored(smollm, [5], [[token] if token != ids[-2] else [token, other] for token in ids])
    assert own(got) == ["a", *[""] * (len(ids) - 3), "🌶", "b"]
    assert got.logprobs[-2][other].decoded_token == "🌷", "read behind the same first bytes"
    chat = chat_logprobs(smollm, got.token_ids, got.logprobs, 2).content
    assert b"".join(bytes(entry.bytes) for entry in chat) == "a🌶b".encode()
    assert all(entry.bytes for entry in chat), "each has those that it brings"
    assert bytes(chat[-2].top_logprobs[1].bytes) == "🌷".encode()[-1:]
    half = scored(smollm, [5], [[token] for token in ids[:-2]])
    assert own(half) == ["a", *[""] * (len(ids) - 4), "\ufffd"] == [*own(half)[:-1], smollm.decode(ids[:-2])[1:]]


@pytest.mark.parametrize(("include", "texts"), [(False, ["one", " t", "", ""]), (True, ["one", " two th", "", ""])])
def test_a_stop_string_cuts_its_token(smollm: Any, include: bool, texts: list[str]) -> None:
    ids = [*encode(smollm, "one two three")]
    assert [smollm.decode([token]) for token in ids] == ["one", " two", " three"]
    got = scored(smollm, [5], [[token] for token in ids], stop=["wo th"], include_stop_str_in_output=include)
    assert "".join(own(got)) == got.text == ("one two th" if include else "one t")
    assert own(got) == (["one", " two", " th"] if include else ["one", " t", ""])


def test_tokens_that_are_left_out_of_the_text_have_none(smollm: Any) -> None:
    hi, there = encode(smollm, "Hi there")
    for skip, texts in ((True, ["Hi", "", " there", ""]), (False, ["Hi", "<|im_start|>", " there", ""])):
        got = scored(smollm, [5], [[hi, 2], [1, there], [there, 1], [2, hi]], skip_special_tokens=skip)
        assert (got.finish_reason, own(got), got.text) == ("stop", texts, "".join(texts))
        assert got.logprobs[0][2].decoded_token == "<|im_end|>", "an alternative is shown all the same"
        assert got.logprobs[3][hi].decoded_token == "Hi"
    shown = scored(smollm, [5], [[hi], [2]], skip_special_tokens=False, include_stop_str_in_output=True)
    assert own(shown) == ["Hi", "<|im_end|>"]


def test_without_text_tokens_have_none(smollm: Any) -> None:
    for source, params in ((None, {}), (smollm, {"detokenize": False})):
        got = scored(source, [5], [[7, 8], [9]], **params)
        assert [[entry.decoded_token for entry in place.values()] for place in got.logprobs] == [[None, None], [None]]
        assert (got.token_ids, got.cumulative_logprob) == ([7, 9], -2.0)


def test_as_many_alternatives_as_asked_for_when_logits_tie(smollm: Any) -> None:
    """In bfloat16 tokens tie all the time; `top_logprobs` says how many come, `logprobs` brings the sampled one too."""
    logits = torch.tensor([[0.0, 2.0, 3.0, 3.0, 3.0, 1.0]] * 4).bfloat16()
    for k in range(1, 6):
        sampler, params = Sampler(6), SamplingParams(logprobs=k, output_kind=FINAL_ONLY, max_tokens=4, ignore_eos=True)
        run = Run(smollm)
        (seq,) = run.add([5], params)
        sampled = [2, 4, 3, 0]
        entries = sampler.prompt_logprobs(logits, sampled, k)
        outputs = [o for token, e in zip(sampled, entries, strict=True) for o in run.step({seq: token}, logprobs={seq: [e]})]
        got = outputs[-1].outputs[0]
        likeliest = [2, 3, 4, 1, 5, 0][:k]
        assert [list(place) for place in got.logprobs] == [
            [token, *(other for other in likeliest if other != token)] for token in sampled
        ]
        chat = chat_logprobs(None, got.token_ids, got.logprobs, k).content
        assert [len(entry.top_logprobs) for entry in chat] == [k] * 4
        plain = completion_logprobs(got.token_ids, got.logprobs, 0, [])
        assert [len(top) for top in plain.top_logprobs] == [k + (token not in likeliest) for token in sampled]


# ------------------------------------------------------------------------------------------------------------- echo


def sentencepiece() -> Any:
    """Llama's kind, with a token for each beginning of two words."""
    words = [*WORDS[:259], *(word[:n] for word in ("▁Hello", "▁world", "▁▁") for n in range(1, len(word) + 1)), *"Helowrd.,"]
    tokens = list(dict.fromkeys(words))
    metadata = {
        "ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": [-float(i) for i in range(len(tokens))],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0,
    }  # fmt: skip
    return tokenizer_from_gguf(Entries(metadata), 100)


def changed() -> Any:
    """One that composes characters and forgets capitals and spaces at both ends, as several models' do."""
    tokenizer = KINDS["bytes"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
    )
    return tokenizer


def echoed(tokenizer: Any, prompt: str | list[int], rows: list[list[int]]) -> Any:
    """The choice that a request with `echo` and `logprobs` gets, each prompt token beside token 7."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    run = Run(tokenizer)
    (seq,) = run.add(ids, SamplingParams(max_tokens=len(rows), output_kind=FINAL_ONLY, logprobs=1, prompt_logprobs=1))
    run.processor.add_logprobs({}, [("r", 1, [position(token, 7) for token in ids[1:]])])
    outputs = [output for row in rows for output in run.step({seq: row[0]}, logprobs={seq: [position(*row)]})]
    request = CompletionRequest(model="m", prompt=prompt, echo=True, logprobs=1)
    return CompletionReply("x", request, {"r": ids}, tokenizer).whole(outputs).choices[0]


PROMPTS = [
    "Hello world", " Hello", "Hello  world", "Hello <s>Hello</s> world", "<s>", "é 你🌶 world", "e\u0301 A\u030a ÉCOLE", " ",
    "\n\n  HELLO\tWorld \n", "\u200d\ufeff a\u0308\u0323", "<|im_start|>user\nHi<|im_end|>", "\ufffd",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", [KINDS["bytes"], sentencepiece, changed])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_echoed_tokens_are_the_echoed_text(make: Any, prompt: str) -> None:
    tokenizer = make()
    world = encode(tokenizer, " world")[-1:] * 2
    ids = tokenizer.encode(prompt) or [5]
    half = encode(tokenizer, "你")[:1]
    for form in (prompt, ids, [*ids, *half]) if tokenizer.encode(prompt) else (ids,):
        choice = echoed(tokenizer, form, [[token, 7] for token in world])
        got = choice.logprobs
        assert "".join(got.tokens) == choice.text
        echo = form if isinstance(form, str) else tokenizer.decode(form, clean_up_tokenization_spaces=False)
        assert choice.text.startswith(echo)
        assert "".join(got.tokens[:-2]) == echo
        assert got.text_offset == [sum(map(len, got.tokens[:i])) for i in range(len(got.tokens))]
        assert got.top_logprobs[0] is got.token_logprobs[0] is None
        for text, logprob, top in zip(got.tokens[1:], got.token_logprobs[1:], got.top_logprobs[1:], strict=True):
            assert top[text] == logprob


def test_echo_leaves_out_what_the_tokenizer_has_put_before_the_text() -> None:
    tokenizer = sentencepiece()
    world = encode(tokenizer, "world")
    assert tokenizer.convert_ids_to_tokens(world) == ["▁world"]
    choice = echoed(tokenizer, "Hello <s>world", [[world[0], 7]])
    assert choice.text == "Hello <s>world world"
    assert choice.logprobs.tokens == ["", "Hello", " ", "<s>", "world", " world"]
    assert choice.logprobs.text_offset == [0, 0, 5, 6, 9, 14]
    changed_tokens = echoed(changed(), "  Émile ÉCOLE", [[5, 7]]).logprobs.tokens
    assert changed_tokens[0].startswith("  É")
    assert "".join(changed_tokens[:-1]) == "  Émile ÉCOLE"
