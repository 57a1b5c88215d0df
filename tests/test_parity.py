"""The engine's tokens equal those of transformers, whatever the settings. ``make test-parity`` runs the whole grid."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.tiny_models import FAMILIES, make_tiny
from tests.parity import (
    AXES,
    NUM_TOKENS,
    Oracle,
    Setting,
    check_setting,
    cut_prompts,
    five_best,
    full_grid,
    make_oracle,
    pairwise_grid,
    prompt_lengths,
)

TEXT = (Path(__file__).parent / "data" / "alice.txt").read_text()


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    return resolve_model("smollm2-135m").path


@pytest.fixture(scope="session")
def text_ids() -> list[int]:
    return load_tokenizer(resolve_model("smollm2-135m")).encode(TEXT)


@pytest.fixture(scope="session")
def small_oracle(default_model_path, text_ids) -> Oracle:
    return make_oracle(default_model_path, text_ids, count=16)


@pytest.fixture(scope="session")
def oracle(default_model_path, text_ids) -> Oracle:
    return make_oracle(default_model_path, text_ids)


@pytest.fixture(scope="session", params=[family for family in FAMILIES if family != "llama"])
def tiny_oracle(request, tmp_path_factory) -> Oracle:
    path = tmp_path_factory.mktemp("tiny")
    sizes = {"n_positions" if request.param == "gpt2" else "max_position_embeddings": 640}
    if request.param == "phi3":  # the divisors of short sequences for all
        sizes = {"max_position_embeddings": 2560, "original_max_position_embeddings": 640}
    make_tiny(request.param, path, **sizes)
    return make_oracle(path, list(TEXT.encode()))


def test_pairwise_grid_covers_every_pair():
    settings = pairwise_grid()
    for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2):
        seen = {(getattr(s, a), getattr(s, b)) for s in settings}
        assert seen == set(itertools.product(values_a, values_b))


@pytest.mark.slow
@pytest.mark.parametrize("setting", pairwise_grid(), ids=str)
def test_default_model(small_oracle: Oracle, setting: Setting):
    check_setting(small_oracle, setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", pairwise_grid()[::5], ids=str)
@pytest.mark.parametrize("flags", [{"enable_cpu_kernels": False}, {"enforce_eager": True}], ids=["portable", "eager"])
def test_default_model_without_its_fast_paths(small_oracle: Oracle, setting: Setting, flags: dict[str, bool]):
    """On PyTorch's operators, as where there is no compiler, and with every kernel called from Python."""
    check_setting(small_oracle, setting, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("setting", pairwise_grid(), ids=str)
def test_tiny_models(tiny_oracle: Oracle, setting: Setting):
    check_setting(tiny_oracle, setting)


@pytest.mark.parity
@pytest.mark.parametrize("setting", full_grid(), ids=str)
def test_default_model_whole_grid(oracle: Oracle, setting: Setting):
    check_setting(oracle, setting)


@pytest.mark.parity
@pytest.mark.parametrize("setting", full_grid(), ids=str)
def test_tiny_models_whole_grid(tiny_oracle: Oracle, setting: Setting):
    check_setting(tiny_oracle, setting)


@pytest.mark.slow
def test_bfloat16_differs_only_between_close_tokens(default_model_path, text_ids):
    """After each beginning of an answer of ours, the next token of either is among the other's five best."""
    model = AutoModelForCausalLM.from_pretrained(default_model_path, dtype=torch.bfloat16).eval()
    llm = LLM(str(default_model_path), dtype="bfloat16", max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
    lengths = prompt_lengths(8)
    prompts = cut_prompts(text_ids, [11 * index for index in range(len(lengths))], lengths)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ours = output.outputs[0]
        best = five_best(model, prompt, ours.token_ids).indices.tolist()
        for got, theirs, logprobs in zip(ours.token_ids, best, ours.logprobs, strict=True):
            assert got in theirs
            assert theirs[0] in [token for token, logprob in logprobs.items() if logprob.rank <= 5]
