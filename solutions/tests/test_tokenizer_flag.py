"""`--tokenizer`: the tokenizer of another folder or hub id, with the model's own weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from solutions.batching.sampling_params import SamplingParams, StructuredOutput
from solutions.core import cli
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.loader import load_tokenizer, resolve_model, with_tokenizer
from solutions.tests.tiny_models import make_tiny_llama

VOCAB_SIZE = 259
PARAMS = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(folder, vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bytes in the opposite order, and one token more than the model has: "zebra", whose id is 259."""
    folder = tmp_path_factory.mktemp("other")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens(["zebra"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def engine(model: Path, **settings: Any) -> LLM:
    return LLM(str(model), dtype="float32", max_model_len=64, num_gpu_blocks_override=8, **settings)


@pytest.fixture(scope="module")
def llm(model: Path, other: Path) -> LLM:
    return engine(model, tokenizer=str(other))


def test_prompts_and_answers_are_read_with_it(llm: LLM, model: Path, other: Path) -> None:
    right, wrong = (AutoTokenizer.from_pretrained(folder) for folder in (other, model))
    output = llm.generate("Grüße", PARAMS, use_tqdm=False)[0]
    assert output.prompt_token_ids == right("Grüße")["input_ids"] != wrong("Grüße")["input_ids"]
    assert output.outputs[0].text == right.decode(output.outputs[0].token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["zebra", "a zebra here"])
def test_a_token_that_the_model_lacks_is_refused(text: str, llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"259 is not a token id; the vocabulary is 0 \.\. 258"):
        llm.generate(text, PARAMS, use_tqdm=False)
    llm.generate("a horse", PARAMS, use_tqdm=False)  # the engine is whole


def test_an_answer_of_a_given_form_leaves_that_token_out(llm: LLM) -> None:
    choice = StructuredOutput("choice", '["zebra"]')
    params = SamplingParams(max_tokens=8, temperature=0.0, structured_output=choice)
    assert llm.generate("a", params, use_tqdm=False)[0].outputs[0].text == "zebra"  # letter by letter


def test_a_model_without_a_tokenizer_gets_one(model: Path, other: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    source = resolve_model(str(bare))
    assert load_tokenizer(source) is None
    assert load_tokenizer(with_tokenizer(source, str(other)))("zebra")["input_ids"] == [259]


def test_a_hub_id_fetches_no_weights(model: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(other)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = with_tokenizer(resolve_model(str(model)), "some/tokenizer")
    assert load_tokenizer(source)("zebra")["input_ids"] == [259]
    assert [hub_id for hub_id, _ in asked] == ["some/tokenizer"]
    assert not any("safetensors" in pattern for _, patterns in asked for pattern in patterns)


def test_a_tokenizer_that_is_not_there_is_one_clear_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    source = resolve_model(str(model))
    file = tmp_path / "file"
    file.touch()
    for name, problem in {
        str(tmp_path / "nowhere"): "there is no such folder",
        str(file): "there is no such folder",
        "": "there is no such folder",
        str(tmp_path): "there is none of tokenizer.json",
        "some/tokenizer": r"cannot fetch some/tokenizer from the Hugging Face hub \(no network\)",
    }.items():
        with pytest.raises(ModelError, match=problem) as caught:
            with_tokenizer(source, name)
        assert "--tokenizer" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match=r"^error: --tokenizer /no/such: there is no such folder"):
        cli.main(LLM, ["--model", str(model), "--tokenizer", "/no/such", "--prompt", "x"])
