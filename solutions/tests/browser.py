"""For the tests of the page: a browser without a screen, a copy of the page on a server of its own, and made-up traces."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from solutions.serving.live.feed import PAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
DESKTOP = {"width": 1400, "height": 1000}
TRACE_RATE = 20
"""Frames of a trace that the page shows a second, twice as many as a server sends."""
BLOCKS_EACH = 20
COUNT_FRAMES = """(seconds) => new Promise((resolve) => {
  const times = [];
  const tick = (now) => {
    times.push(now);
    if (now - times[0] < 1000 * seconds) requestAnimationFrame(tick);
    else resolve(times);
  };
  requestAnimationFrame(tick);
})"""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a screen. Raises ValueError if there is none."""
    if CHROMIUM is None:
        raise ValueError("there is no Chromium; on Debian: apt install chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root may not use
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + sandbox)
        try:
            yield browser
        finally:
            browser.close()


QUIET = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})  # nothing on the terminal


@contextmanager
def static_copy(trace: Path) -> Iterator[str]:
    """Address of the page as documentation would have it: its files and a trace, on a server that serves files and no more."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PAGE, Path(folder) / "page")
        shutil.copy(trace, Path(folder) / "page" / "trace.jsonl")
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(QUIET, directory=folder)) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/page/?trace=trace.jsonl"
            finally:
                server.shutdown()
                thread.join()


def synthetic_trace(path: Path, running: int, frames: int) -> None:
    """Write a trace of `running` sequences of 20 blocks each, which all decode, a step a frame (see `Snapshots`)."""
    sizes = {"model": "m", "block_size": 16, "num_blocks": 25 * running, "num_host_blocks": 0, "max_num_seqs": running,
             "max_num_batched_tokens": 2048, "max_model_len": 4096}  # fmt: skip
    zeros = dict.fromkeys(
        ("num_waiting", "kv_cache_usage", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
         "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"), 0
    )  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        for frame in range(frames):
            rows = [[seq, 1, 0, True] for seq in range(running)]
            # one in sixteen sequences begins a block in each step
            new = range(BLOCKS_EACH * running) if frame == 0 else range(frame * running // 16, (frame + 1) * running // 16)
            line = {
                "full": frame == 0, "steps": [[frame + 1, frame / TRACE_RATE, rows, []]], "copied": [], "swapped": [],
                "sequences": [[seq, f"r{seq}", "running", 200, 220 + frame, 219 + frame, 0, 0] for seq in range(running)],
                "blocks": [[block, [block % running], False] for block in new],
                "stats": zeros | {"num_generation_tokens": frame * running, "num_running": running},
            }  # fmt: skip
            file.write(json.dumps(line | ({"engine": sizes} if frame == 0 else {})) + "\n")


def measure(page: Page, running: int, seconds: float) -> dict[str, float]:
    """Frames a second, and the longest time between two, in milliseconds, while the page shows so many running sequences."""
    page.wait_for_function(f"document.getElementById('number-running')?.textContent === '{running} of {running}'")
    times = page.evaluate(COUNT_FRAMES, seconds)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    rate = 1e3 * len(gaps) / (times[-1] - times[0])
    return {"frames_per_second": rate, "median_ms": statistics.median(gaps), "longest_ms": max(gaps)}
