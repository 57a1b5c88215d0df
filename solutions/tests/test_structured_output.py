"""Answers of a given form: the automaton against Python's own readers, with samples, drafts, preemption, and ranks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from solutions.batching.sampling_params import SamplingParams, StructuredOutput
from solutions.core.engine import LLM
from solutions.core.input import InputProcessor
from solutions.core.structured import guide as guide_file
from solutions.core.structured.guide import Guide
from solutions.core.structured.structured_output import GrammarCompiler
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import byte_tokenizer, make_tiny_llama

pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")

MODEL = "smollm2-135m"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["tall", "old", "kind"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS = {
    "json": StructuredOutput("json", json.dumps(PERSON)),
    "json_object": StructuredOutput("json_object"),
    "regex": StructuredOutput("regex", r"\d{3}-[a-f]{2,4}"),
    "choice": StructuredOutput("choice", json.dumps(["red", 'a "quoted" one', "grün 😀", "back\\slash"])),
    "grammar": StructuredOutput("grammar", 'root ::= "(" root ")" | "x"'),
}


def check(name: str, text: str) -> None:
    """Read a whole answer by something that knows nothing of automata."""
    if name in ("json", "json_object"):
        value = json.loads(text)
        assert isinstance(value, dict)
        if name == "json":
            assert list(value) == ["name", "age", "tags"]
            assert isinstance(value["age"], int)
            assert 0 <= value["age"] <= 120
            assert set(value["tags"]) <= {"tall", "old", "kind"}
    elif name == "regex":
        assert re.fullmatch(r"\d{3}-[a-f]{2,4}", text)
    elif name == "choice":
        assert text in json.loads(FORMS["choice"].definition)
    else:
        assert re.fullmatch(r"\(*x\)*", text)
        assert text.count("(") == text.count(")")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, max_model_len=256, num_gpu_blocks_override=64, dtype="float32")


def ask(llm: LLM, **fields: Any) -> list[Any]:
    params = SamplingParams(**{"max_tokens": 80, "seed": 0} | fields)
    return llm.generate("Somebody:", params, use_tqdm=False)[0].outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_whole_answers_have_their_form(llm: LLM, name: str) -> None:
    for output in ask(llm, structured_output=FORMS[name], n=4, temperature=1.2):
        if output.finish_reason == "stop":
            check(name, output.text)
        else:
            assert name in ("json_object", "grammar")  # which have no longest answer


@pytest.mark.parametrize("name", slow_after(1, ["json", "regex", "choice"]))
def test_the_most_likely_token_of_those_that_are_allowed(llm: LLM, name: str) -> None:
    (output,) = ask(llm, structured_output=FORMS[name], temperature=0)
    assert output.finish_reason == "stop"
    check(name, output.text)


def test_requests_beside_it_are_free(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=12)
    form = SamplingParams(temperature=0, max_tokens=60, structured_output=FORMS["json"])
    (alone,) = llm.generate(["The sky is"], plain, use_tqdm=False)
    together = llm.generate(["The sky is", "Somebody:", "The sky is"], [plain, form, plain], use_tqdm=False)
    assert [together[i].outputs[0].token_ids for i in (0, 2)] == [alone.outputs[0].token_ids] * 2
    check("json", together[1].outputs[0].text)


def test_streams_and_log_probabilities(llm: LLM) -> None:
    """Log-probabilities are the model's own: what the form forbids has one all the same."""
    (output,) = ask(llm, structured_output=FORMS["choice"], temperature=0, logprobs=2)
    assert len(output.logprobs) == len(output.token_ids)
    assert any(entry[token].rank > 2 for entry, token in zip(output.logprobs, output.token_ids, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}},
    {"speculative_config": {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 3, "adaptive": False}},
    {"num_gpu_blocks_override": 17, "max_num_seqs": 8},
    {"tensor_parallel_size": 2},
], ids=["ngram", "draft model", "preempted", "two ranks"])  # fmt: skip
def test_what_changes_no_other_answer_changes_none_of_these(llm: LLM, settings: dict[str, Any]) -> None:
    params = [
        SamplingParams(max_tokens=60, seed=i, temperature=float(i % 2), structured_output=form)
        for i, form in enumerate((FORMS["json"], FORMS["regex"], FORMS["choice"], FORMS["json"]))
    ]
    prompts = ["Somebody: {", "A number: 111-ab, 111-ab,", "One of them:", "Somebody else:"]
    expected = llm.generate(prompts, params, use_tqdm=False)
    other = LLM(MODEL, **{"max_model_len": 256, "num_gpu_blocks_override": 64, "dtype": "float32"} | settings)
    got = other.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].text for o in got] == [o.outputs[0].text for o in expected]
    for output, name in zip(got, ("json", "regex", "choice", "json"), strict=True):
        check(name, output.outputs[0].text)
    stats = other.llm_engine.stats()
    if "speculative_config" in settings:
        assert stats.spec_decode_num_draft_tokens > 0
    other.llm_engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"speculative_config": {"method": "ngram", "adaptive": False}}])
