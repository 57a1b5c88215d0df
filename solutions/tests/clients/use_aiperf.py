"""AIPerf: a short measurement of each route, from its command line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import shared

REQUESTS = 3


def measured(route: str, *flags: str) -> dict:
    """What the program reports of some requests."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("aiperf")), "profile", "--model", shared.MODEL,
            "--url", shared.URL.removesuffix("/v1"), "--endpoint-type", route,
            "--request-count", str(REQUESTS), "--concurrency", "1", "--ui", "none",
            "--synthetic-input-tokens-mean", "16", "--output-tokens-mean", "8", "--tokenizer", os.environ["CLIENT_TOKENIZER"],
            "--use-server-token-count", "--artifact-dir", folder, *flags,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (report,) = Path(folder).rglob("profile_export_aiperf.json")
        found: dict = json.loads(report.read_text())
    assert found["request_count"]["avg"] == REQUESTS, found
    return found


@shared.feature("chat")
def chat() -> None:
    measured("chat")


@shared.feature("stream")
def stream() -> None:
    assert measured("chat", "--streaming")["time_to_first_token"]["avg"] > 0


@shared.feature("usage")
def usage() -> None:
    assert 1 <= measured("chat", "--streaming", "--per-chunk-usage")["output_sequence_length"]["avg"] <= 8


@shared.feature("completions")
def completions() -> None:
    measured("completions", "--streaming")


@shared.feature("responses")
def responses() -> None:
    measured("responses", "--streaming")


shared.run()
