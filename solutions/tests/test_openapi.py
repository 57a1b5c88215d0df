"""Bodies made from the OpenAPI document, valid and broken ones: whatever comes, the answer is as documented and no 5xx.

`make test-api` tries more: each operation that takes a body, with valid and with broken ones, 1,250 cases of each kind.
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
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, serve

CASES = int(os.environ.get("CASES", "50"))
"""Of each operation and kind."""
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
        asked = fields.get("max_tokens")
        fields["max_tokens"] = asked % 8 if type(asked) is int else 5
        for name in ("n", "best_of"):
            if type(fields.get(name)) is int:
                fields[name] = 1 + fields[name] % 4
    return fields


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"])
def test_any_body_is_answered_as_documented(server: tuple[str, FakeEngine], path: str, mode: GenerationMode) -> None:
    url, fake = server
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path]["POST"]
    statuses: Counter[int] = Counter()

    @hypothesis.settings(
        max_examples=CASES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = meant_for(case.body)
        response = case.call_and_validate(checks=CHECKS, timeout=20)
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["code"] == response.status_code or isinstance(error["code"], str)
            assert error["message"]
            assert "Traceback" not in error["message"]

    check()
    assert statuses.total() >= min(CASES, 20)
    if mode is GenerationMode.POSITIVE:
        assert statuses[200], f"no body was taken: {statuses}"
    assert httpx.post(f"{url}/v1/completions", json=body()).json()["choices"][0]["text"] == "abc"
    assert not fake.running
