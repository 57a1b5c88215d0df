"""Reads the guide and finds what is wrong in it. Each check takes a text, so that a test can show it a wrong one.

``STAGES=1 python -m tests.guide 1.2`` runs the examples of a task's section on the learner's code.
"""

from __future__ import annotations

import ast
import doctest
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from stages.course.tools.catalog import GUIDE, Stage, Target, Task, load_course
from stages.course.tools.targets import find_function, find_lines, is_python
from stages.make_starters import render

ROOT = Path(__file__).parents[1]
COURSE = load_course()
TASKS = [task for stage in COURSE for task in stage.tasks]
APPENDICES = {"appendix-a": "docs/appendix_a_cpu_step.md", "appendix-b": "docs/appendix_b_gpu_floor.md"}
FILES = [GUIDE, *(stage.chapter for stage in COURSE), *APPENDICES.values()]
"""The guide's files, from the repository's root, in the order of reading."""
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PARTS = ("Interface", "Invariants", "Worked example", "Traps", "Test it", "In a production engine", "Read on")
"""What a task's section is made of; each begins a paragraph in bold."""
FOREIGN = {
    # Python, PyTorch, numpy
    "TCPStore", "ValueError", "deque.remove", "insort", "len", "np.cumsum", "np.repeat", "os.cpu_count", "os.sched_getaffinity",
    "repeat", "repeat_interleave", "reshape", "torch.distributed", "torch.tril",
    # vLLM
    "EngineCore.step", "FreeKVCacheBlockQueue", "KVCacheManager.allocate_slots", "Request", "_preempt_request",
    "_prepare_inputs", "check_stop", "determine_available_memory", "get_new_blocks", "reshape_and_cache",
    "scheduler_reserve_full_isl", "touch",
    "EngineCoreProc", "OpenAIServingChat", "check_stop_strings", "continuous_usage_stats", "with_cancellation",
    # ASGI and Kubernetes
    "http.disconnect", "preStop",
    # CUDA
    "cp.async",
    # OpenAI
    "suffix",
}  # fmt: skip
"""Names in the tasks' sections that are not this engine's."""
LETTERS = {"T", "S", "N", "Q", "L", "H", "H_kv", "D", "M", "V"}


# Reading the guide


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> list[str]:
    return re.findall(r'<a id="([^"]+)"></a>', text)


def sections(text: str) -> dict[str, str]:
    """Anchor → what follows it, up to the next anchor."""
    _, *pieces = re.split(r'^(?=<a id="[^"]+"></a>$)', text, flags=re.MULTILINE)
    return {anchors(piece)[0]: piece for piece in pieces}


