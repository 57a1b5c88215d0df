"""Fixtures that several test files share."""

from solutions.tests.real_server import client, tokenizer, url

__all__ = ["client", "tokenizer", "url"]
