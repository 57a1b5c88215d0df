"""Requests made from the OpenAPI document, valid and broken ones: whatever comes, the answer is as documented and no 5xx.

`make test-api` tries more: the operations that take a body, with valid and with broken ones, and those with an id in their path
are more than 10,000 cases there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, serve, until

CASES = int(os.environ.get("CASES", "50"))
"""Of each operation and kind."""
PATIENCE = 120
"""Seconds that no request needs, on a machine with much else to do."""
pytestmark = pytest.mark.timeout(300 + 3 * CASES)
BODIES = [
    "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/render", "/v1/embeddings", "/v1/responses",
    "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize",
]  # fmt: skip
OF_ONE = [
    ("GET", "/v1/models/{name}"), ("GET", "/v1/responses/{response_id}"), ("DELETE", "/v1/responses/{response_id}"),
    ("GET", "/v1/responses/{response_id}/input_items"), ("POST", "/v1/responses/{response_id}/cancel"),
]  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
SAID = [{"role": "user", "content": "hi"}]
CLAUDE: list[dict[str, Any]] = [
    {}, {"messages": SAID, "system": None, "tools": None},
    {"messages": SAID, "system": "x", "tools": [{"name": "f", "input_schema": PARAMETERS}], "tool_choice": {"type": "none"}},
    {"messages": [
        *SAID, {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": "b"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "r"}]},
    ], "system": [{"type": "text", "text": "x"}], "tools": None},
]  # fmt: skip
MEANINGFUL: dict[str, list[dict[str, Any]]] = {
    "/v1/messages": CLAUDE, "/v1/messages/count_tokens": CLAUDE,
    "/v1/responses": [{}, {"input": "hi", "tools": None}, {"input": [
        *SAID, {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "r"},
    ], "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS}], "tool_choice": "none"}],
    "/v1/chat/completions": [{}, {"messages": SAID}], "/v1/chat/completions/render": [{}, {"messages": SAID}],
}  # fmt: skip
"""Fields that the document calls any list or object, with what they may hold; they replace what was made up."""
KINDS = [("POST", path, mode) for path in BODIES for mode in GenerationMode]
KINDS += [(method, path, GenerationMode.POSITIVE) for method, path in OF_ONE]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, FakeEngine]]:
    fake = FakeEngine()
    with serve(fake) as url:
        yield url, fake


def meant_for(fields: Any) -> Any:
    """A body for the model that the server has, and with an answer that does not take long."""
    if isinstance(fields, dict) and isinstance(fields.get("model"), str):
        fields["model"] = "fake"
        fields.pop("max_completion_tokens", None)
        fields.pop("use_beam_search", None)  # the fake engine has no beams
        for name in ("max_tokens", "max_output_tokens"):
            asked = fields.get(name)
            fields[name] = 1 + asked % 8 if type(asked) is int else 5
        for name in ("n", "best_of"):
            if type(fields.get(name)) is int:
                fields[name] = 1 + fields[name] % 4
    return fields


def test_every_operation_that_takes_anything_is_tried(server: tuple[str, FakeEngine]) -> None:
    found = [
        (method.upper(), path)
        for path, methods in httpx.get(f"{server[0]}/openapi.json").json()["paths"].items()
        for method, operation in methods.items()
        if "requestBody" in operation or "{" in path
    ]
    assert {*found} == {("POST", path) for path in BODIES} | {*OF_ONE}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), KINDS)
def test_any_request_is_answered_as_documented(
    server: tuple[str, FakeEngine], method: str, path: str, mode: GenerationMode
) -> None:
    url, fake = server
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=CASES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(operation.as_strategy(generation_mode=mode), strategies.sampled_from(MEANINGFUL.get(path, [{}])))
    def check(case: schemathesis.Case, meaningful: dict[str, Any]) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = meant_for(case.body)
            if isinstance(case.body, dict):
                case.body |= meaningful
        response = case.call_and_validate(checks=CHECKS, timeout=PATIENCE)
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["code"] == response.status_code or isinstance(error["code"], str)
            assert error["message"]
            assert "Traceback" not in error["message"]

    check()
    assert statuses.total() >= min(CASES, 20)
    if mode is GenerationMode.POSITIVE and path in BODIES:
        assert statuses[200], f"no body was taken: {statuses}"
    assert httpx.post(f"{url}/v1/completions", json=body(), timeout=PATIENCE).json()["choices"][0]["text"] == "abc"
    until(lambda: not fake.running)
