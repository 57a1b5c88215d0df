"""The real model answers through the learner's stages, and whose code it was: ``make run-mine STAGES=1``."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.course.tools.catalog import CourseError, Stage
from stages.course.tools.failure import describe, todo_task
from stages.course.tools.page import places, problem_panel
from stages.course.tools.preflight import inspect_stage, relative

MAX_MODEL_LEN = 1024
COMPANIONS = ["The sea is", "A good cook", "In the year 1900", "My favourite number is", "The train to", "Once upon a time"]
"""Prompts that run beside the learner's, so that there is a batch to look at."""


def check_ready(console: Console, chosen: list[Stage]) -> None:
    """See that the chosen stages can run before the model is loaded.

    Raises:
        CourseError: a task is not written, or a file cannot be used; the message says which.
    """
    for stage in chosen:
        inspection = inspect_stage(stage)
        for problem in inspection.problems:
            console.print(problem_panel(problem))
        if inspection.problems:
            raise CourseError(f"stage {stage.number} cannot run yet; see above")
        for task in stage.core:
            if inspection.open_targets(task):
                place = places(stage, task, inspection)[0]
                raise CourseError(
                    f"task {task.id}, {task.title}, is not done yet: {place}\nThe model can answer when all tasks of stage "
                    f"{stage.number} without a star are: make test-stage-{stage.number}"
                )


def run_mine(console: Console, chosen: list[Stage], prompt: str, model: str) -> int:
    """Answer a prompt, and print what ran and what memory it took.

    Returns:
        Exit code: 1 when the learner's code raised.

    Raises:
        CourseError: a stage is not ready.
    """
    check_ready(console, chosen)
    # In float32 the answer is the same on every machine; in bfloat16 a small model's near ties may fall either way.
    settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16, "dtype": "float32"}
    for stage in chosen:
        settings |= stage.settings
    try:
        memory = _answer(console, prompt, model, settings)
    except Exception as error:
        missing = todo_task(error)
        if missing is not None:
            raise CourseError(f"task {missing} is not done yet: {error}") from None
        console.print(f"[red]Your code stopped the engine:[/]\n{escape(describe(None, error, error.__traceback__))}")
        return 1
    console.print(_modules_table(chosen))
    console.print(memory)
    return 0


def _answer(console: Console, prompt: str, model: str, settings: dict[str, Any]) -> str:
    """Stream the answer to the terminal beside other requests; returns a sentence on the memory at the fullest step."""
    from stages.batching.sampling_params import RequestOutputKind, SamplingParams
    from stages.core.config import EngineConfig
    from stages.core.engine import LLMEngine

    with console.status(f"loading {model}"):
        engine = LLMEngine(EngineConfig(model=model, **settings))
    messages = [{"role": "user", "content": prompt}]
    ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    greedy = SamplingParams(temperature=0, max_tokens=48, output_kind=RequestOutputKind.DELTA)
    engine.add_request("yours", {"prompt_token_ids": ids}, greedy)
    for index, text in enumerate(COMPANIONS):
        engine.add_request(
            f"companion {index}", text, SamplingParams(temperature=0.8, seed=index, max_tokens=24, n=1 + index % 2)
        )
    console.print(f"[bold]{escape(prompt)}[/]")
    size = engine.config.block_size
    most = (0, 0, 0)  # blocks, tokens, sequences of the fullest step
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "yours":
                console.print(escape(output.outputs[0].text), end="")
        running = engine.scheduler.running
        used = engine.block_manager.allocator.num_used
        most = max(most, (used, sum(seq.num_computed_tokens for seq in running), len(running)))
    console.print("\n")
    engine.scheduler.check_invariants()
    blocks, tokens, sequences = most
    if not blocks:
        raise RuntimeError("no sequence held a block between two steps")
    slots, reserved = blocks * size, sequences * MAX_MODEL_LEN
    return (
        f"Memory at the fullest step: {sequences} sequences with {tokens} tokens in {blocks} blocks of {size}, {slots} slots.\n"
        f"Contiguous caching would reserve {sequences} × {MAX_MODEL_LEN} = {reserved} slots, {reserved / slots:.1f} times that."
    )


def _modules_table(chosen: list[Stage]) -> Table:
    """Whose code ran, file by file, the learner's first."""
    table = Table("file", "whose", title="whose code ran", title_justify="left")
    rows = []
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not name.startswith("stages.") or name.startswith(("stages.course", "stages.make_starters")) or file is None:
            continue
        stage = next((stage for stage in chosen if str(stage.path) in file), None)
        whose = "the reference" if stage is None else f"[green]yours, stage {stage.number}[/]"
        rows.append((stage is None, relative(file), whose))
    ran = {file for _, file, _ in rows}
    idle = [relative(stage.path / file) for stage in chosen for file in stage.files]
    rows += [(False, file, "[dim]yours, not needed for this answer[/]") for file in idle if file not in ran]
    for _, file, whose in sorted(rows):
        table.add_row(file, whose)
    return table
