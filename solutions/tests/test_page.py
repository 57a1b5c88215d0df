"""The page in a real browser, over a real server: what it shows is what the server does."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from solutions.benchmarks.serving import running_server, totals
from solutions.serving.live import PAGE
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve
from solutions.tests.real_server import MODEL, stopped

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; on Debian: apt install chromium")
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
SETTINGS = ("--max-model-len=512", "--kv-cache-memory-bytes=48MiB", "--max-num-seqs=16", "--max-num-batched-tokens=256")
FLOAT32 = "--dtype=float32"
"""With which a cached prompt gives the same answer as a computed one."""
DESKTOP, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
PROMPT = "Name three colours."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def small_server() -> Iterator[str]:
    """Address of a server whose KV cache holds few requests at once, without ``/v1``."""
    with running_server(*SETTINGS, FLOAT32) as (_, url):
        yield url.removesuffix("/v1")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server; in the end nothing may have gone wrong in it."""
    complaints: list[str] = []
    contexts = []

    def open_one(url: str, path: str = "/", **settings: Any) -> Page:
        context = browser.new_context(viewport=DESKTOP, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(url + path)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert [each for each in complaints if "401" not in each] == []


def number(page: Page, name: str) -> str:
    return page.inner_text(f"#number-{name}")


def owned(page: Page) -> int:
    return int(page.get_attribute("#blocks", "data-owned"))


def say(page: Page, text: str) -> None:
    page.fill(".chat textarea", text)
    page.keyboard.press("Enter")


def test_a_chat_streams_what_the_api_says(open_page: Callable[..., Page], small_server: str) -> None:
    page = open_page(small_server)
    page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "30")
    say(page, PROMPT)
    page.wait_for_selector(".again:enabled")
    fields = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 30}
    answer = httpx.post(f"{small_server}/v1/chat/completions", json=fields, timeout=60).json()["choices"][0]["message"]
    shown = page.locator(".message span").all_text_contents()
    assert shown == [PROMPT, answer["content"]]
    page.click(".again")
    page.wait_for_selector(".again:enabled")
    assert page.locator(".message span").all_text_contents() == shown
    page.wait_for_function("document.getElementById('blocks').dataset.owned === '0'")
    metrics = totals(httpx.get(f"{small_server}/metrics").text)
    assert number(page, "tokens-generated") == f"{metrics['vllm:generation_tokens_total']:.0f}"


def test_stop_frees_the_blocks(open_page: Callable[..., Page], small_server: str) -> None:
    page = open_page(small_server)
    page.click("summary")
    page.fill("#max-tokens", "400")
    say(page, "Write a very long story about a river.")
    page.wait_for_function("document.querySelectorAll('.message span')[1]?.textContent.length > 20")
    assert owned(page) > 0
    assert number(page, "running") == "1 of 16"
    page.click(".stop")
    page.wait_for_function("document.getElementById('blocks').dataset.owned === '0'")
    assert page.is_enabled(".again")
    assert number(page, "running") == "0 of 16"


def test_many_requests_share_wait_and_are_preempted(open_page: Callable[..., Page], small_server: str) -> None:
    page = open_page(small_server)
    page.evaluate("""() => {
      window.seen = {shared: 0, waiting: 0, marked: 0};
      const read = () => {
        seen.shared = Math.max(seen.shared, Number(document.getElementById('blocks').dataset.shared));
        seen.waiting = Math.max(seen.waiting, document.querySelectorAll('#queue [data-status=waiting]').length);
        requestAnimationFrame(read);
      };
      read();
    }""")
    page.click("#load")
    page.wait_for_selector("#queue [data-status=running]")
    page.hover("#queue [data-status=running]")
    assert page.locator("#queue li.marked").count() > 1  # itself, and who shares its beginning
    page.wait_for_selector("#load:enabled", timeout=60_000)
    page.wait_for_function("document.getElementById('blocks').dataset.owned === '0'")
    seen = page.evaluate("seen")
    assert seen["shared"] >= 4
    assert seen["waiting"] >= 10
    metrics = totals(httpx.get(f"{small_server}/metrics").text)
    assert number(page, "tokens-generated") == f"{metrics['vllm:generation_tokens_total']:.0f}"
    assert int(number(page, "preemptions")) == metrics["vllm:num_preemptions_total"] > 0
    share = metrics["vllm:prefix_cache_hits_total"] / metrics["vllm:prefix_cache_queries_total"]
    assert number(page, "prompt-tokens-cached") == f"{100 * share:.1f} %"


