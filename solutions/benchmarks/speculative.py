"""Speculative decoding against plain decoding, on text that repeats itself, ordinary text and random text.

Tokens a step and speed with drafts from the text itself (n-grams) or a smaller model, against plain decoding of the same
prompts, in turns: as many drafts as pay, and of n-grams also always as many, which shows where speculation loses. With
--eagle-head drafts by a trained head in their place: one token, chains, and trees.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..batching.sampling_params import SamplingParams
from ..core.config import DEFAULT_MODEL
from ..core.eagle.questions import KEPT_BACK
from ..core.engine import LLM
from .report import Parser, drawing, finish, one_line_errors, show_table, tracked
from .timing import grouped, medians

PLAIN, ALWAYS = "plain", {"adaptive": False}
SHAPES = {
    "one token": {"num_speculative_tokens": 1}, "a chain of three": {"num_speculative_tokens": 3},
    "a tree of seven": {"speculative_token_tree": [[0], [0, 0], [0, 0, 0], [1], [2], [0, 1], [1, 0]]},
}  # fmt: skip
"""What a head drafts for each sequence in every step."""
RECORD = '{{"id": {0}, "name": "sensor-{0}", "unit": "celsius", "interval_seconds": 30, "enabled": true}},\n'


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run of `batch` requests at once, by the `method` `PLAIN` or a speculative setting, on a `text` of `TEXTS`:
    tokens a second of all, tokens that one sequence gains in a step it takes part in, on average, and the share of the drafted
    tokens that stayed, None if none were drafted."""

    method: str
    text: str
    batch: int
    tokens_per_second: float
    tokens_per_step: float
    acceptance: float | None


TEXTS = {"repetitive": 0.0, "ordinary": 0.0, "random": 1.5}
"""Kinds of text, and the temperature at which each is sampled; at 1.5 hardly anything can be foreseen."""


def make_prompt(llm: LLM, text: str, index: int) -> list[int]:
    """The beginning of a table of records that are all alike; a question in the model's chat format; or random tokens."""
    if text == "repetitive":
        return llm.get_tokenizer().encode("[\n" + "".join(RECORD.format(10 * index + i) for i in range(6)))
    if text == "ordinary":
        messages = [{"role": "user", "content": KEPT_BACK[index % len(KEPT_BACK)]}]
        return llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return random.Random(index).choices(range(llm.llm_engine.model_config.vocab_size), k=64)


def measure(
    model: str, settings: dict[str, Any], batches: list[int], output_len: int, repeats: int, texts: Any = TEXTS, **engine: Any
) -> Iterator[Row]:
    """Run every text (default: all) at every batch size with each setting in turn, and that several times over; plain decoding
    is one more. `settings` are names and their ``speculative_config``, `engine` the settings of all engines."""
    engines = {name: LLM(model, speculative_config=config, **engine) for name, config in {PLAIN: None, **settings}.items()}
    for llm in engines.values():
        run(llm, "", next(iter(TEXTS)), 1, output_len)  # warm-up
    for _, text, batch, (name, llm) in itertools.product(range(repeats), texts, batches, engines.items()):
        yield run(llm, name, text, batch, output_len)


def run(llm: LLM, method: str, text: str, batch: int, output_len: int) -> Row:
    """Generate four answers at least, so many at once, and time what comes behind the first tokens."""
    prompts = [{"prompt_token_ids": make_prompt(llm, text, index)} for index in range(max(batch, 4))]
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, seed=0, temperature=TEXTS[text])
    before, seconds = llm.llm_engine.stats(), 0.0
    for first in range(0, len(prompts), batch):
        times = [answer.metrics for answer in llm.generate(prompts[first : first + batch], params, use_tqdm=False)]
        seconds += max(each.last_token_time or 0 for each in times) - max(each.first_token_time or 0 for each in times)
    num_tokens = len(prompts) * (output_len - 1)
    after = llm.llm_engine.stats()
    drafted = after.spec_decode_num_draft_tokens - before.spec_decode_num_draft_tokens
    accepted = after.spec_decode_num_accepted_tokens - before.spec_decode_num_accepted_tokens
    each = num_tokens / (num_tokens - accepted)
    return Row(method, text, batch, num_tokens / seconds, each, accepted / drafted if drafted else None)


