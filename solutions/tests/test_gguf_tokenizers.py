"""Tokenizers in GGUF files: how texts are cut by each name that files have for it, what stands around a text, and templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, Qwen2Tokenizer

from solutions.models.gguf_cutting import CUTTINGS
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.gguf_files import cache, tiny_model, write_gguf
from solutions.tests.tiny_models import BOS, CHAT_TEMPLATE, EOS

__all__ = ["cache", "tiny_model"]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("qwen2", "ab12\n\n3 ab", ["ab", "1", "2", "ĊĊ", "3", "Ġ", "ab"]),
        ("dbrx", "ab123ab", ["ab", "1", "2", "3", "ab"]),
        ("gpt-4o", "Ab12'S ab", ["A", "b", "1", "2", "'", "S", "Ġ", "ab"]),
    ],
)
def test_tokenizers_of_other_families(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, pre: str, text: str, expected: list[str]
) -> None:
    tokenizer = load_tokenizer(resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, pre=pre))))
    assert tokenizer.tokenize(text) == expected


def test_qwen2s_cuts_are_those_of_transformers(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    """Where a text is cut before the vocabulary comes in, and that composed and decomposed letters are one."""
    ours = load_tokenizer(resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, pre="qwen2")))).backend_tokenizer
    theirs = Qwen2Tokenizer().backend_tokenizer
    for text in ("I'M 1234 years,\n\n  old!?\r\n\tÄpfel e\u0301te\u0301 中文字 3.14", "don't\u00a0DON'T  x_y ... \u2003z"):
        assert ours.normalizer.normalize_str(text) == theirs.normalizer.normalize_str(text)
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("deepseek-llm", "Ab 12\n\nc-d, 世界é! x  ", "Ab| |1|2|\n|\n|c|-|d|,| |世界|é|!| x|  "),
        ("deepseek-llm", "xա", "x|ա"),  # a letter of two cases that is not in DeepSeek's list
        ("deepseek-coder", "Ab 12\n\nc-d, 世界é! x  ", "Ab| |1|2|\n|\n|c|-|d|,| |世界|é|!| x|  "),
        ("deepseek-coder", "xա", "xա"),
        ("deepseek-v3", "Ab1234 世界b .c!d\n\n e", "Ab|123|4| |世界|b| .|c|!d|\n\n| e"),
        ("seed-coder", "a12!\n b", "a|1|2|!|\n| b"),
        ("deepseek-r1-qwen", "a12!\n b", "a|1|2|!\n| b"),
        ("smaug-bpe", "a1234!\n b", "a|123|4|!\n| b"),
        ("minerva-7b", "a12!\n b", "a|1|2|!|\n| b"),
        ("mellum", "a12!\n b", "a|12|!|\n| b"),
    ],
)
def test_where_texts_are_cut(pre: str, text: str, expected: str) -> None:
    """By hand, pattern after pattern. (Those of DeepSeek were also tried on its real vocabularies.)"""
    pieces = CUTTINGS[pre].words.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == expected.split("|")


@pytest.mark.parametrize(("pre", "whole"), [("tekken", True), ("llama-bpe", True), ("smaug-bpe", False)])
def test_words_that_are_tokens(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, pre: str, whole: bool) -> None:
    """Where a word's token counts before merges, texts also begin with BOS in files that do not say whether they do."""
    path = write_gguf(tmp_path / "a.gguf", tiny_model, pre=pre, merges=["Ċ Ċ"])
    tokenizer = load_tokenizer(resolve_model(str(path)))
    assert tokenizer.tokenize("ab") == (["ab"] if whole else ["a", "b"])
    assert tokenizer("ab")["input_ids"][:-1][:1] == ([BOS] if whole else tokenizer.convert_tokens_to_ids(["a"]))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_what_stands_around_a_text(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, begins: bool, ends: bool) -> None:
    flags = {"tokenizer__ggml__add_bos_token": begins, "tokenizer__ggml__add_eos_token": ends}
    tokenizer = load_tokenizer(resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, **flags))))
    text = tokenizer.convert_tokens_to_ids(["ab"])
    expected = [BOS] * begins + text + [EOS] * ends
    assert tokenizer("ab")["input_ids"] == expected
    assert tokenizer("ab", "ab")["input_ids"] == expected * 2
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == text


def test_named_templates(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    extra = {"tokenizer__chat_template__tool_use": "tools: {{ tools | length }}"}
    tokenizer = load_tokenizer(resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, **extra))))
    assert tokenizer.get_chat_template() == CHAT_TEMPLATE
    assert tokenizer.get_chat_template(tools=[{}]) == "tools: {{ tools | length }}"
