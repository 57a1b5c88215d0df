"""The page in a real browser, over a real server: what it shows is what the server does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from solutions.benchmarks.servers import running_server
from solutions.benchmarks.serving import totals
from solutions.tests.browser import CHROMIUM, DESKTOP, measure, open_browser, static_copy, synthetic_trace
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve
from solutions.tests.real_server import MODEL, stopped

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; on Debian: apt install chromium")
SETTINGS = ("--max-model-len=512", "--kv-cache-memory-bytes=48MiB", "--max-num-seqs=16", "--max-num-batched-tokens=256")
FLOAT32 = "--dtype=float32"
"""With which a cached prompt gives the same answer as a computed one."""
PHONE = {"width": 390, "height": 844}
PROMPT = "Name three colours."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


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

    def open_one(url: str, **settings: Any) -> Page:
        context = browser.new_context(viewport=DESKTOP, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(url)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_long_prompt_is_seen_in_chunks(open_page: Callable[..., Page], small_server: str) -> None:
    page = open_page(small_server)
    page.wait_for_selector("#number-running")
    page.click("summary")
    page.fill("#max-tokens", "20")
    page.click("#pause")
    page.wait_for_selector("#pause[aria-pressed=true]")
    say(page, "How many? " + " ".join(map(str, range(100))))
    page.wait_for_selector("#queue [data-status=waiting]")
    page.click("#step")
    page.wait_for_selector("#queue [data-status=running]")
    written = page.inner_text("#queue li small")  # a step has 256 tokens; a beginning may be cached
    assert re.search(r"running: prompt \d+ of \d+", written), written
    computed, prompt = map(int, re.findall(r"prompt (\d+) of (\d+)", written)[0])
    assert 256 <= computed < prompt
    page.click("#pause")
    page.wait_for_selector(".again:enabled")


def test_a_trace_is_shown(open_page: Callable[..., Page], tmp_path: Path) -> None:
    trace, bad = tmp_path / "trace.jsonl", tmp_path / "bad.jsonl"
    synthetic_trace(trace, running=256, frames=40)
    bad.write_text("not a frame\n")
    with serve(FakeEngine(), ["secret"], live=True) as url:  # a key, so that only the trace is shown
        page = open_page(url)
        page.wait_for_selector("#key-form:visible")
        page.set_input_files("#trace", trace)
        assert measure(page, 256, seconds=0.5)["frames_per_second"] > 0
        page.wait_for_function("document.getElementById('connection').textContent.includes('frame 40 of 40')")
        assert number(page, "tokens-generated") == str(39 * 256)
        page.set_input_files("#trace", bad)
        page.wait_for_function("document.getElementById('connection').textContent.includes('line 1 of bad.jsonl')")


@pytest.mark.slow
def test_a_static_copy_of_the_page_shows_a_trace(open_page: Callable[..., Page], tmp_path: Path) -> None:
    trace = tmp_path / "recorded"
    flags = ("--swap-space=64MiB", "--preemption-mode=swap", f"--record-trace={trace}")
    with running_server(*SETTINGS, FLOAT32, *flags) as (server, url):
        prompts = [f"{number} " * 20 for number in range(12)]
        fields = {"model": MODEL, "prompt": prompts, "max_tokens": 100, "ignore_eos": True}
        assert httpx.post(f"{url}/completions", json=fields, timeout=90).status_code == 200
        stopped(server)
    with static_copy(trace) as address:
        page = open_page(address)
        page.wait_for_function("/^[1-9]/.test(document.getElementById('host-said').textContent)")
        page.context.close()


@pytest.mark.slow
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


@pytest.mark.slow
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
