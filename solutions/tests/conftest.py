"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from solutions.tests.real_server import client, tokenizer, url
from solutions.tests.tiny_models import make_tiny_llama

__all__ = ["client", "tokenizer", "url"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA with random weights that tests only read."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_llama(folder)
    return folder