def examples(text: str, package: str = "solutions") -> dict[str, str]:
    """Heading → the session with Python under it; its blocks go on from each other.

    Args:
        package: what stands in for `stages`, which may be unfinished.
    """
    found = {}
    for piece in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(>>> .*?)^```$", piece, re.MULTILINE | re.DOTALL)
        if blocks:
            found[piece.splitlines()[0].lstrip("# ")] = "".join(blocks).replace("from stages.", f"from {package}.")
    return found


# Finding what is wrong


def section_problems(chapter: str, stage: Stage) -> list[str]:
    """A chapter's head and tasks that are not there, not in order, or not under their title."""
    titles = {f"chapter-{stage.number}": f"# Chapter {stage.number} · {stage.title}"}
    titles |= {task.guide: f"## Task {task.id} · {task.name}" for task in stage.tasks}
    problems = [] if anchors(chapter) == list(titles) else [f"anchors {anchors(chapter)}, expected {list(titles)}"]
    return problems + [title for name, title in titles.items() if f'<a id="{name}"></a>\n{title}\n' not in chapter]


def table_of_tasks(course: list[Stage]) -> list[str]:
    """The rows that the hub's table must have: each task with its section and its minutes."""
    return [f"| [{task.id}]({task.section}) | {task.name} | {task.minutes} |" for stage in course for task in stage.tasks]


def task_problems(section: str, stage: Stage, task: Task) -> list[str]:
    """Parts that a task's section lacks, functions that it does not name, and a first line that differs from course.toml."""
    problems = [part for part in PARTS if not re.search(rf"^\*\*{part}\b", section, re.MULTILINE)]
    named = {re.sub(r"\(.*", "", code) for code in inline_code(section)}
    problems += [target.name for target in task.targets if target.name not in named]
    for name, given in re.findall(r"`([\w.]+)\(([\w, ]+)\)`", prose(section)):
        for target in task.targets:
            if target.name == name and not set(given.split(", ")) <= parameters(target):
                problems.append(f"{name}({given})")
    files = ", ".join(f"`stages/{stage.folder}/{file}`" for file in dict.fromkeys(target.file for target in task.targets))
    first = f"*{files} · {task.minutes} minutes*"
    problems += [first] if first not in (" ".join(paragraph.split()) for paragraph in section.split("\n\n")) else []
    return problems + ([] if f"make test-stage-{task.stage} TASK={task.id}" in section else ["its test command"])


def parameters(target: Target) -> set[str]:
    """Names of a function's parameters; of a marked part nobody asks."""
    if not is_python(target.file):
        return set()
    node = find_function(ast.parse((ROOT / "solutions" / target.file).read_text(encoding="utf-8")), target.name)
    return {argument.arg for argument in node.args.args}


def missing_paths(text: str) -> list[str]:
    """Files and folders of the repository that the text names and that are not there."""
    names = re.findall(r"(?<![\w./])((?:solutions|stages|tests|benchmarks)/[\w./-]*)", text)
    return [name for name in names if not (ROOT / name.rstrip(".")).exists()]


def unknown_commands(text: str) -> list[str]:
    """`make` targets, and tasks and stages given to them, that do not exist."""
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code_of(text)) if name not in targets]
    wrong += [f"TASK={name}" for name in re.findall(r"TASK=([\d.]*\d)", text) if name not in {task.id for task in TASKS}]
    numbers = {str(stage.number) for stage in COURSE}
    for name in re.findall(r"(?:STAGES?|WITH)=([\d,]*\d)", text):
        wrong += [f"stage {name}"] if not set(name.split(",")) <= numbers else []
    return wrong


def code_of(text: str) -> str:
    """All code: blocks and inline."""
    return "\n".join(FENCE.findall(text) + inline_code(text))


def dead_links(text: str, file: str) -> list[str]:
    """Links of a text to itself or to the repository that lead nowhere; `file` is where the text lies."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = link.partition("#")
        target = (ROOT / file).parent / path
        if "://" in link:
            continue
        found = not path or target.exists()
        if found and anchor:
            found = anchor in anchors(target.read_text(encoding="utf-8") if path else text)
        dead += [] if found else [link]
    return dead


@dataclass
class Names:
    """What the engine calls things, collected from its source without running it."""

    members: dict[str, set[str]] = field(default_factory=dict)
    """Class → methods, fields, attributes and enum members, inherited ones too."""
    functions: set[str] = field(default_factory=set)
    """Functions and methods."""
    all: set[str] = field(default_factory=set)
    """Every identifier."""

    @classmethod
    def of(cls, folder: Path) -> Names:
        names, bases = cls(), {}
        for path in sorted(folder.rglob("*.py")):
            if "tests" in path.relative_to(folder).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names._take(node)
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                    names.members.setdefault(node.name, set()).update(_members(node))
        for path in (*folder.rglob("*.cu"), *folder.rglob("*.cpp")):
            names.functions.update(re.findall(r"\b(\w+)\(", path.read_text(encoding="utf-8")))
        names.all |= names.functions
        for name, parents in bases.items():
            for parent in parents:
                names.members[name] |= names.members.get(parent, set())
        return names

    def _take(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self.functions.add(node.name)
        for attribute in ("id", "attr", "arg", "name"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                self.all.add(value)

    def resolves(self, code: str) -> bool:
        """Whether a piece of inline code names something of the engine; True for what is no name: a formula, a shape."""
        match = re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\(.*\))?", code)
        if match is None or match[1] in FOREIGN | LETTERS:
            return True
        first, *rest = match[1].split(".")
        if not rest:
            # a class, a constant, a field, a parameter; with arguments it must be something to call
            return first in (self.functions | self.members.keys() if match[2] else self.all | self.members.keys())
        if first in self.members:
            return len(rest) == 1 and rest[0] in self.members[first]
        # an object: its attribute is one of some class
        return first[0].islower() and all(any(name in known for known in self.members.values()) for name in rest)


def _members(node: ast.ClassDef) -> set[str]:
    found = {child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)}
    for child in ast.walk(node):
        targets = child.targets if isinstance(child, ast.Assign) else [child.target] if isinstance(child, ast.AnnAssign) else []
        for target in targets:
            for leaf in ast.walk(target):
                if isinstance(leaf, ast.Attribute) and isinstance(leaf.value, ast.Name) and leaf.value.id == "self":
                    found.add(leaf.attr)
                elif isinstance(leaf, ast.Name) and child in node.body:
                    found.add(leaf.id)
    return found


def run_examples(name: str, code: str) -> tuple[int, str]:
    """Run lines of a Python session and compare what they print.

    Returns:
        How many failed, and the report.
    """
    report: list[str] = []
    session = doctest.DocTestParser().get_doctest(code, {"__name__": "guide"}, name, None, 0)
    failed, _ = doctest.DocTestRunner(verbose=False).run(session, out=report.append)
    return failed, "".join(report)


@contextmanager
def unfinished_engine(folder: Path, stage: Stage, todo: Iterable[Task]) -> Iterator[str]:
    """A whole engine in which some tasks of a stage are not done yet; yields the name it can be imported by.

    Args:
        folder: an empty one, for the files of the stage.
    """
    for file in stage.files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render((ROOT / "solutions" / file).read_text(encoding="utf-8"), file, todo), encoding="utf-8")
    package = ModuleType("unfinished_engine")
    package.__path__ = [str(folder), str(ROOT / "solutions")]
    sys.modules[package.__name__] = package
    try:
        yield package.__name__
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package.__name__]:
            del sys.modules[name]


def body_lines(source: str, target: Target) -> list[str]:
    """What a learner writes of a function, in the reference's words."""
    if not is_python(target.file):
        return source.splitlines()[find_lines(source, target.file, target.name)][1:-1]
    node = find_function(ast.parse(source), target.name)
    return source.splitlines()[node.body[0].end_lineno : node.end_lineno]


def printed_answers(text: str) -> list[str]:
    """Lines of the functions that learners write which stand in the guide: it is to teach them, not to print them."""
    found = []
    for task in TASKS:
        for target in task.targets:
            source = (ROOT / "solutions" / target.file).read_text(encoding="utf-8")
            lines = [line.split("#")[0].strip() for line in body_lines(source, target)]
            found += [f"{target.name}: {line}" for line in lines if len(line) > 30 and line in text]
    return found


def main(argv: list[str]) -> int:
    """Run the examples of one task on `stages`; says what differs."""
    task = next((task for task in TASKS if argv == [task.id]), None)
    if task is None:
        print(f"write the number of a task: python -m tests.guide {TASKS[0].id} (up to {TASKS[-1].id})")
        return 2
    text = (ROOT / task.chapter).read_text(encoding="utf-8")
    failed, report = run_examples(task.id, examples(text, "stages")[f"Task {task.id} · {task.name}"])
    print(report or f"The examples of task {task.id} print what the guide says.")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
