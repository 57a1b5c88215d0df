"""Runs the real clients against a real server, and writes what they can do into docs/clients.md.

``make test-clients`` runs all of them, ``ARGS="--only litellm"`` those whose name or script holds the word, and ``--write``
renews their rows of the table. A client whose packages cannot be had here is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from solutions.benchmarks.servers import as_flags, running_server
from solutions.models.loader import resolve_model
from solutions.tests.clients.environments import Client, UnavailableError, catalogue, command
from solutions.tests.clients.table import enter

MODEL = "smollm2-135m"
SETTINGS = {
    "max_model_len": 4096, "kv_cache_memory_bytes": 512 << 20, "enable_tokenizer_info_endpoint": True, "dtype": "float32"
}  # fmt: skip
"""Room for the agents' long instructions; lm-eval asks for the tokenizer. In float32 rounding decides no answer."""
SECONDS = 600
"""Within which a client has to be done."""

Outcomes = dict[str, str | None]
"""Feature → what is wrong, or None."""


@contextmanager
def server(url: str | None = None) -> Iterator[str]:
    """Address of a server with the default model: this one, or a new one."""
    if url:
        yield url
        return
    with running_server(*as_flags(SETTINGS)) as (_, url):
        yield url


def outcomes(client: Client, url: str, *features: str, **variables: str) -> Outcomes:
    """What the client's script finds, and prints on standard error.

    Args:
        features: those to be tried; none: all. variables: of the script's environment, in place of the usual ones.

    Raises:
        UnavailableError: its packages cannot be had here. RuntimeError: the script broke off.
    """
    names = {"CLIENT_URL": url, "CLIENT_MODEL": MODEL, "CLIENT_TOKENIZER": str(resolve_model(MODEL).path)}
    environment = os.environ | names | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"} | variables
    words = [*command(client), *features]
    done = subprocess.run(
        words, cwd=client.folder, env=environment, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature":')]
    if done.returncode or not lines:
        raise RuntimeError(f"{client.script} ended with {done.returncode} after {len(lines)} features")
    return {line["feature"]: line["error"] for line in lines}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-clients", description="Real clients against a real server.")
    parser.add_argument("--only", default="", help="clients whose name or script holds this word")
    parser.add_argument("--write", action="store_true", help="renew docs/clients.md")
    parser.add_argument("--url", help="of a server that runs already, with /v1 (default: start one)")
    asked = parser.parse_args(words)
    chosen = [client for client in catalogue() if asked.only in client.name or asked.only in client.script]
    if not chosen:
        parser.error(f"no client is called {asked.only}; there are {', '.join(client.name for client in catalogue())}")
    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    failed = False
    with server(asked.url) as url, bar:
        task = bar.add_task("", total=len(chosen))
        for client in chosen:
            bar.update(task, description=client.name)
            record: dict[str, Any] = {"version": client.version, "date": time.strftime("%Y-%m-%d")}
            try:
                found = outcomes(client, url)
            except UnavailableError as error:
                record["left out"] = str(error)
                bar.print(f"NOT TESTED: {client.name}: {error}")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed = True
                bar.print(f"{client.name}: {error}")
                continue
            else:
                record["features"] = found
                wrong = [f"{feature} ({error})" for feature, error in found.items() if error]
                failed = failed or bool(wrong)
                bar.print(f"{client.name} {client.version}: {len(found)} features, {len(wrong)} fail", *wrong, sep="\n  ")
            if asked.write:
                enter(client.name, record)
            bar.advance(task)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
