"""Each real client of the catalogue, in its own environment, does all that its script asks of it: `make test-clients`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from solutions.tests.clients.drive import outcomes, server
from solutions.tests.clients.environments import Client, UnavailableError, catalogue

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.mark.parametrize("client", catalogue(), ids=lambda client: client.name)
def test_a_real_client(client: Client, address: str) -> None:
    try:
        found = outcomes(client, address)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert {feature: error for feature, error in found.items() if error} == {}