def test_pause_and_single_steps(open_page: Callable[..., Page], small_server: str) -> None:
    page = open_page(small_server)
    page.wait_for_selector("#number-running")
    page.focus("#pause")
    page.keyboard.press("Enter")  # by keyboard as well as by mouse
    page.wait_for_selector("#pause[aria-pressed=true]")
    say(page, PROMPT)
    page.wait_for_selector("#queue [data-status=waiting]")
    page.click("#step")
    page.wait_for_selector("#queue [data-status=running]")
    written = page.inner_text("#queue li small")
    page.wait_for_timeout(400)
    assert page.inner_text("#queue li small") == written
    page.click("#pause")
    page.wait_for_selector(".again:enabled")


def synthetic_trace(path: Path, count: int, frames: int) -> None:
    """A trace of `count` running sequences of 20 blocks each, a step a frame."""
    sizes = {"model": "m", "block_size": 16, "num_blocks": 25 * count, "num_host_blocks": 0, "max_num_seqs": count,
             "max_num_batched_tokens": 2048, "max_model_len": 4096}  # fmt: skip
    stats = dict.fromkeys(
        ("num_running", "num_waiting", "kv_cache_usage", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
         "num_generation_tokens", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"), 0
    )  # fmt: skip
    with path.open("w") as file:
        for frame in range(frames):
            rows = [[seq, 1, 0, True] for seq in range(count)]
            fresh = range(20 * count) if frame == 0 else range(frame * count // 16, (frame + 1) * count // 16)
            line = {
                "full": frame == 0, "steps": [[frame + 1, frame / 20, rows, []]], "copied": [], "swapped": [],
                "sequences": [[seq, f"r{seq}", "running", 200, 220 + frame, 219 + frame, 0, 0] for seq in range(count)],
                "blocks": [[block, [block % count], False] for block in fresh],
                "stats": stats | {"num_generation_tokens": frame * count, "num_running": count},
            }  # fmt: skip
            file.write(json.dumps(line | ({"engine": sizes} if frame == 0 else {})) + "\n")


def test_a_trace_is_shown_and_the_page_stays_fluent(open_page: Callable[..., Page], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    synthetic_trace(trace, 256, 100)
    with serve(FakeEngine(), ["secret"], live=True) as url:  # a key, so that only the trace is shown
        page = open_page(url)
        page.wait_for_selector("#key-form:visible")
        page.set_input_files("#trace", trace)
        page.wait_for_function("document.getElementById('number-running')?.textContent === '256 of 256'")
        frames = page.evaluate("""() => new Promise((resolve) => {
          let count = 0;
          const start = performance.now();
          const tick = () => {
            count += 1;
            if (performance.now() - start < 2000) requestAnimationFrame(tick);
            else resolve(1000 * count / (performance.now() - start));
          };
          requestAnimationFrame(tick);
        })""")
        print(f"{frames:.0f} frames a second with 256 running requests")
        page.wait_for_function("document.getElementById('connection').textContent.includes('frame 100 of 100')")
        assert number(page, "tokens-generated") == str(99 * 256)
        bad = tmp_path / "bad.jsonl"
        bad.write_text("not a frame\n")
        page.set_input_files("#trace", bad)
        page.wait_for_function("document.getElementById('connection').textContent.includes('line 1 of bad.jsonl')")


def test_a_static_copy_of_the_page_shows_a_trace(open_page: Callable[..., Page], tmp_path: Path) -> None:
    """As documentation would have it: the page's files and a trace, on a server that serves files and nothing else."""
    shutil.copytree(PAGE, tmp_path / "page")
    trace = tmp_path / "recorded"
    flags = ("--swap-space=64MiB", "--preemption-mode=swap", f"--record-trace={trace}")
    with running_server(*SETTINGS, FLOAT32, *flags) as (server, url):
        prompts = [f"{number} " * 20 for number in range(12)]
        fields = {"model": MODEL, "prompt": prompts, "max_tokens": 100, "ignore_eos": True}
        assert httpx.post(f"{url}/completions", json=fields, timeout=90).status_code == 200
        stopped(server)
    shutil.copy(trace, tmp_path / "page" / "trace.jsonl")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        try:
            page = open_page(f"http://127.0.0.1:{files.server_port}", path="/page/?trace=trace.jsonl")
            page.wait_for_function("/^[1-9]/.test(document.getElementById('host-said').textContent)")
            page.context.close()
        finally:
            files.shutdown()
            thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_keeps_anybody_out(
    open_page: Callable[..., Page], small_server: str, scheme: str, size: dict[str, int]
) -> None:
    page = open_page(small_server, color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size(size)
    page.click("#load")
    page.wait_for_selector("#queue [data-status=running]")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    violations = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["target"]) for each in violations] == []


def test_a_server_with_keys_is_asked_with_one(open_page: Callable[..., Page]) -> None:
    with running_server(*SETTINGS, "--api-key", "secret") as (_, url):
        page = open_page(url.removesuffix("/v1"))
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_function("document.getElementById('connection').textContent === 'connected'")
        say(page, PROMPT)
        page.wait_for_selector(".again:enabled")
        assert len(page.locator(".message span").all_text_contents()[1]) > 3
        page.context.close()
