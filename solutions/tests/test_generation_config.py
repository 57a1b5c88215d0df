"""`generation_config.json`: how tokens are drawn unless a request says otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from solutions.batching.sampling_params import SamplingParams
from solutions.benchmarks.servers import as_flags, running_server
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.generation_files import with_sampling
from solutions.models.loader import resolve_model
from solutions.tests.real_server import stopped
from solutions.tests.tiny_models import EOS

FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 9}
SETTINGS = {"dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 8}
PROMPT = [5, 9, 40, 41]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose makers recommend `FILE`."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    say(folder, FILE | {"eos_token_id": [EOS, 7]})
    return folder


def say(folder: Path, entries: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(entries))
    return folder


def defaults(folder: Path, source: str = "auto", override: Any = None) -> SamplingParams:
    return SamplingParams(**with_sampling(resolve_model(str(folder)).config, source, override).sampling)


def test_each_entry_is_what_transformers_reads(model: Path) -> None:
    read = GenerationConfig.from_pretrained(model)
    made = defaults(model)
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        assert getattr(made, name) == getattr(read, name) == FILE[name], name
    assert made.max_tokens == read.max_new_tokens == FILE["max_new_tokens"]
    assert made == replace(SamplingParams(), **{k: getattr(made, k) for k in ("temperature", "top_p", "top_k")},
                           repetition_penalty=1.05, max_tokens=9)  # fmt: skip


def test_where_defaults_come_from(model: Path, tmp_path: Path) -> None:
    other = say(tmp_path / "other", {"min_p": 0.1, "top_k": None, "eos_token_id": [8]})
    assert defaults(model, "vllm") == SamplingParams()
    assert defaults(model, str(other)) == SamplingParams(min_p=0.1)
    assert defaults(model, "vllm", '{"temperature": 0.5}') == SamplingParams(temperature=0.5)
    assert defaults(model, "auto", {"top_k": 3, "max_new_tokens": 2}) == replace(defaults(model), top_k=3, max_tokens=2)
    assert defaults(model, "auto", '{"temperature": null, "top_k": null}') == replace(defaults(model), temperature=1.0, top_k=0)
    config = resolve_model(str(model)).config
    assert config.eos_token_ids == with_sampling(config, "vllm", None).eos_token_ids == (EOS, 7)
    assert with_sampling(config, str(other), None).eos_token_ids == (EOS, 7, 8)


def test_a_zero_is_said_and_a_null_is_not(model: Path) -> None:
    say(model, {"temperature": 0, "top_k": -1, "min_p": 0.0, "top_p": None, "max_new_tokens": None, "eos_token_id": None})
    assert defaults(model) == SamplingParams(temperature=0, top_k=-1)
    assert defaults(model, "auto", {"temperature": 0.0}).greedy
    say(model, FILE)
    assert defaults(model, "auto", {"temperature": 0, "top_k": 0}) == replace(defaults(model), temperature=0, top_k=0)
    assert resolve_model(str(model)).config.eos_token_ids == (EOS,)


@pytest.mark.parametrize("eos", ["</s>", [[EOS]], 2.0, True, {"id": EOS}, [EOS, "7"]])
def test_ends_of_another_kind_are_refused_by_name(model: Path, eos: Any) -> None:
    say(model, {"eos_token_id": eos})
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id must be a token id or a list of them"):
        resolve_model(str(model))


@pytest.mark.parametrize(
    ("file", "source", "override", "message"),
    [
        ({"temperature": -1}, "auto", None, "generation_config.json: temperature must be .* --generation-config vllm"),
        ({"top_p": "high"}, "auto", None, "generation_config.json: top_p must be"),
        ({"temperature": float("nan")}, "auto", None, "generation_config.json: temperature must be"),
        ({"temperature": True}, "auto", None, "generation_config.json: temperature must be"),
        ({"top_k": [5]}, "auto", None, "generation_config.json: top_k must be"),
        ({"top_k": -2}, "auto", None, "generation_config.json: top_k must be"),
        ({"max_new_tokens": 0}, "auto", None, "generation_config.json: max_tokens must be"),
        (FILE, "nowhere", None, "--generation-config nowhere: there is no .* takes auto, vllm or a folder"),
        (FILE, "auto", "{", "--override-generation-config is not valid JSON"),
        (FILE, "auto", '{"eos_token_id": 3}', "--override-generation-config must be an object with any of temperature"),
        (FILE, "auto", "[]", "--override-generation-config must be an object"),
        (FILE, "auto", '{"top_k": 1.5}', "--override-generation-config: top_k must be an integer"),
    ],
)
def test_what_cannot_be_is_refused_before_the_weights_are_read(
    model: Path, file: dict[str, Any], source: str, override: str | None, message: str
) -> None:
    say(model, file)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        LLM(str(model), **SETTINGS, generation_config=source, override_generation_config=override)


def test_a_damaged_default_is_no_harm_to_those_who_do_without(model: Path) -> None:
    say(model, {"temperature": -1})
    assert defaults(model, "vllm") == SamplingParams()


def test_calls_without_parameters_draw_as_the_model_says(model: Path) -> None:
    say(model, {"temperature": 3.0, "top_k": 1, "max_new_tokens": 5})
    llm = LLM(str(model), **SETTINGS)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=3.0, top_k=1, max_tokens=5)
    assert any("top_k 1" in line for line in llm.llm_engine.startup_summary())
    (drawn,) = llm.generate({"prompt_token_ids": PROMPT}, use_tqdm=False)
    (likeliest,) = llm.generate({"prompt_token_ids": PROMPT}, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert drawn.outputs[0].token_ids == likeliest.outputs[0].token_ids
    chat = [{"role": "user", "content": "a"}]
    assert len(llm.chat(chat, use_tqdm=False)[0].outputs[0].token_ids) == 5
    said = SamplingParams(temperature=3.0, max_tokens=16, seed=1, ignore_eos=True)
    (own,) = llm.generate({"prompt_token_ids": PROMPT}, said, use_tqdm=False)
    assert len(own.outputs[0].token_ids) == 16
    assert own.outputs[0].token_ids[:5] != likeliest.outputs[0].token_ids


@pytest.fixture(scope="module")
def client(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server whose model recommends a temperature of 3, five tokens and, by a flag, the likeliest token."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny_llama, folder)
    say(folder, {"temperature": 3.0, "top_k": 50, "max_new_tokens": 5})
    flags = SETTINGS | {"model": str(folder), "override_generation_config": '{"top_k": 1}', "served_model_name": "tiny"}
    with running_server(*as_flags(flags)) as (server, url):
        with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
            yield client
        assert stopped(server) == ""


@pytest.mark.slow
def test_requests_draw_as_the_model_says(client: openai.OpenAI, tiny_llama: Path) -> None:
    import torch

    oracle = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0
    )
    ask = {"model": "tiny", "prompt": PROMPT, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    answer = client.completions.create(**ask)
    assert answer.choices[0].token_ids == oracle[0, len(PROMPT) :].tolist()
    assert client.completions.create(**ask, max_tokens=7).usage.completion_tokens == 7
    free = {"extra_body": ask["extra_body"] | {"top_k": 0}}
    texts = {tuple(client.completions.create(**ask | free, seed=seed).choices[0].token_ids) for seed in range(3)}
    assert len(texts) == 3
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "extra_body": {"ignore_eos": True}}
    assert client.chat.completions.create(**chat).usage.completion_tokens == 5
    assert client.chat.completions.create(**chat, max_completion_tokens=3).usage.completion_tokens == 3
    response = client.responses.create(model="tiny", input="a", top_p=0.5)
    assert (response.temperature, response.top_p) == (3.0, 0.5)
    assert response.usage.output_tokens <= 5
