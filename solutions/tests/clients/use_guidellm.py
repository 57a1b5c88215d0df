"""GuideLLM: a short measurement of each route, from its command line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import shared

REQUESTS, TOKENS = 2, 8


def measured(route: str) -> dict:
    """What the program reports of some streams."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console", "--profile", "kind=synchronous",
            "--backend", f"kind=openai_http,target={shared.URL},model={shared.MODEL},request_format=/v1/{route}",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--tokenizer", f"kind=hf_auto,model={os.environ['CLIENT_TOKENIZER']}",
            "--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={TOKENS}", "--output", f"kind=json,path={report}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    found: dict = benchmark["metrics"]
    totals = {name: found["request_totals"][name] for name in ("successful", "errored")}
    assert totals == {"successful": REQUESTS, "errored": 0}, totals
    return found


@shared.feature("stream")
def stream() -> None:
    assert measured("chat/completions")["time_to_first_token_ms"]["successful"]["mean"] > 0


@shared.feature("completions")
def completions() -> None:
    assert measured("completions")["output_token_count"]["successful"]["mean"] == TOKENS


@shared.feature("responses")
def responses() -> None:
    measured("responses")


shared.run()
