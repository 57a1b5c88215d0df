"""What a CPU's layers compute with (``models/kernels/choice.py``), by times that a test writes and by a real measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from solutions.core import cli, startup, worker
from solutions.core.config import EngineConfig
from solutions.core.platform import native
from solutions.models.kernels import choice
from solutions.models.kernels.choice import ROWS, Choice, Way, judge
from solutions.models.loader import ModelSource, resolve_model

if native.load() is None:
    pytest.skip("there are no C++ kernels here", allow_module_level=True)

NARROW, WIDE, TORCH = Way(True, "bfloat16"), Way(True, "float32"), Way(False, "float32")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({TORCH: [3.0, 3.0, 3.0]}, NARROW),
        ({TORCH: [1.0, 1.0, 1.0]}, NARROW),
        ({TORCH: [0.92, 0.92, 0.92]}, NARROW),  # 1.09 times as fast may be noise
        ({TORCH: [0.9, 0.9, 0.9]}, TORCH),
        ({TORCH: [2.0, 0.1, 2.0]}, TORCH),  # slower in two of three, faster all in all
        ({TORCH: [2.0, 0.4, 2.0]}, NARROW),
        ({WIDE: [0.95, 0.95, 0.95], TORCH: [0.9, 0.9, 0.9]}, TORCH),
        ({WIDE: [0.8, 0.8, 0.8], TORCH: [0.75, 0.75, 0.75]}, WIDE),  # not clearly faster than what has displaced the first
    ],
)
def test_the_first_way_stays_unless_another_is_clearly_faster(others: dict[Way, list[float]], chosen: Way) -> None:
    assert judge({NARROW: [1.0, 1.0, 1.0], **others}).way == chosen


def test_the_reason_names_both_and_says_how_much() -> None:
    why = judge({NARROW: [2.0, 4.0, 8.0], TORCH: [1.0, 1.0, 1.0]}).why
    assert why == "PyTorch in float32: 4.0 times as fast as C++ in bfloat16 (2.0, 4.0, 8.0) for 1, 32, 128 tokens"


def model() -> ModelSource:
    return resolve_model("smollm2-135m", "dummy")


@pytest.mark.slow
def test_a_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYOV_CACHE", str(tmp_path))
    seconds = {NARROW: [1.0] * 3, TORCH: [0.5] * 3}
    shapes = []
    monkeypatch.setattr(choice, "measure", lambda ways, *shape: shapes.append(shape) or seconds)
    config = model().config
    first = choice.choose([NARROW, TORCH], config)
    assert first == choice.choose([NARROW, TORCH], config) == judge(seconds)
    assert shapes == [(576, 1536)]  # SmolLM2's

    (file,) = (tmp_path / "native").glob("choice-*.json")
    file.write_text(json.dumps({"way": {"kernels": True}}))  # cut short, or another version's
    assert choice.choose([NARROW, TORCH], config) == first
    choice.choose([TORCH, NARROW], config)
    assert len(shapes) == 3  # another question has an answer of its own


def test_without_a_cache_to_write_to_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    config = model().config
    monkeypatch.setenv("BYOV_CACHE", str(tmp_path / "a file"))
    monkeypatch.setattr(choice, "measure", lambda ways, *shape: {NARROW: [1.0] * 3, TORCH: [0.5] * 3})
    assert choice.choose([NARROW, TORCH], config).way == TORCH


def test_a_measurement_times_the_same_product_by_each_way() -> None:
    seconds = choice.measure([WIDE, TORCH], 64, 32)
    assert list(seconds) == [WIDE, TORCH]
    assert all(len(times) == len(ROWS) and 0 < min(times) <= max(times) < 1 for times in seconds.values())
    weight, x = torch.randn(64, 48), torch.randn(3, 48)
    for number in range(5):
        torch.testing.assert_close(choice._products(WIDE, weight)(x, number), choice._products(TORCH, weight)(x, number))


def limits(monkeypatch: pytest.MonkeyPatch, chosen: Way, **settings: Any) -> tuple[startup.Limits, list[list[Way]]]:
    """What an engine would start with where `chosen` is the fastest, and the ways that were compared."""
    asked = []
    monkeypatch.setattr(startup, "choose", lambda ways, _: asked.append(ways) or Choice(chosen, "as a test says"))
    return startup.resolve_limits(EngineConfig(device="cpu", **settings), model()), asked


def test_an_engine_falls_back_to_what_is_faster_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(worker, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(worker, "cpu_flags", lambda: frozenset({"avx2"}))
    found, asked = limits(monkeypatch, TORCH)
    assert asked == [[NARROW, WIDE, TORCH]]
    assert (found.attention_backend, found.dtype) == ("torch", torch.float32)
    assert not found.settle(EngineConfig()).enable_cpu_kernels
    report = cli.startup_report(EngineConfig(), model().config, found, {})
    assert report[1] == "kernels   as a test says; attention by the torch backend"

    found, asked = limits(monkeypatch, WIDE, dtype="float32")
    assert asked == [[WIDE, TORCH]]  # the type is given
    assert (found.attention_backend, found.settle(EngineConfig()).enable_cpu_kernels) == ("cpu", True)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int8"},
        {"batch_invariant": True},
        {"attention_backend": "cpu"},
        {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 2}'},
        {"enable_cpu_kernels": False},
    ],
)
def test_what_is_asked_for_by_name_is_not_measured(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = limits(monkeypatch, TORCH, **settings)
    assert asked == []
    assert found.settle(EngineConfig()).enable_cpu_kernels is settings.get("enable_cpu_kernels", True)