def summarize(rows: list[Row]) -> list[dict[str, Any]]:
    """Medians of each case, with the speed-up over plain decoding in the same round and its spread."""
    cases, summary = grouped(rows, ("text", "batch", "method")), []
    for (text, batch, method), runs in cases.items():
        plain = cases[text, batch, PLAIN]
        ratios = [run.tokens_per_second / base.tokens_per_second for run, base in zip(runs, plain, strict=True)]
        figures = medians(runs, ("tokens_per_second", "tokens_per_step", "acceptance"))
        gain = {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}
        summary.append({"text": text, "batch": batch, "method": method} | figures | gain)
    return summary


def show(model: str, summary: list[dict[str, Any]]) -> None:
    rows = []
    for case in summary:
        accepted = "" if case["acceptance"] is None else f"{case['acceptance']:.0%}"
        numbers = [f"{case['tokens_per_second']:.0f}", f"{case['tokens_per_step']:.2f}", accepted]
        gain = "" if case["method"] == PLAIN else "{:.2f}x ({:.2f}-{:.2f})".format(case["speedup"], *case["speedup_range"])
        rows.append([f"{case['text']}, batch {case['batch']}", case["method"], *numbers, gain])
    columns = ["text", "method", "tokens/s", "tokens a step", "accepted", "as fast as plain"]
    show_table(f"Speculative decoding, {model}", columns, rows)


def draw(summary: list[dict[str, Any]], path: Path) -> None:
    """Speed-up by batch size, a panel for each kind of text."""
    batches = sorted({case["batch"] for case in summary})
    colours = {PLAIN: "#999999", "ngram": "#0072B2", "ngram, always": "#0072B2", "draft model": "#E69F00", "eagle": "#009E73"}
    colours |= dict(zip((*SHAPES, "eagle, tree"), ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7"), strict=True))
    lines = [(name, colours[name], "x:" if "always" in name else "o-") for name in dict.fromkeys(c["method"] for c in summary)]
    with drawing(path, len(TEXTS), figsize=(9, 3.2), sharey=True) as panels:
        for axes, text in zip(panels, TEXTS, strict=True):
            for method, colour, line in lines:
                points = [case["speedup"] for case in summary if case["text"] == text and case["method"] == method]
                axes.plot(range(len(points)), points, line, color=colour, label=method)
            axes.set(xticks=range(len(batches)), xticklabels=batches, title=f"{text} text", xlabel="requests at once")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("as fast as plain decoding")
        panels[0].legend()


def main(argv: list[str] | None = None) -> None:
    parser = Parser("speculative", __doc__, "the speed-up")
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder")
    parser.add_argument("--draft-model", help="alias or folder (default: the model itself, quantized)")
    parser.add_flag("--draft-quantization", "int8", "quantization of the draft model and of the head; none: its own precision")
    parser.add_argument("--eagle-head", help="folder of a head that was trained for the model: measure only what it drafts")
    parser.add_flag("--draft-tokens", 3, "tokens that the draft model or the head drafts in a step")
    parser.add_flag("--ngram-tokens", 5, "tokens that n-grams draft in a step")
    parser.add_flag("--batches", [1, 4, 16, 32], "requests at once")
    parser.add_flag("--output-len", 96, "tokens of each answer")
    parser.add_flag("--repeats", 3, "runs of each, in turn; medians count")
    parser.add_flag("--dtype", "auto", "the engine's --dtype")
    args = parser.parse_args(argv)
    quantization = None if args.draft_quantization == "none" else args.draft_quantization
    draft = {"num_speculative_tokens": args.draft_tokens, "quantization": quantization}
    ngram = {"method": "ngram", "num_speculative_tokens": args.ngram_tokens}
    settings = {"ngram": ngram, "ngram, always": ngram | ALWAYS}
    settings["draft model"] = draft | {"method": "draft_model", "model": args.draft_model or args.model}
    if args.eagle_head:
        head = {"method": "eagle", "model": args.eagle_head, "quantization": quantization}
        settings = {name: head | shape | ALWAYS for name, shape in SHAPES.items()}
        settings |= {"eagle": draft | head, "eagle, tree": head | SHAPES["a tree of seven"]}
    total = args.repeats * len(TEXTS) * len(args.batches) * (1 + len(settings))
    with one_line_errors():
        runs = measure(
            args.model, settings, args.batches, args.output_len, args.repeats, dtype=args.dtype, max_model_len=1024,
            max_num_seqs=max(args.batches), kv_cache_memory_bytes=512 << 20, enable_prefix_caching=False,
        )  # fmt: skip
        rows = list(tracked(runs, "runs", total))
    summary = summarize(rows)
    show(args.model, summary)
    finish(args, "speculative", {"cases": summary, "runs": [asdict(row) for row in rows]}, partial(draw, summary))


if __name__ == "__main__":
    main()
