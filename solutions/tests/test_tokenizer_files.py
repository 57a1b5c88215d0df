"""Tokenizers in model folders: SentencePiece's own file against its library, files of every age, code that must not run."""

from __future__ import annotations

import builtins
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from solutions.core import cli
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.models.tokenizer_files import read_tokenizer
from solutions.serving import api_server
from solutions.tests.tiny_models import make_tiny_llama

# --- tokenizer.model alone -------------------------------------------------------------------------------------------

LLAMA2 = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "split_digits": True, "allow_whitespace_only_pieces": True,
}  # fmt: skip
"""How Llama 2's was trained."""
KINDS: dict[str, dict[str, Any]] = {
    "llama2": LLAMA2,
    "own symbols": LLAMA2 | {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "no prefix": LLAMA2 | {"add_dummy_prefix": False},
    "normalized": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "vocab_size": 300},
}
TEXT = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
ODD = [
    "", " ", "   ", " two", "  two  spaces ", "a\nb\n\n  c\t", "é naïve 日本 🙂", "12345 67", "a▁b", "▁a", "<0x0A>", "\r\n",
    "the<|im_end|>the <|im_start|>  the", "ﬁ ½ Ａ",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sp"), **KINDS[request.param])


def train(folder: Path, **settings: Any) -> Path:
    settings = {"vocab_size": 600, "minloglevel": 2} | settings
    prefix = str(folder / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=prefix, **settings)
    return folder


def test_pieces_are_those_of_sentencepiece(trained: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    ours = read_tokenizer(trained, "LlamaForCausalLM", "m")
    draw = random.Random(0)
    noise = ["".join(draw.choices(" ▁etaoin  \n日é🙂1s", k=draw.randint(1, 20))) for _ in range(200)]
    for text in [*ODD, *TEXT, *noise]:
        expected = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        if theirs.unk_id() not in expected:  # SentencePiece writes ⁇ for it
            assert ours.decode(expected) == theirs.decode(expected)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert ours.encode("the") == [theirs.bos_id(), *theirs.encode("the")]


@pytest.fixture
def llama2(tmp_path: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / "tokenizer"), vocab_size=600, minloglevel=2, **LLAMA2
    )
    return tmp_path


def test_files_beside_it_count(llama2: Path) -> None:
    """Vicuna's: a pad token past SentencePiece's pieces, a template, and what begins and ends a prompt."""
    pad = {"__type": "AddedToken", "content": "<pad>", "special": True}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True, "pad_token": pad}
    (llama2 / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 99, "sp_model_kwargs": {}}))
    (llama2 / "added_tokens.json").write_text('{"<pad>": 600}')
    (llama2 / "chat_template.jinja").write_text("{{ messages[0]['content'] }}</s>")
    tokenizer = read_tokenizer(llama2, "LlamaForCausalLM", "m")
    the = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model")).encode("the")
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (600, 99)
    assert tokenizer.encode("the<pad>") == [*the, 600, 2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert chat == [*the, 2]
    (llama2 / "added_tokens.json").write_text('{"<pad>": 601}')
    with pytest.raises(ModelError, match=r"added_tokens.json gives '<pad>' the id 601, but loaded it has 600"):
        read_tokenizer(llama2, "LlamaForCausalLM", "m")


@pytest.mark.parametrize(("legacy", "piece"), [(False, "the"), (True, "▁the")])
def test_space_behind_a_special_token(llama2: Path, legacy: bool, piece: str) -> None:
    (llama2 / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = read_tokenizer(llama2, "LlamaForCausalLM", "m")
    whole = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model")).encode("the", out_type=str)
    cut = whole if legacy else [*"".join(whole).removeprefix("▁")]
    assert "".join(tokenizer.tokenize("</s>the")[1:]) == piece == "".join(cut)


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"aGVsbG8= 0\nd29ybGQ= 1\n", b"PK\x03\x04"])
def test_file_that_is_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"^cannot load the tokenizer of m from .*tokenizer.model is no SentencePiece model[^\n]*$"
    ):
        read_tokenizer(tmp_path, "LlamaForCausalLM", "m")


def test_words_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, vocab_size=100, model_type="word")
    with pytest.raises(ModelError, match="only SentencePiece's BPE and unigram models"):
        read_tokenizer(tmp_path, "LlamaForCausalLM", "m")


# --- files of other ages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in a folder that a test may damage; a question on the terminal fails the test."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    return shutil.copytree(tiny, tmp_path / "model")


def edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()) if path.exists() else {})))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "BrandNewTokenizer"},
        {"tokenizer_class": "BrandNewTokenizerFast"},
        {"tokenizer_class": "TokenizersBackend"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "backend": None},
        {"tokenizer_class": None},
        {"extra_special_tokens": ["<s>", "</s>"]},
        {"extra_special_tokens": {"image_token": "<pad>"}},
        {"something_new": [1, {"a": 2}]},
        {"auto_map": {"AutoTokenizer": ["own.Own", None]}},  # the class is transformers' own
    ],
    ids=str,
)  # fmt: skip
def test_files_that_load_as_they_did(copy: Path, changes: dict[str, Any]) -> None:
    expected = AutoTokenizer.from_pretrained(copy)("a<s>é")["input_ids"]
    edit_json(copy / "tokenizer_config.json", lambda old: old | changes)
    assert load_tokenizer(resolve_model(str(copy)))("a<s>é")["input_ids"] == expected


OWN = {"tokenizer_class": "OwnTokenizer"}
BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "newer version": ("tokenizer.json", lambda old: old | {"version": "2.0"}),
    "newer model": ("tokenizer.json", lambda old: old | {"model": old["model"] | {"type": "SuperBPE"}}),
    "newer normalizer": ("tokenizer.json", lambda old: old | {"normalizer": {"type": "BrandNew"}}),
    "null": ("tokenizer.json", lambda _: None),
    "list": ("tokenizer.json", lambda _: []),
    "id with a gap": ("tokenizer.json", lambda old: old | {"added_tokens": [*old["added_tokens"], added("<x>", 400)]}),
    "added with a gap": ("tokenizer_config.json", lambda old: old | {"added_tokens_decoder": {"400": added("<x>")}}),
    "added elsewhere": ("added_tokens.json", lambda old: {"<x>": 500}),
    "class is a number": ("tokenizer_config.json", lambda old: old | {"tokenizer_class": 5}),
    "extra is a number": ("tokenizer_config.json", lambda old: old | {"extra_special_tokens": 5}),
    "end is a number": ("tokenizer_config.json", lambda old: old | {"eos_token": 7}),
    "length is a list": ("tokenizer_config.json", lambda old: old | {"model_max_length": [1]}),
    "end is a list": ("special_tokens_map.json", lambda old: {"eos_token": [1]}),
    "config is null": ("tokenizer_config.json", lambda _: None),
    "own code": ("tokenizer_config.json", lambda old: old | OWN | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    "own code, old form": ("tokenizer_config.json", lambda old: old | OWN | {"auto_map": ["own.Own", "own.OwnFast"]}),
    "own code elsewhere": (
        "tokenizer_config.json",
        lambda old: old | OWN | {"auto_map": {"AutoTokenizer": ["a/b--own.Own", None]}},
    ),
    "sizes": ("config.json", lambda old: old | {"hidden_size": None}),
    "ends": ("generation_config.json", lambda old: old | {"eos_token_id": "</s>"}),
    "own model": ("config.json", lambda old: old | {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "own.Own"}}),
}


def added(token: str, index: int | None = None) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": token, "special": True} | flags | ({} if index is None else {"id": index})


@pytest.mark.parametrize("case", BROKEN)
def test_folder_that_cannot_be_loaded_is_one_line(copy: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the engine, by the server, and in the chat on a terminal."""
    name, change = BROKEN[case]
    edit_json(copy / name, change)
    (copy / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(resolve_model(str(copy)))
    line = str(caught.value)
    assert "\n" not in line
    assert str(copy) in line
    capsys.readouterr()
    assert api_server.main(["--model", str(copy), "--port", "0", "--dtype", "float32"]) == 1
    assert f"error: {line}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main(LLM, ["--model", str(copy), "--prompt", "a", "--dtype", "float32"])
    assert left.value.code == f"error: {line}"


def test_code_of_the_model_is_not_needed(copy: Path) -> None:
    expected = AutoTokenizer.from_pretrained(copy)("a")["input_ids"]
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    edit_json(copy / "config.json", lambda old: old | {"auto_map": auto_map, "model_type": "own"})
    assert load_tokenizer(resolve_model(str(copy)))("a")["input_ids"] == expected


def test_tokenizer_that_is_only_code(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    edit_json(copy / "tokenizer_config.json", lambda old: old | {"auto_map": {"AutoTokenizer": ["own.Own", None]}})
    with pytest.raises(ModelError, match=r"it is Python code .* which is not run; save it as a tokenizer.json"):
        load_tokenizer(resolve_model(str(copy)))
