"""The command line as a person meets it: real processes on a tiny model."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.cli import main
from solutions.core.config import parse_bytes
from solutions.core.engine import LLM

FLAGS = ["--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", "4MiB", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def path(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the command in this process; returns exit code, output and error output."""

    def call(*args: str, stdin: str | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            main(LLM, list(args))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_module_completes_a_prompt_and_closes_with_statistics(path):
    command = [sys.executable, "-m", "solutions.core.engine", "--model", path, "--prompt", "Hello", *FLAGS]
    done = subprocess.run(command, capture_output=True, timeout=120, stdin=subprocess.DEVNULL, check=True)
    assert done.stdout.startswith(b"Hello")
    last = done.stderr.decode().strip().splitlines()[-1]
    for part in ("TTFT", "TPOT", "tok/s", "KV", "prefix hits", "preemptions"):
        assert part in last


def test_streamed_text_is_the_generated_text(path, run):
    code, out, _ = run("--model", path, "--prompt", "Hi", *FLAGS, "--temperature", "0")
    llm = LLM(path, dtype="float32", max_model_len=128, kv_cache_memory_bytes=4 << 20)
    (expected,) = llm.generate("Hi", SamplingParams(temperature=0, max_tokens=8))
    assert code == 0
    assert out == "Hi" + expected.outputs[0].text + "\n"


def test_several_prompts_from_flags_file_and_pipe(path, run, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    code, out, _ = run("--model", path, "--prompt", "zero", "--prompts-file", str(tmp_path / "prompts.txt"), *FLAGS)
    assert code == 0
    assert [line[:7] for line in out.splitlines() if line.startswith("[")] == ["[1] zer", "[2] one", "[3] two"]
    code, out, _ = run("--model", path, *FLAGS, stdin="a\nb\n")
    assert code == 0
    assert "[1] a" in out
    assert "[2] b" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such-model-here"], "no/such-model-here"),
        (["--max-tokens", "0"], "max_tokens must be an integer at least 1"),
        (["--temperature", "nan"], "temperature must be a number"),
        (["--prompts-file", "/no/such/file"], "/no/such/file"),
        (["--num-gpu-blocks-override", "2"], "the KV cache is too small for one sequence of 128 tokens"),
        (["--num-gpu-blocks-override", str(1 << 40)], "the KV cache is larger than the memory"),
        (["--kv-cache-memory-bytes", "9000000GiB"], "; give at most --kv-cache-memory-bytes "),
        (["--preemption-mode", "swap", "--swap-space", "9000000GiB"], "--swap-space 9000000.00 GiB: only "),
    ],
)
def test_problem_is_one_line_and_a_failure(path, run, args, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run("--model", path, "--prompt", "x", *FLAGS, *args)
    assert code != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in err


def test_malformed_thread_count_is_one_line(path, run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    code, _, err = run("--model", path, "--prompt", "x", *FLAGS)
    assert code != 0
    assert "error: OMP_NUM_THREADS must be a positive number, got '4,2'" in err


def test_empty_pipe_says_how_to_give_a_prompt(path, run):
    code, _, err = run("--model", path, *FLAGS, stdin="\n")
    assert code != 0
    assert "--prompt, --prompts-file" in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(LLM, ["--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--max-num-batched-tokens" in text


@pytest.mark.parametrize(
    ("text", "expected"), [("1000", 1000), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), ("4kib", 4096)]
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "x", "5 parsecs", "-1", "1ib"])
def test_sizes_that_mean_nothing_are_refused(text):
    with pytest.raises(Exception, match="not a size"):
        parse_bytes(text)