def test_an_answer_that_holds_up_the_others_is_cut_off(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_file, "TOKEN_SECONDS", 0.0)
    monkeypatch.setattr(guide_file, "SLACK_SECONDS", 0.0)  # so that any automaton is too slow
    llm = LLM(MODEL, max_model_len=256, num_gpu_blocks_override=64, dtype="float32", **settings)
    plain = SamplingParams(temperature=0, max_tokens=12)
    form = SamplingParams(temperature=0, max_tokens=60, structured_output=FORMS["json"])
    (alone,) = llm.generate(["The sky is"], plain, use_tqdm=False)
    beside, cut = llm.generate(["The sky is", "Somebody:"], [plain, form], use_tqdm=False)
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(cut.outputs[0].token_ids) == 1
    assert cut.outputs[0].text.startswith("{")
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == (
        "length",
        "structured_output takes too long to follow",
    )
    llm.llm_engine.close()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    source = resolve_model(MODEL)
    return GrammarCompiler(load_tokenizer(source), source.config.vocab_size, source.config.eos_token_ids)


def allowed(masks: torch.Tensor, row: int) -> set[int]:
    bits = masks[row][:, None] >> torch.arange(32) & 1
    return set(bits.flatten().nonzero().flatten().tolist())


def test_drafts_on_trial_are_forgotten(compiler: GrammarCompiler) -> None:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    a, b, c, bad = (tokenizer.encode(text)[0] for text in ("a", "b", "c", "z"))
    guide = Guide(compiler.compile(StructuredOutput("regex", "ab?c")))
    masks = torch.empty(4, -(-49152 // 32), dtype=torch.int32)
    guide.allow([[]], masks[:1])
    assert a in allowed(masks, 0)
    assert not {b, c, bad} & allowed(masks, 0)
    guide.allow([[a], [a, b], [a, b, c]], masks[:3])  # b and c on trial
    assert {b, c} <= allowed(masks, 0)
    assert c in allowed(masks, 1)
    assert b not in allowed(masks, 1)
    assert 2 in allowed(masks, 2)  # the end of the sequence
    guide.allow([[a], [a, bad], [a, bad, c]], masks[:3])  # the same again, with a draft that is no good
    assert {b, c} <= allowed(masks, 0)
    guide.allow([[a, c]], masks[:1])  # b was not kept after all
    assert allowed(masks, 0) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (StructuredOutput("json", "{"), "the json is not valid"),
        (StructuredOutput("json", '{"type": 5}'), r'the keyword "type" at \$ must be one of null, boolean'),
        (StructuredOutput("regex", "(("), "the regex is not valid: Regex parsing error at position 3"),
        (StructuredOutput("grammar", "root ::= nope"), 'the grammar is not valid: .*Rule "nope" is not defined'),
        (StructuredOutput("choice", "[]"), "the choice is not valid"),
        (StructuredOutput("choice", r'["\ud800"]'), "the choice is not valid: it holds half of a surrogate pair"),
        (StructuredOutput("regex", r"[\uD800-\uDFFF]"), "the regex is not valid: half of a surrogate pair at character 2"),
        (StructuredOutput("regex", r"\\\ud83d\ude00"), "the regex is not valid: half of a surrogate pair"),
        (StructuredOutput("regex", r"\u{d83d}"), "the regex is not valid: half of a surrogate pair"),
        (StructuredOutput("grammar", r'root ::= "\udC00"'), "the grammar is not valid: half of a surrogate pair"),
        (StructuredOutput("grammar", "root ::= a\na ::= root"), "the grammar is not valid: there is no text of this form"),
    ],
)
def test_a_form_that_is_none_is_one_clear_error(compiler: GrammarCompiler, form: StructuredOutput, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compiler.compile(form)
    assert "/project" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 2}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]}])
def test_what_cannot_be_combined_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} cannot be combined with structured_output"):
        SamplingParams(structured_output=FORMS["regex"], **fields)


def test_wrong_kinds_are_named() -> None:
    StructuredOutput("regex", "x" * 16_384)
    StructuredOutput("json", json.dumps({"description": "x" * 100_000}))  # what bounds a schema is its cost
    with pytest.raises(ValueError, match="the regex has 16385 characters, and at most 16384 may be"):
        StructuredOutput("regex", "x" * 16_385)
    with pytest.raises(ValueError, match="must be one of json, json_object, regex, choice, grammar"):
        StructuredOutput("xml", "x")
    with pytest.raises(ValueError, match="a regex must be a text that is not empty"):
        StructuredOutput("regex")
    with pytest.raises(ValueError, match="must be a StructuredOutput"):
        SamplingParams(structured_output={"json": {}})


def test_where_it_cannot_be_had_it_is_refused() -> None:
    config = resolve_model(MODEL).config
    for tokenizer, reason, message in ((None, None, "this model has no tokenizer"), (byte_tokenizer(), "not so", "not so")):
        processor = InputProcessor(tokenizer, config, 100, 10, reason)
        with pytest.raises(ValueError, match=f"structured_output: {message}"):
            processor.prepare("r", {"prompt_token_ids": [1]}, SamplingParams(structured_output=FORMS["regex"]))


def test_the_engine_goes_on_after_a_bad_form(tmp_path) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), max_model_len=64, num_gpu_blocks_override=16)
    with pytest.raises(ValueError, match="structured_output"):
        llm.generate("x", SamplingParams(structured_output=StructuredOutput("regex", "((")), use_tqdm=False)
    assert llm.generate("x", SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids
