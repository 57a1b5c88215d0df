"""The engine on the command line: it completes prompts from flags, a file or a pipe, or chats in a terminal, and says what it
has started with."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..attention.hybrid_manager import blocks_of_one
from ..batching.sampling_params import SamplingParams
from ..models.config.model_config import ModelConfig
from .config import EngineConfig, add_engine_flags, config_from_flags
from .input import Prompt
from .output import RequestOutput
from .platform.machine import format_bytes
from .startup import Limits
from .text.chat_template import render_chat

EPILOG = """examples:
  complete one prompt; the text appears as it is generated
    python -m solutions.core.engine --prompt "The capital of France is"
  complete many prompts in one batch, one prompt per line
    python -m solutions.core.engine --prompts-file prompts.txt --max-tokens 64
    cat prompts.txt | python -m solutions.core.engine
  chat
    python -m solutions.core.engine
  see what happens when memory runs out: few KV blocks, swapping
    python -m solutions.core.engine --prompts-file prompts.txt --max-model-len 256 \\
      --num-gpu-blocks-override 24 --preemption-mode swap
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m solutions.core.engine", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Complete prompts with the engine. Without a prompt, in a terminal, chat with the model.",
    )  # fmt: skip
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    group.add_argument("--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt per line")
    group.add_argument("--max-tokens", type=int, default=128, help="maximum number of tokens to generate (default: 128)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    group.add_argument(
        "--top-p", type=float, default=1.0,
        help="sample from the most likely tokens whose probabilities add up to this (default: 1, all tokens)",
    )  # fmt: skip
    group.add_argument("--top-k", type=int, default=0, help="sample from this many most likely tokens (default: 0, all tokens)")
    group.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    add_engine_flags(parser)
    return parser


def main(make_llm: Callable[..., Any], argv: list[str] | None = None) -> None:
    """Entry point of ``python -m solutions.core.engine``. After an error it prints one line and exits with 1.

    Args:
        make_llm: `LLM`, which stands above this file.
    """
    args = _parser().parse_args(argv)
    try:
        prompts = _prompts(args)
        params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
        llm = make_llm(**config_from_flags(args).to_args())
        for line in llm.llm_engine.startup_summary():
            print(line, file=sys.stderr)
        if prompts is None:
            _chat(llm, params, args.system)
        else:
            _complete(llm, prompts, params)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _prompts(args: argparse.Namespace) -> list[str] | None:
    """Prompts from flags, file or pipe; None: there are none, and standard input is a terminal."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += [line for line in args.prompts_file.read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{args.prompts_file} holds no prompts; write one per line")
    elif not prompts:
        if sys.stdin.isatty():
            return None
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not prompts:
            raise ValueError("no prompt: use --prompt, --prompts-file, or pipe one prompt per line into standard input")
    return prompts


def _complete(llm: Any, prompts: list[str], params: SamplingParams) -> None:
    start = time.perf_counter()
    if len(prompts) == 1:
        outputs = [_stream(llm.llm_engine, prompts[0], params, show_prompt=True)]
    else:
        outputs = llm.generate(prompts, params)
        for number, output in enumerate(outputs, 1):
            print(f"[{number}] {output.prompt}{output.outputs[0].text}\n")
    print(_statistics(llm.llm_engine, outputs, time.perf_counter() - start), file=sys.stderr)


def _stream(engine: Any, prompt: Prompt, params: SamplingParams, show_prompt: bool) -> RequestOutput:
    """Generate one sequence and print its text as it comes.

    Returns:
        The last output, with the whole text.
    """
    engine.add_request("stream", prompt, params)
    if show_prompt:
        print(prompt, end="", flush=True)
    shown = 0
    last: RequestOutput | None = None
    try:
        while engine.has_unfinished_requests():
            for last in engine.step():
                text = last.outputs[0].text
                print(text[shown:], end="", flush=True)
                shown = len(text)
    finally:
        engine.abort_request("stream")
    print()
    assert last is not None  # a request has at least one output
    return last


def _chat(llm: Any, params: SamplingParams, system: str | None) -> None:
    tokenizer = llm.get_tokenizer()
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("this model has no chat template; use --prompt")
    messages = [{"role": "system", "content": system}] if system else []
    print("Chat with the model; an empty line or Ctrl-D ends it.", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        messages.append({"role": "user", "content": text})
        start = time.perf_counter()
        try:
            token_ids = render_chat(tokenizer, messages)
            output = _stream(llm.llm_engine, {"prompt_token_ids": token_ids}, params, show_prompt=False)
        except ValueError as error:  # the conversation outgrew the context, say
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": output.outputs[0].text})
        print(_statistics(llm.llm_engine, [output], time.perf_counter() - start), file=sys.stderr)


def _statistics(engine: Any, outputs: list[RequestOutput], seconds: float) -> str:
    """One line: latency, rate, cache."""
    num_tokens = sum(len(o.token_ids) for output in outputs for o in output.outputs)
    first, decode = [], []
    for output in outputs:
        metrics, count = output.metrics, len(output.outputs[0].token_ids)
        assert metrics.first_token_time is not None
        assert metrics.last_token_time is not None
        first.append(metrics.first_token_time - metrics.arrival_time)
        if count > 1:
            decode.append((metrics.last_token_time - metrics.first_token_time) / (count - 1))
    stats = engine.stats()
    tpot = f"TPOT {1e3 * sum(decode) / len(decode):.1f} ms, " if decode else ""
    return (
        f"TTFT {1e3 * sum(first) / len(first):.0f} ms, {tpot}{num_tokens} tokens in {seconds:.2f} s = "
        f"{num_tokens / seconds:.1f} tok/s, KV peak {100 * stats.peak_kv_cache_usage:.1f} %, prefix hits "
        f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} tokens, {stats.num_preemptions} preemptions"
    )


def place(device: torch.device) -> str:
    """What computes: a GPU's name, or the number of threads."""
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)


def startup_report(config: EngineConfig, model: ModelConfig, limits: Limits, seconds: dict[str, float]) -> list[str]:
    """A few lines for the terminal: what runs where, what fits, how long each phase took."""
    where, attention = place(limits.device), limits.attention_backend
    precision = str(limits.dtype).removeprefix("torch.")
    tokens = limits.num_blocks * config.block_size // len(model.windows)
    one = blocks_of_one(model.windows, limits.max_model_len, config.block_size, limits.max_num_batched_tokens)
    blocks = f"{limits.num_blocks} blocks of {config.block_size} tokens in {format_bytes(limits.kv_bytes)}"
    prefix_cache = "on" if config.enable_prefix_caching else "off"
    kernels = "PyTorch's and Triton's" if attention == "triton" else limits.choice.why
    step = f"{config.max_num_seqs} sequences and {limits.max_num_batched_tokens} tokens a step"
    return [
        f"model     {config.model}, {precision}, {format_bytes(limits.weight_bytes)} of weights, {where}",
        f"kernels   {kernels}; attention by the {attention} backend",
        "KV cache  none: an encoder reads a text in one step"
        if limits.kv_bytes == 0
        else f"KV cache  {blocks}: {tokens} tokens, {limits.num_blocks / one:.1f} sequences of {limits.max_model_len}",
        f"limits    {step}; prefix cache {prefix_cache}, {config.scheduling_policy}, preemption by {config.preemption_mode}",
        *([f"tier      {config.kv_offload}, {format_bytes(config.kv_offload_size)}"] if config.kv_offload else []),
        *([f"transfer  {config.kv_transfer_config}"] if config.kv_transfer_config else []),
        *([f"drafts    {config.speculative_config}"] if config.speculative_config else []),
        *(["defaults  " + ", ".join(f"{name} {value}" for name, value in model.sampling.items())] if model.sampling else []),
        "start     " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()),
    ]
