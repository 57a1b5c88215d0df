"""The commands that compare systems and measure waits: small runs of the real thing, and servers of others that are made up."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks import compare as compare_command
from benchmarks import latency as latency_command
from solutions.benchmarks import servers
from solutions.benchmarks.datasets import DATASETS, WORKLOADS, Workload, make_requests
from solutions.benchmarks.end_to_end import first_model
from solutions.benchmarks.latency import Limits, Stream, summarise
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import ROOT, serve

PYTHONS = {"vllm": "--model", "sglang": "--model-path"}
"""Servers that are a module of a Python, and how they are told the folder of the model."""

MADE_UP = """#!{python}
import sys
sys.path.insert(0, {root!r})
from solutions.core import engine
from solutions.serving import api_server
from solutions.tests.fake_engine import FakeEngine
engine.LLMEngine = lambda config: FakeEngine()
words = sys.argv[1:]
print("called with", *words, flush=True)
if "broken" in {mode!r}:
    sys.exit(3)
port = words[words.index("--port") + 1]
sys.exit(api_server.main(["--host", "127.0.0.1", "--port", port, "--served-model-name", "fake"]))
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of this name on the path that serves a made-up engine, or breaks; of `PYTHONS` their Python does."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in PYTHONS:
        monkeypatch.delenv(name.upper(), raising=False)

    def write(name: str, mode: str) -> None:
        for file in (name, "python") if name in PYTHONS else (name,):
            path = tmp_path / "bin" / file
            path.write_text(MADE_UP.format(python=sys.executable, root=str(ROOT), mode=mode))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of token ids that the made-up engine knows."""
    monkeypatch.setattr("solutions.benchmarks.datasets.TOKEN_IDS", (10, 250))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program"),
    [("vllm", "vllm"), ("sglang", "sglang"), ("llama.cpp", "llama-server"), ("ik_llama.cpp", "ik-llama-server")],
)
def test_servers_of_others_are_started_and_ended(install: Callable[[str, str], None], name: str, program: str) -> None:
    install(program, "works")
    with servers.start(name, "smollm2-135m") as url:
        assert first_model(url) == "fake"
        (child,) = [each for each in psutil.Process().children() if "--port" in each.cmdline()]
        words = child.cmdline()
    assert not child.is_running()
    model = Path(words[words.index(PYTHONS.get(name, "-m")) + 1])
    assert (model / "config.json").is_file() if name in PYTHONS else model.suffix == ".gguf"


@pytest.mark.slow
def test_a_server_that_breaks_or_is_not_there_is_one_message(
    install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm", "broken")
    with pytest.raises(RuntimeError, match=r"(?s)vllm ended with 3 before it served anything:\ncalled with -m vllm"):
        servers.start("vllm", "smollm2-135m").__enter__()
    monkeypatch.setenv("PATH", "/nowhere")
    for name, known_as in zip(servers.STARTERS, ("vLLM", "SGLang", "llama.cpp", "ik_llama.cpp"), strict=True):
        with pytest.raises(RuntimeError, match=f"^{re.escape(known_as)} is not installed"):
            servers.start(name, "smollm2-135m").__enter__()


@pytest.mark.slow
def test_systems_are_compared(
    few_tokens: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORKLOADS, "W1", Workload("random", 2, 8, 6))
    monkeypatch.setattr(compare_command, "PAUSE", 0)
    file, picture = tmp_path / "compare.json", tmp_path / "compare.svg"
    with serve(FakeEngine()) as url:
        flags = f"--backends bf16 hf --workloads W1 --repeats 2 --url fake={url}/v1 --plot {picture} --output-json {file}"
        compare_command.main(flags.split())
    results = json.loads(file.read_text())["results"]["W1"]
    assert list(results) == ["bf16", "hf", "fake"]
    found = results["hf"]["bf16_over_this"]
    rates = {name: entry["output_tokens_per_second"]["values"] for name, entry in results.items()}
    assert found["values"] == pytest.approx([a / b for a, b in zip(rates["bf16"], rates["hf"], strict=True)])
    assert found["low"] <= found["mean"] <= found["high"]
    assert "ttft_ms_median" in results["fake"]
    printed = capsys.readouterr()
    assert "How many times faster bf16 is" in " ".join(printed.out.split())
    order = [line.split(", ")[1].split(":")[0] for line in printed.err.splitlines() if line.startswith("W1")]
    assert order == ["bf16", "hf", "fake", "fake", "hf", "bf16"]
    assert "<svg" in picture.read_text()


def test_a_server_that_refuses_ends_the_comparison(few_tokens: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "W1", Workload("random", 9, 8, 6))
    with serve(FakeEngine(max_waiting=2)) as url, pytest.raises(SystemExit, match=r"error: .* answers 429"):
        compare_command.main(f"--backends --workloads W1 --url fake={url}/v1".split())


@pytest.mark.slow
def test_waits_are_measured_at_growing_load(few_tokens: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "latency.json", tmp_path / "latency.svg"
    with serve(FakeEngine()) as url:
        flags = f"--url {url}/v1 --num-prompts 12 --input-len 4 --output-len 5 --concurrency 1 4 --rates 50 inf --repeats 2"
        latency_command.main(f"{flags} --plot {picture} --output-json {file}".split())
    results = json.loads(file.read_text())["results"]
    assert [(row["kind"], row["size"]) for row in results["rows"]] == [
        ("users", 1), ("users", 4), ("rate", 50), ("rate", float("inf"))
    ]  # fmt: skip
    for row in results["rows"]:
        assert (row["requests"], row["refused"]) == (24, 0)
        assert row["output_tokens_per_second"] == pytest.approx(5 * row["requests_per_second"])
        assert row["goodput"] == pytest.approx(row["attainment"] * row["requests_per_second"])
        assert row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"] <= row["latency_ms"]["max"]
    assert 20 < results["rows"][2]["requests_per_second"] < 60
    assert "requests a second of those measured" in capsys.readouterr().out
    assert "<svg" in picture.read_text()


def test_refused_requests_are_in_no_average_but_count_against_goodput() -> None:
    streams = [Stream(0.0, [0.5, 1.0], 2), Stream(1.0, [1.5, 4.0], 2), Stream(1.5, error="429")]
    found = summarise(streams, Limits(ttft=1.0, tpot=1.0))
    assert (found["requests"], found["refused"], found["seconds"]) == (3, 1, 4.0)
    assert (found["requests_per_second"], found["output_tokens_per_second"]) == (0.5, 1.0)
    assert (found["attainment"], found["goodput"]) == (1 / 3, 0.25)
    with pytest.raises(ValueError, match="429"):
        summarise(streams[2:], Limits())


def test_conversations_grow_by_what_was_said() -> None:
    requests = make_requests(Workload("chat", 8, 3, 5))
    first, second = requests[:2], requests[2:4]
    assert [len(request.prompt_token_ids) for request in requests] == [3, 3, 11, 11, 19, 19, 27, 27]
    for earlier, later in zip(first, second, strict=True):
        assert later.prompt_token_ids[:3] == earlier.prompt_token_ids
    assert first[0].prompt_token_ids != first[1].prompt_token_ids
    assert len(make_requests(Workload("chat", 7, 3, 5))) == 7


def test_the_same_work_with_other_tokens() -> None:
    one, other = (make_requests(WORKLOADS["W3"], token_seed=seed) for seed in (1, 2))
    sizes = [
        [(len(r.prompt_token_ids), r.output_len) for r in requests] for requests in (one, other, make_requests(WORKLOADS["W3"]))
    ]
    assert sizes[0] == sizes[1] == sizes[2]
    assert not {tuple(r.prompt_token_ids[:16]) for r in one} & {tuple(r.prompt_token_ids[:16]) for r in other}


def test_repetitive_prompts_repeat_a_phrase_of_their_own() -> None:
    for request in (requests := make_requests(Workload("repetitive", 3, 21, 4))):
        ids = request.prompt_token_ids
        assert len(ids) == 21
        assert ids[8:] == ids[:-8]
        assert len(set(ids[:8])) > 4
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 3
    assert len(make_requests(Workload("repetitive", 1, 5, 4))[0].prompt_token_ids) == 5
    assert set(DATASETS) == {"random", "mixed", "shared-prefix", "chat", "repetitive"}


@pytest.mark.parametrize(
    ("command", "flags", "complaint"),
    [
        (compare_command, "--repeats 0", "--repeats must be at least 1"),
        (compare_command, "--url http://x", "--url wants NAME=URL"),
        (compare_command, "--backends", "there is nothing to measure"),
        (latency_command, "--concurrency 0", "--concurrency must be at least 1"),
        (latency_command, "--rates 0", "--rates, --loads and the limits must be above 0"),
        (latency_command, "--url http://x --serve=--help", "--serve is for the server that is started"),
        (latency_command, "--workload W1 --input-len 3", "leave the other workload flags out"),
    ],
)
def test_a_wrong_flag_is_one_line(command: object, flags: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(flags.split())
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert complaint in text
    assert len(text.splitlines()) == 1
