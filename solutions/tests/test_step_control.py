"""Pause, single steps and slow motion of a server, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from solutions.serving.async_engine import AsyncEngine
from solutions.serving.live.step_control import StepControl
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import FOREVER, body, serve, until
from solutions.tests.slow_cases import slow_after

pytestmark = pytest.mark.alone


@contextmanager
def watched(url: str) -> Iterator[Any]:
    """Somebody watches the feed; a function that sets it."""
    with httpx.Client(base_url=url, timeout=20) as client, client.stream("GET", "/live"):
        yield lambda **change: client.post("/live/control", json=change).json()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """A fake engine that tells its observers of its steps, and has nothing to show."""
    monkeypatch.setattr("solutions.serving.live.snapshot.Snapshots.record", lambda *_: None)
    monkeypatch.setattr("solutions.serving.live.snapshot.Snapshots.frame", lambda self, full: {"full": full})
    fake = FakeEngine()
    step = fake.step

    def told() -> Any:
        outputs = step()
        for observer in fake.observers:
            if isinstance(observer, StepControl):
                observer.on_step(None, time.monotonic())
        return outputs

    fake.step = told
    return fake


def test_a_paused_engine_takes_requests_and_steps_when_told(engine: FakeEngine) -> None:
    with serve(engine, live=True) as url, watched(url) as control:
        assert control(paused=True) == {"paused": True, "delay": 0.0}
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body(), timeout=20)))
        asking.start()
        until(lambda: engine.running)
        time.sleep(0.2)
        assert engine.num_steps == 0
        for steps in (1, 1):
            before = engine.num_steps
            assert control(steps=steps) == {"paused": True, "delay": 0.0}
            until(lambda before=before, steps=steps: engine.num_steps == before + steps)
            time.sleep(0.1)
            assert engine.num_steps == before + steps
        assert not answers
        control(paused=False)
        asking.join(10)
        assert answers[0].json()["choices"][0]["text"] == "abc"


def test_slow_motion(engine: FakeEngine) -> None:
    with serve(engine, live=True) as url, watched(url) as control:
        assert control(delay=0.1) == {"paused": False, "delay": 0.1}
        start = time.monotonic()
        httpx.post(f"{url}/v1/completions", json=body(max_tokens=6), timeout=20)
        assert time.monotonic() - start > 0.5
        control(delay=0)
        start = time.monotonic()
        httpx.post(f"{url}/v1/completions", json=body(max_tokens=6), timeout=20)
        assert time.monotonic() - start < 0.5


def test_a_client_that_leaves_is_noticed_while_paused(engine: FakeEngine) -> None:
    with serve(engine, live=True) as url, watched(url) as control:
        control(paused=True)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body(max_tokens=FOREVER), timeout=0.3)
        until(lambda: engine.aborted)


def test_when_nobody_looks_any_more_it_goes_on(engine: FakeEngine) -> None:
    with serve(engine, live=True) as url:
        with watched(url) as control:
            control(paused=True, delay=5.0)
        answer = httpx.post(f"{url}/v1/completions", json=body(), timeout=10)
        assert answer.json()["choices"][0]["text"] == "abc"


def test_a_server_that_shuts_down_is_not_held(engine: FakeEngine) -> None:
    bridge = AsyncEngine(engine)
    with serve(bridge, live=True) as url, watched(url) as control:
        control(paused=True)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body(), timeout=20)))
        asking.start()
        until(lambda: engine.running)
        bridge.is_draining = True  # what a signal does; the feed ends, and with it the pause
        asking.join(10)
        assert answers[0].json()["choices"][0]["text"] == "abc"


@pytest.mark.parametrize(
    "change",
    slow_after(
        3,
        [{"paused": "yes"}, {"steps": 0}, {"delay": float("nan")}, {"steps": 1001}, {"delay": -1}, {"delay": 11}, {"speed": 2}],
    ),
)
def test_nonsense_is_refused(engine: FakeEngine, change: dict[str, Any]) -> None:
    with serve(engine, live=True) as url:
        field = next(iter(change))
        text = f'{{"{field}": NaN}}' if change[field] != change[field] else httpx.Request("POST", url, json=change).content
        answer = httpx.post(f"{url}/live/control", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in (field, None)


def test_the_page_needs_no_key_and_what_it_asks_does() -> None:
    with serve(FakeEngine(), ["secret"], live=True) as url, httpx.Client(base_url=url, follow_redirects=True) as client:
        page = client.get("/")
        assert (page.status_code, page.url.path, page.headers["content-type"]) == (200, "/page/", "text/html; charset=utf-8")
        for name in ("main.js", "style.css", "icon.svg"):
            assert name in page.text
            assert client.get(f"/page/{name}").status_code == 200
        assert client.get("/page/../metrics").status_code == client.post("/live/control", json={}).status_code == 401
        assert client.get("/page/..%2f..%2fapp.py").status_code == 404
    with serve(FakeEngine()) as url:
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/page/").status_code == 404
