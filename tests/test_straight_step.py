"""A step of the engine reads as the guide tells it, the scheduler runs no model, and a sequence ends in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "solutions"
MOST_LINES = 12
"""Lines of `LLMEngine.step`, its docstring apart."""
WORDS = ["schedule", "draft", "build", "execute", "update", "emit"]
"""What a step calls, in this order."""
NOT_THE_SCHEDULERS = {"models", "speculative", "draft_model", "worker", "executor"}


def engine_files() -> list[Path]:
    """The files of the engine, tests left out."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "tests"]


def method(source: str, owner: str, name: str) -> ast.FunctionDef:
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == owner]
    (found,) = [node for node in classes[0].body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def body_of(function: ast.FunctionDef) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def num_lines(function: ast.FunctionDef) -> int:
    body = body_of(function)
    return body[-1].end_lineno - body[0].lineno + 1


def words_of(function: ast.FunctionDef) -> list[str]:
    """The methods of `WORDS` that a function calls, in the order in which they are run."""

    def calls(node: ast.AST) -> list[str]:
        inner = [name for child in ast.iter_child_nodes(node) for name in calls(child)]
        own = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WORDS
        return [*inner, node.func.attr] if own else inner

    return [name for statement in body_of(function) for name in calls(statement)]


def writes(source: str, name: str) -> list[int]:
    """Lines that set an attribute of an object, but for an initial None."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            found = any(isinstance(p, ast.Attribute) and p.attr == name and isinstance(p.ctx, ast.Store) for p in parts)
            is_initial = isinstance(node.value, ast.Constant) and node.value.value is None
            lines += [node.lineno] if found and not is_initial else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            lines += [node.lineno] if any(isinstance(arg, ast.Constant) and arg.value == name for arg in node.args) else []
    return lines


def unions_of_lists(source: str) -> list[str]:
    """Types that are a list of one thing or of another."""
    unions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)]
    texts = [ast.unparse(node) for node in unions]
    return [text for text in texts if text.count("list[int]") > 1 or text.count("list[TokenLogprobs") > 1]


def imported_names(source: str) -> set[str]:
    """The parts of the names of modules that a file imports, wherever in it."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    return {part for name in (*modules, *names) for part in name.split(".")}


def test_a_step_is_twelve_lines() -> None:
    step = method((ROOT / "core" / "engine.py").read_text(), "LLMEngine", "step")
    assert num_lines(step) <= MOST_LINES


def test_a_step_is_schedule_draft_build_execute_update_emit() -> None:
    step = method((ROOT / "core" / "engine.py").read_text(), "LLMEngine", "step")
    assert words_of(step) == WORDS


def test_the_reason_of_an_end_is_written_once() -> None:
    """`CompletionOutput.join` merges two records for callers; of sequences there is one writer."""
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in engine_files()
        for line in writes(path.read_text(), "finish_reason")
        if path.name != "output.py"
    ]
    assert len(places) == 1, places
    assert places[0].startswith("batching/sequence.py")
    output = (ROOT / "core" / "output.py").read_text()
    join = method(output, "CompletionOutput", "join")
    assert all(join.lineno < line <= join.end_lineno for line in writes(output, "finish_reason"))


def test_nothing_but_a_trial_is_taken_off_again() -> None:
    """Whatever else takes tokens off a sequence would take back what somebody has seen."""
    cuts = []
    for path in engine_files():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Delete) else []
            cuts += [path.name for target in targets if ast.unparse(target).startswith(("seq.tokens", "state.seq.tokens"))]
    places = ["draft_model.py", "lookahead.py", "scheduler.py"]
    assert sorted(cuts) == places, "a trial ends where drafts are made, where a step is decided ahead, and in Scheduler.update"


def test_the_scheduler_runs_no_model() -> None:
    source = (ROOT / "core" / "scheduler.py").read_text()
    assert not imported_names(source) & NOT_THE_SCHEDULERS
    names = {node.name for path in engine_files() for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}
    assert not names & {"SpeculativeScheduler", "_stop_at_string"}


@pytest.mark.parametrize(
    "name", ["core/worker.py", "core/scheduler.py", "core/output.py", "core/sampling/rejection_sampler.py"]
)
def test_results_have_one_form(name: str) -> None:
    assert unions_of_lists((ROOT / name).read_text()) == []


def test_nothing_calls_from_the_output_back_to_the_scheduler() -> None:
    output = (ROOT / "core" / "output.py").read_text()
    assert "Callable" not in imported_names(output)
    assert not imported_names(output) & {"scheduler", "engine"}


def test_the_checks_see_the_old_way() -> None:
    """What stood there before: counters and logprobs in the step, an end in several places, results of two forms."""
    old = '''
class LLMEngine:
    def step(self):
        """Run one iteration."""
        decision = self.scheduler.schedule()
        if not decision.scheduled:
            return []
        self._peak_usage = max(self._peak_usage, self.block_manager.usage)
        batch = self.batch.build(decision, self.block_manager.tables)
        result = self.executor.execute(batch)
        self.scheduler.update(decision, result.token_ids)
        self._counters["steps"] += 1
        for request_id, position, entries in result.prompt_logprobs:
            self.outputs.set_prompt_logprobs(request_id, position, entries)
        now = time.monotonic()
        outputs = self.outputs.emit(decision.sampled, result.logprobs, now)
        for output in outputs:
            if output.finished:
                del self._sequences[output.request_id]
        return outputs
'''
    step = method(old, "LLMEngine", "step")
    assert num_lines(step) == 16 > MOST_LINES
    assert words_of(step) == [word for word in WORDS if word != "draft"]
    ends = 'seq.finish_reason, seq.stop_reason = "stop", found\nstate.seq.finish_reason = "abort"\nseq.finish_reason: str = "x"'
    assert writes(ends, "finish_reason") == [1, 2, 3]
    assert writes("self.finish_reason: str | None = None", "finish_reason") == []
    assert unions_of_lists("token_ids: list[int] | list[list[int]]")
    assert unions_of_lists("x: list[TokenLogprobs | None] | list[list[TokenLogprobs] | None] | None")
    assert imported_names("from .speculative import SpeculativeScheduler") >= {"speculative", "SpeculativeScheduler"}
    assert imported_names("from ..models.loader import load_model") & NOT_THE_SCHEDULERS
