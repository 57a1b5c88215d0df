"""Perplexity and size of one model in several precisions, on text that calibration has not seen.

Measured are the model's own precision, --quantization int8 and int4, --kv-cache-dtype int8, and 4-bit checkpoints that are made
on the spot: rounded to nearest (RTN), GPTQ and AWQ. Making them takes minutes each; --folder keeps them.

The text is the language reference that comes with Python, as `help()` shows it (the topics of ``pydoc_data``, PSF licence):
natural English on every machine, nothing to download. It is cut into pieces; every sixth is held out, the others calibrate.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ..batching.sampling_params import SamplingParams
from ..core.config import DEFAULT_MODEL
from ..core.engine import LLM
from ..quantization import awq, gptq
from ..quantization.rtn import write_rounded
from ..quantization.texts import cut_text
from .report import Flags, Parser, finish, one_line_errors, say, show_table, tracked

CAPTION = (
    "The default model's weights come from a file of 4 bits in groups of 32, which int4 gives back nearly as they are; "
    "RTN, GPTQ and AWQ take other groups, on which that file's values do not lie."
)


def perplexity(llm: LLM, texts: list[list[int]]) -> float:
    """exp of the mean negative log-probability of each token after those before it."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in texts], params, use_tqdm=False)
    pairs = [pair for output in outputs for pair in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]
    return math.exp(-statistics.fmean(entry[token].logprob for token, entry in pairs))


def make_models(args: Flags, folder: Path, text: str) -> dict[str, dict[str, Any]]:
    """Make the 4-bit models that are not there yet; name → arguments of the engine."""
    calibration = folder / "calibration.txt"
    calibration.write_text(text)
    methods = {"RTN": None, "GPTQ": (gptq, []), "GPTQ, act-order": (gptq, ["--act-order"]), "AWQ": (awq, [])}
    settings = {}
    for size, (name, method) in itertools.product(args.groups, methods.items()):
        target = folder / f"{name.lower().replace(', ', '-')}-{size}"
        settings[f"{name}, groups of {size}"] = {"model": str(target)}
        if (target / "config.json").is_file():
            continue
        say(f"{name}, groups of {size}")
        if method is None:
            write_rounded(args.model, target, size)
        else:
            module, flags = method
            module.main([
                "--model", args.model, "--group-size", str(size), "--calibration-file", str(calibration), "--num-samples",
                str(args.num_samples), "--sequence-length", str(args.length), "--output", str(target), *flags,
            ])  # fmt: skip
    return settings


def show(model: str, runs: list[dict[str, Any]]) -> None:
    base = runs[0]["perplexity"]
    gaps = {run["name"]: math.log(run["perplexity"] / base) for run in runs}
    rows = []
    for name, value, weight_bytes in (run.values() for run in runs):
        method, _, size = name.partition(", groups of ")
        rounded = gaps.get(f"RTN, groups of {size}") if method.startswith(("GPTQ", "AWQ")) else None
        closed = "" if rounded is None else f"{1 - gaps[name] / rounded:.0%}"
        weights = f"{weight_bytes / 2**20:.0f}"
        rows.append([name, f"{value:.3f}", f"{value / base - 1:+.2%}", f"{gaps[name]:.4f}", closed, weights])
    columns = ["precision", "perplexity", "more", "nats a token more", "of RTN's gap closed", "MiB of weights"]
    show_table(f"{model} on Python's documentation", columns, rows, CAPTION)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("quality", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "alias or folder of a LLaMA or Mistral")
    parser.add_flag("--groups", [64, 128], "group sizes")
    parser.add_flag("--pieces", 24, "pieces of held-out text")
    parser.add_flag("--length", 512, "tokens of a piece, at least 2")
    parser.add_flag("--num-samples", 64, "pieces of calibration text")
    parser.add_argument("--folder", type=Path, help="where the 4-bit models are kept and, if there, taken from")
    args = parser.parse_args(argv)
    if args.length < 2:
        parser.error(f"--length must be at least 2, got {args.length}")
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        held_out, text = cut_text(args.model, args.length, args.pieces)
        own = {"16 bits": {}, "int8 KV cache": {"kv_cache_dtype": "int8"}}
        own |= {"int8": {"quantization": "int8"}, "int4, groups of 32": {"quantization": "int4"}}
        settings = {name: {"model": args.model, **flags} for name, flags in own.items()} | make_models(args, folder, text)
        runs, length = [], max(map(len, held_out)) + 1
        for name, arguments in tracked(settings.items(), "precisions", len(settings)):
            llm = LLM(**arguments, max_model_len=length, enable_prefix_caching=False)
            size = llm.llm_engine.executor.weight_bytes  # of the whole model as loaded
            runs.append({"name": name, "perplexity": perplexity(llm, held_out), "weight_bytes": size})
            del llm  # its memory is for the next one
    show(args.model, runs)
    tokens = sum(len(piece) - 1 for piece in held_out)
    finish(args, "quality", {"tokens": tokens, "runs": runs})


if __name__ == "__main__":
    main()
