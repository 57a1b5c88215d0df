"""Who reads a field? Finds, in the syntax trees of a package, the attributes that are read of each class of record.

Types come from annotations, from calls of classes and of annotated functions, and from what methods assign to `self`. Where
the type of an object is not known, an attribute of that name of any class stands for it. So what is reported as unread is
unread, and a field may hide behind another record's of the same name.

Not a read: what only checks (the condition of an `if` that does nothing but raise, or call an `error`), what stands in the
error itself, and copying by a loop over names.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
NAMESPACE = "Namespace"
"""The class of argparse's results."""


@dataclass(slots=True)
class Record:
    """A class: its bases, its annotated fields, and what is known of the types of its attributes and results of its methods."""

    bases: set[str] = field(default_factory=set)
    fields: list[str] = field(default_factory=list)
    types: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class Readers:
    """All reads in some files.

    Attributes:
        records: classes by name. reads: (class, attribute) of each read. flag_reads: file → attributes read of a `Namespace`.
        namespaces: names of argparse's `Namespace`: its own, and those that a module gives it, as in ``Flags = Namespace``.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.records: dict[str, Record] = defaultdict(Record)
        self.results: dict[str, set[str]] = defaultdict(set)
        self.reads: set[tuple[str, str]] = set()
        self.flag_reads: dict[Path, set[str]] = defaultdict(set)
        self.namespaces = {NAMESPACE}
        trees = {path: ast.parse(path.read_text()) for path in paths}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self._declare(node)
                elif isinstance(node, Function):
                    self.results[node.name] |= names_in(node.returns)
            for statement in tree.body:
                match statement:
                    case ast.Assign(
                        targets=[ast.Name(id=alias)], value=ast.Attribute(attr="Namespace") | ast.Name(id="Namespace")
                    ):
                        self.namespaces.add(alias)
        for last in (False, True):  # what `self` holds in one class may be known only once others are
            for path, tree in trees.items():
                _Walk(self, path, record_reads=last).visit(tree)

    def _declare(self, node: ast.ClassDef) -> None:
        record = self.records[node.name]
        record.bases |= {name for base in node.bases for name in names_in(base)} - {node.name}  # uvicorn's Server, say
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and "ClassVar" not in names_in(statement.annotation):
                record.fields.append(statement.target.id)
                record.types[statement.target.id] |= names_in(statement.annotation)
            elif isinstance(statement, Function):
                record.types[statement.name] |= names_in(statement.returns)

    def family(self, name: str) -> set[str]:
        """A class with all that it is derived from."""
        bases = self.records[name].bases if name in self.records else set()
        return {name}.union(*(self.family(base) for base in bases))

    def attribute(self, owners: set[str], name: str) -> set[str]:
        """Types that `owner.name` may have."""
        known = [self.records[c] for owner in owners for c in self.family(owner) if c in self.records]
        return set().union(*(record.types.get(name, set()) for record in known or list(self.records.values())))

    def unread(self, owner: str) -> list[str]:
        """Fields of a record that nobody reads, of an object that may be one."""
        related = self.family(owner) | {name for name in list(self.records) if owner in self.family(name)}
        read = {name for cls, name in self.reads if cls in related}
        return [name for name in self.records[owner].fields if name not in read]


def names_in(annotation: ast.expr | None) -> set[str]:
    """All names in an annotation, such as `X` and `None` of ``X | None``; of ``a.X`` the last."""
    if annotation is None:
        return set()
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return names_in(ast.parse(annotation.value, mode="eval").body)
    nodes = list(ast.walk(annotation))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def only_complains(body: list[ast.stmt]) -> bool:
    """Whether statements do nothing but raise, or tell a parser of an error."""
    for statement in body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        is_error = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "error"
        if not (isinstance(statement, ast.Raise) or is_error):
            return False
    return True


class _Walk(ast.NodeVisitor):
    def __init__(self, readers: Readers, path: Path, record_reads: bool) -> None:
        self.readers, self.path, self.record_reads = readers, path, record_reads
        self.classes: list[str] = []
        self.scopes: list[dict[str, set[str]]] = [{}]
        self.checking = 0

    # what a name stands for

    def types(self, node: ast.expr | None) -> set[str]:
        readers = self.readers
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self.scopes) if name in scope), set())
            case ast.Attribute(value=value, attr=name):
                return readers.attribute(self.types(value), name)
            case ast.Call(func=ast.Name(id="replace" | "vars"), args=[first, *_]):
                return self.types(first)
            case ast.Call(func=ast.Name(id=name)):
                return {name} if name in readers.records else readers.results.get(name, set())
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                if name in ("parse_args", "parse_known_args"):
                    return {NAMESPACE}
                return {name} if name in readers.records else readers.attribute(self.types(value), name)
            case ast.Await(value=value) | ast.Subscript(value=value) | ast.NamedExpr(value=value) | ast.Starred(value=value):
                return self.types(value)
            case ast.IfExp(body=one, orelse=other):
                return self.types(one) | self.types(other)
            case ast.BoolOp(values=values) | ast.List(elts=values) | ast.Tuple(elts=values):
                return set().union(*(self.types(value) for value in values))
        return set()

    def bind(self, target: ast.expr, types: set[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.scopes[-1][node.id] = self.scopes[-1].get(node.id, set()) | types
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and self.classes
            ):
                self.readers.records[self.classes[-1]].types[node.attr] |= types

    # scopes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node: Function) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {argument.arg: names_in(argument.annotation) for argument in arguments}
        if self.classes and arguments and arguments[0].arg == "self" and arguments[0].annotation is None:
            scope["self"] = {self.classes[-1]}
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    # assignments

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts):
                for one, value in zip(target.elts, node.value.elts, strict=True):
                    self.bind(one, self.types(value))
            else:
                self.bind(target, self.types(node.value))
            self.visit(target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, names_in(node.annotation))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, self.types(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> None:
        self.bind(node.target, self.types(node.iter))
        self.generic_visit(node)

    visit_AsyncFor = visit_For
    visit_comprehension = visit_For

    def visit_withitem(self, node: ast.withitem) -> None:
        if node.optional_vars is not None:
            self.bind(node.optional_vars, self.types(node.context_expr))
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for part in node.generators:  # names are bound before the element that uses them
            self.visit(part)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    # reads

    def visit_If(self, node: ast.If) -> None:
        checks = only_complains(node.body)
        self.checking += checks
        self.visit(node.test)
        self.checking -= checks
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.checking += 1
        self.generic_visit(node)
        self.checking -= 1

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self._read(self.types(node.value), node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                self._read(self.types(value), name)
            case ast.Call(
                func=ast.Attribute(value=value, attr="pop"), args=[ast.Constant(value=str(name)), *_]
            ):  # of vars(value)
                self._read(self.types(value), name)
            case ast.Call(func=ast.Attribute(attr="error")):  # of a parser
                self.checking += 1
                self.generic_visit(node)
                self.checking -= 1
                return
        self.generic_visit(node)

    def _read(self, owners: set[str], name: str) -> None:
        if not self.record_reads or self.checking:
            return
        if self.readers.namespaces & owners:
            self.readers.flag_reads[self.path].add(name)
        self.readers.reads |= {(owner, name) for owner in owners}


def flags_of(path: Path) -> Iterator[tuple[str, str]]:
    """The flags that a file gives to parsers: the name of the result's attribute, and how it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument" | "add_flag" as method), args=[*names], keywords=keywords):
                names = names if method == "add_argument" else names[:1]  # of a benchmark, whose default comes next
                written = [name.value for name in names if isinstance(name, ast.Constant)]
                action = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
                if written and action.get("action") not in ("help", "version"):
                    long = next((name for name in written if name.startswith("--")), written[0])
                    yield action.get("dest") or long.lstrip("-").replace("-", "_"), long
