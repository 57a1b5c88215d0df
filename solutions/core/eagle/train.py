"""Train a head that drafts for a model, on text that the model writes itself; ``--speculative-config`` then takes the folder.

The model answers questions, and its hidden states are kept. The head learns from them to say the next tokens. Whatever is
interrupted goes on where it was when the same command is given again.

examples:
  python -m solutions.core.eagle.train --output head
  byov serve smollm2-135m --speculative-config '{"method": "eagle", "model": "head", "num_speculative_tokens": 3}'
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...models.heads.eagle import save_head
from ...models.llama import LlamaForCausalLM
from ...models.loader import load_model, resolve_model
from ..config import DEFAULT_MODEL
from ..engine import LLM
from ..platform.machine import pick_threads
from .corpus import PART, load_corpus, write_corpus
from .learner import Learner, Plan, frequent_tokens, new_head

WORK = "training"
"""Folder within the head's in which everything is that only the training needs."""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    text, _, examples = (__doc__ or "").partition("\nexamples:\n")
    parser = argparse.ArgumentParser(
        usage="python -m solutions.core.eagle.train --output FOLDER [flag ...]", description=text,
        epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    usual = Plan()
    numbers: list[tuple[str, Any, str]] = [
        ("--answers", 4096, "answers that the model writes"),
        ("--max-tokens", 160, "longest answer"),
        ("--temperature", 0.8, "of every other answer; the others are greedy"),
        ("--draft-vocab-size", 8192, "tokens that the head can draft, those that the model writes most often"),
        ("--epochs", usual.epochs, "times that the head reads the text"),
        ("--batch", usual.batch, "answers that it reads at once"),
        ("--depth", usual.depth, "tokens of a draft that it is trained for; it may draft more"),
        ("--rate", usual.rate, "highest learning rate"),
        ("--seed", usual.seed, "of the answers and of their order"),
    ]
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the head goes")
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"alias or folder of the target (default: {DEFAULT_MODEL})")
    for name, default, said in numbers:
        parser.add_argument(name, type=type(default), default=default, help=f"{said} (default: {default})")
    flags = parser.parse_args(argv)
    for name, default, _ in numbers:
        value = getattr(flags, name.removeprefix("--").replace("-", "_"))
        if value < (1 if isinstance(default, int) and name != "--seed" else 0):
            parser.error(f"{name} is too small: {value}")
    return flags


def train(flags: argparse.Namespace) -> dict[str, Any]:
    """Write the text, train the head, and save it: what became of it, as `main` prints it.

    Raises:
        ValueError: the model cannot be had, has no chat format or is of a family without heads; or an interrupted run in the
            folder had other flags.
    """
    torch.set_num_threads(pick_threads())
    source = resolve_model(flags.model)
    config = source.config
    if config.architecture != "LlamaForCausalLM" or config.windows != (None,) or config.hidden_act != "silu":
        raise ValueError(f"heads are for models of the LLaMA family, and {flags.model} is a {config.architecture}")
    if config.quantization is not None or source.path is None:
        raise ValueError(
            f"a head is trained beside the weights as they are, and those of {flags.model} are quantized or random"
        )
    work = flags.output / WORK
    _check_same_flags(work / "flags.json", flags)
    _write(flags, work)
    texts = load_corpus(work)
    model = load_model(source, torch.float32, torch.device("cpu"))
    assert isinstance(model, LlamaForCausalLM)  # by its architecture
    plan = Plan(flags.epochs, flags.batch, flags.depth, flags.rate, seed=flags.seed)
    head = new_head(model, frequent_tokens(texts, min(flags.draft_vocab_size, config.vocab_size)))
    learner = Learner(model, head, texts, plan, work / "checkpoint.pt")
    losses = list(_shown("training", learner.train(), learner.num_steps, learner.num_done))
    accepted = learner.accepted()
    save_head(flags.output, learner.finish(), config, model.model.embed_tokens.weight)
    shutil.rmtree(work)
    return {"tokens": sum(len(text.tokens) for text in texts), "accepted": accepted, "loss": losses[-1] if losses else None}


def _write(flags: argparse.Namespace, work: Path) -> None:
    """Write the corpus, or what is missing of it."""
    llm = LLM(flags.model, enable_prefix_caching=False, max_num_seqs=PART, seed=flags.seed, device="cpu")
    if getattr(llm.get_tokenizer(), "chat_template", None) is None:
        raise ValueError(f"{flags.model} has no chat format, in which it would be asked")
    parts = write_corpus(llm, work, flags.answers, flags.max_tokens, flags.temperature, flags.seed)
    for _ in _shown("answers", parts, flags.answers):
        pass
    llm.llm_engine.close()


def _check_same_flags(path: Path, flags: argparse.Namespace) -> None:
    """See that an interrupted run, if there is one, was the same; else note what this one is."""
    mine = {name: value for name, value in vars(flags).items() if name != "output"}
    if path.exists() and (others := json.loads(path.read_text())) != mine:
        name = next(name for name in mine if others.get(name) != mine[name])
        flag = f"--{name.replace('_', '-')} {others.get(name)}"
        raise ValueError(
            f"{path.parent} is of an interrupted run with {flag}; give the same flags to go on with it, or delete the folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine))


def _shown(name: str, items: Iterable[Any], total: int, done: int = 0) -> Iterator[Any]:
    """The items, with a bar on standard error where that is a terminal; a number of an item's own counts as so many."""
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=total, completed=done)
        for item in items:
            bar.advance(task, item if isinstance(item, int) else 1)
            yield item


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    try:
        result = train(flags)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    shares = ", ".join(f"{share:.0%}" for share in result["accepted"])
    print(f"{flags.output}: a head trained on {result['tokens']} tokens")
    print(f"right on texts that were kept back, for each token of a draft whose first ones are: {shares}")


if __name__ == "__main__":
    main()
