"""The scaling benchmark on models that start in no time, and the computed model of GPUs against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solutions.benchmarks import scaling as command
from solutions.benchmarks.scaling import RankTime, medians, possible_ranks
from solutions.benchmarks.timing import write_shape
from solutions.core.platform.machine import available_cores
from solutions.models.costs.roofline import CARDS, decode_cost
from solutions.models.costs.scaling import LINKS, LLAMA_70B, Link, direct_seconds, predict_decode, ring_seconds, speedup
from solutions.models.loader import resolve_model
from solutions.tests.tiny_models import make_tiny_llama


@pytest.mark.slow
@pytest.mark.skipif(available_cores() < 2, reason="two ranks need two cores")
def test_it_measures_ranks_and_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_llama(tmp_path, max_position_embeddings=128)
    monkeypatch.setattr(command, "COLLECTIVE_SIZES", [4, 1 << 16])
    monkeypatch.setattr(command, "COLLECTIVE_REPEATS", 3)
    out = tmp_path / "scaling.json"
    flags = f"--model {tmp_path} --ranks 2 1 --batches 2 --context 40 --prompt 20 --steps 4 --repeats 1 --output-json {out}"
    command.main(flags.split())
    results = json.loads(out.read_text())["results"]
    assert [(t["ranks"], t["what"], t["batch"]) for t in results["steps"]] == [
        (1, "decode", 2), (1, "prefill", 1), (2, "decode", 2), (2, "prefill", 1),
    ]  # fmt: skip
    assert all(t["seconds"] > 0 for t in results["steps"])
    assert [t["communication"] > 0 for t in results["steps"]] == [False, False, True, True]
    assert [(t["method"], t["bytes"]) for t in results["collectives"]] == [
        (method, size) for method in ("ring", "gloo", "shared memory") for size in (4, 1 << 16)
    ]
    assert [t["sent"] for t in results["collectives"]] == [4, 1 << 16] * 3  # of two ranks: 2n(p − 1)/p = n
    assert "as fast" in capsys.readouterr().out


def test_medians_are_of_each_figure_and_kind() -> None:
    measured = ((1, 3.0, 0.0), (2, 2.0, 0.5), (1, 1.0, 0.0), (2, 4.0, 0.1), (1, 2.0, 0.0))
    runs = [RankTime(ranks, "decode", 1, 5.0, seconds, share, 1 / seconds, None) for ranks, seconds, share in measured]
    assert medians(runs) == [
        RankTime(1, "decode", 1, 5.0, 2.0, 0.0, 0.5, None),
        RankTime(2, "decode", 1, 5.0, 3.0, 0.3, 0.375, None),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "4096"], "error: --ranks 4096: this machine has fewer devices"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--context", "48", "--steps", "24"], "--context must be more than twice --steps"),
        (["--model", "no/such/model/here", "--ranks", "1"], "error: there is no model"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(flags)
    said = f"{stopped.value} {capsys.readouterr().err}"
    assert message in said


def test_the_shape_has_a_billion_weights(tmp_path: Path) -> None:
    model = resolve_model(str(write_shape(tmp_path)), "dummy").config
    assert 1.0e9 < decode_cost(model, 1, 1).weight_bytes / 2 < 1.1e9  # the embedding is not among them
    assert possible_ranks([1, 4096]) == [1]


# The computed model


def test_a_ring_by_hand() -> None:
    """Four ranks, 8 bytes, a link of 4 bytes and 0.1 s a message: six messages of 2 bytes."""
    assert ring_seconds(8, 4, Link("", 4.0, 0.1)) == pytest.approx(6 * (0.1 + 0.5))
    assert ring_seconds(8, 1, Link("", 4.0, 0.1)) == 0


def test_a_direct_sum_by_hand() -> None:
    """Four ranks: a flag, then three vectors of 8 bytes."""
    assert direct_seconds(8, 4, Link("", 4.0, 0.1)) == pytest.approx(0.2 + 6)
    assert direct_seconds(8, 1, Link("", 4.0, 0.1)) == 0


@pytest.mark.parametrize("batch", [8, 4096])  # so small that latency decides, so large that bytes do
def test_a_prediction_by_hand(batch: int) -> None:
    card, link = CARDS[0], LINKS[0]
    whole = decode_cost(LLAMA_70B, batch, 1)
    got = predict_decode(LLAMA_70B, batch, 1, 4, card, link)
    products = max(whole.weight_bytes / 4 / card.bandwidth, whole.product_operations / 4 / card.rate)
    assert got.compute == pytest.approx(products + whole.kv_bytes / 4 / card.bandwidth, rel=1e-6)
    size = batch * 8192 * 2
    one = 2 * 3e-6 + 3 * size / 300e9 if batch == 8 else 6 * (3e-6 + size / 4 / 300e9)
    assert got.communication == pytest.approx((2 * 80 + 2) * one)
    assert got.fits
    assert not predict_decode(LLAMA_70B, 8, 1000, 1, card, link).fits
    assert predict_decode(LLAMA_70B, 8, 1000, 1, card, link).communication == 0


def test_more_ranks_than_kv_heads_share_keys() -> None:
    """Beyond eight ranks a rank's keys and values no longer get fewer."""
    slow = LINKS[0]
    at = [predict_decode(LLAMA_70B, 64, 4000, ranks, CARDS[1], slow).compute for ranks in (8, 16)]
    whole = decode_cost(LLAMA_70B, 64, 4000)
    assert at[0] - at[1] == pytest.approx(whole.weight_bytes / 16 / CARDS[1].bandwidth, rel=1e-3)


def test_speed_up_is_against_the_first() -> None:
    predictions = [predict_decode(LLAMA_70B, 1, 1000, ranks, CARDS[1], LINKS[1]) for ranks in (1, 2, 4, 8)]
    ups = speedup(predictions)
    assert ups[0] == 1
    assert ups == sorted(ups)
    assert all(up < ranks for up, ranks in zip(ups[1:], (2, 4, 8), strict=True))
