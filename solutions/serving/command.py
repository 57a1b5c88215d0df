"""The command ``byov``, which ``pip install .`` puts in place: one word for each program of the project, with vLLM's names."""

from __future__ import annotations

import runpy
import sys

PROGRAMS = {
    "serve": ("solutions.serving.api_server", "serve a model behind the OpenAI API"),
    "chat": ("solutions.core.engine", "chat on this terminal, or complete prompts from flags, a file or a pipe"),
    "run-batch": ("solutions.serving.run_batch", "answer a file of requests in OpenAI's batch format"),
    "doctor": ("solutions.core.doctor", "say what this machine has and what the engine will use"),
}
"""Command, module, help."""
BENCHMARKS = {
    "serving": ("solutions.benchmarks.serving", "256 streams at once to the server, between two runs without it"),
    "overhead": ("solutions.benchmarks.overhead", "what a step costs the host besides the model"),
    "kernels": ("solutions.benchmarks.kernels", "the CPU kernels against this machine's limits and PyTorch's operators"),
    "profile": ("solutions.benchmarks.step_profile", "where a decode step's time goes on a CPU"),
    "prefix": ("solutions.benchmarks.prefix_cache", "what the prefix cache gains, and costs without hits"),
    "speculative": ("solutions.benchmarks.speculative", "speculative decoding against plain decoding"),
    "scaling": ("solutions.benchmarks.scaling", "one model on several GPUs, or cores"),
    "gpu": ("solutions.benchmarks.gpu", "models with random weights on a GPU, against that GPU's limits"),
}
"""What ``byov bench`` measures: likewise."""
WITH_MODEL = ("serve", "chat")
"""Commands whose first argument may be the model."""


def usage(command: str, programs: dict[str, tuple[str, str]]) -> str:
    """The help of a command that leads to others."""
    lines = [f"usage: {command} COMMAND [FLAG ...]", ""]
    lines += [f"  {name:<12} {text}" for name, (_, text) in programs.items()]
    return "\n".join([*lines, "", f"{command} COMMAND --help lists a command's flags."])


def main(argv: list[str] | None = None) -> None:
    """Run the program that the first word names, with the words after it; exits with its exit code."""
    command, words, programs = "byov", list(sys.argv[1:] if argv is None else argv), {**PROGRAMS, "bench": ("", "measure")}
    if words[:1] == ["bench"]:
        command, words, programs = "byov bench", words[1:], BENCHMARKS
    if not words or words[0] in ("-h", "--help"):
        print(usage(command, programs))
        return
    name, rest = words[0], words[1:]
    if name not in programs:
        sys.exit(f"error: {command} knows no command {name!r}\n{usage(command, programs)}")
    if name in WITH_MODEL and rest and not rest[0].startswith("-"):
        rest = ["--model", *rest]
    sys.argv = [f"{command} {name}", *rest]
    runpy.run_module(programs[name][0], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
