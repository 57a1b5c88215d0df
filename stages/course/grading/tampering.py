"""Sees whether functions of the tests' tools are still those that were there before any learner's code ran.

It stands in graded processes and is asked after each test; see `witness`.
"""

from __future__ import annotations

import ast
import importlib
import re
import signal
import sys
from collections.abc import Mapping
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

KEPT = re.compile(
    r"(builtins|json|math|operator|random|time|pytest|_pytest|pluggy|unittest|signal|stages\.conftest|stages\.course|sitecustomize"
    r"|torch\.(_tensor|functional|testing|nn\.functional))(\..*)?|(torch|numpy|os|importlib|stages)|hypothesis(\.(core|stateful|strategies))?"
)
"""Modules that judge, or that tests count on."""
JUDGES = re.compile(r"json|stages\.|_pytest\.(python|runner|reports)|pluggy")
"""Those whose functions' code is looked at as well; to look makes an audit event, which costs more."""
KINDS = (FunctionType, BuiltinFunctionType, type, classmethod, staticmethod, property)
SIGNALS = (signal.SIGALRM, signal.SIGPROF, signal.SIGVTALRM, signal.SIGUSR1, signal.SIGUSR2)


class Kept:
    """Remembers functions and classes, and tells which were replaced.

    Args:
        learners: the learner's files.
    """

    def __init__(self, learners: frozenset[str]) -> None:
        self._learners = learners
        self._modules: dict[str, ModuleType] = {}
        self._names: list[tuple[Mapping[str, Any], str, tuple[str, ...], tuple[Any, ...]]] = []
        self._codes: list[tuple[FunctionType, str, CodeType]] = []

    def keep_tools(self) -> None:
        """Remember all modules that judge and are loaded by now, but those that are remembered already."""
        for name, module in sorted(sys.modules.items()):
            if name not in self._modules and KEPT.fullmatch(name) and isinstance(module, ModuleType):
                self._modules[name] = module
                self._keep(vars(module), name, name)

    def keep_tests(self, module: ModuleType) -> None:
        """Remember the names of a file of tests, whose functions have not run yet."""
        self._keep(vars(module), module.__name__, module.__name__)

    def borrowed_wrongly(self, module: ModuleType, text: str) -> list[str]:
        """Names that a file of tests took from a tool and that are something else now."""
        wrong = []
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.module in self._modules:
                source = vars(sys.modules[node.module])
                here = {each.asname or each.name: source.get(each.name) for each in node.names}
                wrong += [f"{module.__name__}.{name}" for name, value in here.items() if vars(module).get(name) is not value]
        return wrong

    def changed(self) -> list[str]:
        """Names of what is no longer the same."""
        wrong = [f"sys.modules[{name!r}]" for name, module in self._modules.items() if sys.modules.get(name) is not module]
        for names, name, keys, values in self._names:  # tens of thousands after each test: compared without Python's own loop
            if not all(map(is_, map(names.get, keys), values)):
                wrong += [f"{name}.{key}" for key, value in zip(keys, values, strict=True) if names.get(key) is not value]
        wrong += [f"{name}'s code" for function, name, code in self._codes if function.__code__ is not code]
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        wrong += ["sys.meta_path" for function in finders if self._is_learners(function)]
        wrong += [f"the handler of {number.name}" for number in SIGNALS if self._is_learners(signal.getsignal(number))]
        return wrong

    def _is_learners(self, function: Any) -> bool:
        code = getattr(function, "__code__", None)
        return code is not None and code.co_filename in self._learners

    def _keep(self, names: Mapping[str, Any], name: str, module: str) -> None:
        kept = {key: value for key, value in names.items() if isinstance(value, KINDS) or module == "sitecustomize"}
        self._names.append((names, name, tuple(kept), tuple(kept.values())))
        for key, value in kept.items():
            if isinstance(value, FunctionType) and value.__module__ == module and JUDGES.match(module):
                self._codes.append((value, f"{name}.{key}", value.__code__))
            elif isinstance(value, type) and value.__module__ == module and name == module:
                self._keep(vars(value), f"{name}.{key}", module)


def load_tools(text: str) -> None:
    """Load what a file of tests takes from libraries, before a learner's file could change what they find."""
    names: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    for name in (*names, "stages.course.fixtures.checks"):
        if not name.startswith("stages.") or name == "stages.course.fixtures.checks":
            try:
                importlib.import_module(name)
            except ImportError:  # its tests say themselves that they need it
                continue
