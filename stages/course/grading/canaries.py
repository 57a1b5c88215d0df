"""Tests that must fail, each with its own word, woven between a task's tests: who makes tests pass makes these pass too."""

from __future__ import annotations

import random
from types import CodeType, FunctionType, ModuleType

import pytest

KINDS = (
    ("check_equal", "check_equal([1, {a}, 3], [1, {b}, 3], {word!r})"),
    ("check_equal", "check_equal({a}, {b}, {word!r})"),
    ("pytest", "with pytest.raises(ValueError, match='{a}'):\n        raise ValueError({word!r})"),
    ("json", "assert json.loads(json.dumps([{a}])) == [{b}], {word!r}"),
    ("torch", "assert torch.equal(torch.tensor([{a}]), torch.tensor([{b}])), {word!r}"),
    ("", "assert sorted([{a}, 0]) == [0, {b}], {word!r}"),
)
"""A name that a file of tests has, and what a test may do with it."""


class Canaries:
    """Makes canaries, and knows each one's word.

    Args:
        seed: decides where they are and what they look like.
    """

    def __init__(self, seed: str) -> None:
        self.words: dict[str, str] = {}
        self._numbers = random.Random(f"{seed} canaries")

    def weave(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """A file's tests with a canary behind each."""
        names = {item.name.split("[")[0] for item in items}
        words = sorted({word for name in names for word in name.split("_")[1:]} | {"and", "the"})
        return [each for item in items for each in (item, self._after(item, words, names))]

    def _after(self, item: pytest.Item, words: list[str], names: set[str]) -> pytest.Item:
        module = item.getparent(pytest.Module)
        assert module is not None
        name = ""
        while not name or name in names:
            name = "_".join(["test", *(self._numbers.choice(words) for _ in range(self._numbers.randrange(6, 9)))])
        names.add(name)
        self.words[name] = " ".join(self._numbers.choice(words) for _ in range(5)) + f" {self._numbers.randrange(10**9)}"
        function = self._function(name, self.words[name], module.obj, str(item.path))
        return pytest.Function.from_parent(module, name=name, callobj=function)

    def _function(self, name: str, word: str, module: ModuleType, path: str) -> FunctionType:
        has = [text for known, text in KINDS if not known or known in vars(module)]
        a = self._numbers.randrange(100, 10_000)
        body = self._numbers.choice(has).format(a=a, b=a + self._numbers.randrange(1, 50), word=word)
        whole = compile(f"def {name}():\n    {body}\n", path, "exec")
        code = next(each for each in whole.co_consts if isinstance(each, CodeType))
        return FunctionType(code, vars(module), name)
