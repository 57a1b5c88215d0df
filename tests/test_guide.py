"""The guide tells the truth: its files, symbols, commands and links exist, its examples run, its measurements are on record."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from solutions.models.config.aliases import ALIASES
from solutions.models.costs.roofline import CARDS, decode_cost
from stages.course.tools.catalog import Stage, Task
from tests.guide import (
    COURSE,
    FILES,
    FOREIGN,
    PARTS,
    ROOT,
    TASKS,
    Names,
    anchors,
    code_of,
    dead_links,
    examples,
    inline_code,
    main,
    missing_paths,
    printed_answers,
    run_examples,
    section_problems,
    sections,
    table_of_tasks,
    task_problems,
    unfinished_engine,
    unknown_commands,
)

TEXTS = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
HUB, *_ = TEXTS.values()
GUIDE = "\n".join(TEXTS.values())
RESULTS = ROOT / "benchmarks/results"
NAMES = Names.of(ROOT / "solutions")
SECTIONS = sections(GUIDE)
EXAMPLES = examples(GUIDE)


@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: str(stage.number))
def test_every_chapter_and_task_stands_at_its_anchor_in_order(stage: Stage) -> None:
    assert section_problems(TEXTS[stage.chapter], stage) == []


def test_the_parts_come_in_order_and_no_anchor_twice() -> None:
    parts = [name for name in anchors(GUIDE) if not name.startswith("task-")]
    assert parts == ["preface", "tasks", *(f"chapter-{stage.number}" for stage in COURSE), "appendix-a", "appendix-b"]
    assert len(set(anchors(GUIDE))) == len(anchors(GUIDE)), "an anchor is there twice"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_every_task_has_all_parts_and_names_its_functions(task: Task) -> None:
    stage = next(stage for stage in COURSE if stage.number == task.stage)
    assert task_problems(SECTIONS[task.guide], stage, task) == []


def test_the_table_of_tasks_is_the_course() -> None:
    assert re.findall(r"^\| \[\d.*$", sections(HUB)["tasks"], re.MULTILINE) == table_of_tasks(COURSE)


def test_every_path_exists() -> None:
    assert missing_paths(GUIDE) == []


def test_every_command_exists() -> None:
    assert unknown_commands(GUIDE) == []


@pytest.mark.parametrize("file", FILES)
def test_every_link_leads_somewhere(file: str) -> None:
    assert dead_links(TEXTS[file], file) == []


def test_the_hub_leads_to_every_file() -> None:
    assert [file for file in FILES[1:] if f"]({file})" not in HUB] == []


@pytest.mark.parametrize("name", SECTIONS)
def test_every_symbol_exists_in_the_engine(name: str) -> None:
    codes = [code for code in inline_code(SECTIONS[name]) if not code.startswith(("stages.", "make "))]
    if name.startswith("task-"):
        assert [code for code in codes if not NAMES.resolves(code)] == []
    else:  # a preface speaks of Python and of the shell too: there it is what looks like a class or a call
        strict = [code for code in codes if re.match(r"[A-Z]\w*[a-z]\w*(\.|$)|\w+\(", code)]
        assert [
            code for code in strict if not NAMES.resolves(code) and code not in ("OrderedDict", "NotImplementedError")
        ] == []


def test_every_module_exists() -> None:
    modules = re.findall(r"\bstages((?:\.[a-z_0-9]+)+)", code_of(GUIDE))
    assert modules
    assert [name for name in modules if not (ROOT / "solutions" / (name[1:].replace(".", "/") + ".py")).is_file()] == []


def test_no_foreign_name_is_listed_in_vain() -> None:
    codes = [re.sub(r"\(.*", "", code) for task in TASKS for code in inline_code(SECTIONS[task.guide])]
    assert FOREIGN - set(codes) == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_print_what_the_guide_says(name: str) -> None:
    failed, report = run_examples(name, EXAMPLES[name])
    assert failed == 0, report


def test_every_task_has_an_example() -> None:
    assert [task.id for task in TASKS if f"Task {task.id} · {task.name}" not in EXAMPLES] == []


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_the_example_of_a_task_needs_that_task_and_no_later_one(tmp_path: Path, task: Task) -> None:
    stage = next(stage for stage in COURSE if stage.number == task.stage)
    code = EXAMPLES[f"Task {task.id} · {task.name}"]
    at = stage.tasks.index(task)
    for first, todo in ((at + 1, "later"), (at, "its own")):
        with unfinished_engine(tmp_path / todo, stage, stage.tasks[first:]) as engine:
            failed, report = run_examples(task.id, code.replace("from solutions.", f"from {engine}."))
            assert (failed > 0) == (todo == "its own"), report
            assert failed == 0 or re.search(rf'(NotImplementedError: |#error "){task.marker}', report)


def test_a_reader_can_run_the_examples_of_a_task() -> None:
    command = [sys.executable, "-m", "tests.guide", "1.1"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"STAGES": ""}, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "The examples of task 1.1 print what the guide says.\n")
    assert "`STAGES=1 .venv/bin/python -m tests.guide 1.2`" in GUIDE


def test_a_reader_who_asks_for_no_task_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["9.9"]) == 2
    assert "1.1" in capsys.readouterr().out


def test_the_guide_prints_no_answers() -> None:
    assert printed_answers(GUIDE) == []


def test_lines_fit_an_editor() -> None:
    lines = GUIDE.splitlines()
    assert [line for line in lines if len(line) > 120] == []


def test_measured_memory_is_the_record() -> None:
    systems = {s["system"]: s for s in json.loads((RESULTS / "memory.json").read_text())["results"]["systems"]}
    rows = {
        "contiguous, 2,048 slots reserved for each sequence": "contiguous, max 2048",
        "contiguous, 768 slots: the longest that really comes": "contiguous, max 768",
        "contiguous, output rounded up to a power of two": "contiguous, pow2",
        "contiguous, the final length known in advance, first fit": "contiguous, oracle (first fit)",
        "paged, blocks of 128": "paged, 128",
        "paged, blocks of 16": "paged, 16",
    }
    section = SECTIONS["chapter-1"].replace("*", "")
    for row, name in rows.items():
        assert f"| {row} | {100 * systems[name]['tokens']:.1f} % | {systems[name]['running']:.1f} |" in section
    assert f"We measured {100 * systems['paged, 16']['waste']:.1f} %" in " ".join(section.split())


def test_measured_speed_is_the_record() -> None:
    speed = json.loads((RESULTS / "epyc-zen4-2core_throughput_mixed.json").read_text())["results"]
    cost = json.loads((RESULTS / "epyc-zen4-2core_overhead.json").read_text())["results"]
    engine, static = speed["engine"]["runs"][0], speed["hf"]["runs"][0]
    steps = engine["details"]["num_steps"]
    row = next(
        row
        for row in cost["microseconds_per_sequence_and_step"]
        if (row["num_seqs"], row["prefix_caching"], row["output_kind"]) == (256, True, "DELTA")
    )
    text = " ".join(GUIDE.split())
    for claim in (
        f"{1000 * engine['seconds'] / steps:.0f} ms on average (measured: {steps} steps in {engine['seconds']:.1f} s)",
        f"{static['num_output_tokens']:,} of the {static['num_computed_tokens']:,} tokens that transformers computed",
        f"({100 * static['details']['useful_share']:.0f} %). This engine gave {engine['output_tokens_per_second']:.0f} output",
        f"transformers {static['output_tokens_per_second']:.0f} (one run each;",
        f"part of the {speed['ratio_engine_to_hf']['median']:.1f}x is the faster CPU code",
        f"our arrays cost {row['phases']['arrays']:.2f} µs",
        f"of the {row['total']:.1f} µs that this engine's",
        f"running, {row['phases']['output']:.1f} are this task",
    ):
        assert claim in text


@pytest.mark.parametrize(("anchor", "names"), [("task-4-4", ["GPTQ", "GPTQ, act-order"]), ("task-4-5", ["AWQ"])])
def test_measured_quality_is_the_record(anchor: str, names: list[str]) -> None:
    runs = json.loads((RESULTS / "epyc-zen4-2core_quality.json").read_text())["results"]["runs"]
    nats = {run["name"]: math.log(run["perplexity"] / runs[0]["perplexity"]) for run in runs}
    text = " ".join(SECTIONS[anchor].split())
    for name in names:
        assert f"{100 * (1 - nats[f'{name}, groups of 64'] / nats['RTN, groups of 64']):.0f} %" in text


@pytest.mark.parametrize("batch", ["1", "32"])
def test_the_profile_is_the_record(batch: str) -> None:
    record = json.loads((RESULTS / "epyc-zen4-2core_profile.json").read_text())["results"]
    rows, ceilings, section = record["batches"][batch], record["ceilings"], SECTIONS["appendix-a"]
    for row in rows:
        cost = [f"{row['bytes'] / 1e6:.1f}", f"{row['operations'] / 1e6:.0f}", f"{1e3 * (row['floor'] or 0):.2f}"]
        cells = [row["operator"], *(cost if row["floor"] is not None else ["", "", ""]), f"{1e3 * row['seconds']:.2f}"]
        assert re.sub(" +", " ", f"| {' | '.join(cells)} |") in section
    floor, seconds = (sum(row[key] or 0 for row in rows) for key in ("floor", "seconds"))
    assert f"| **the step** | | | {1e3 * floor:.2f} | {1e3 * seconds:.2f} |" in section
    read, rate = ceilings["read_bytes"] / 1e9, ceilings["operations"]["bfloat16"] / 1e9
    assert f"read {read:.0f} GB/s and multiplied {rate:.0f} GFLOP/s" in " ".join(section.split())


@pytest.mark.parametrize("batch", [1, 32, 64, 256])
def test_the_floors_are_computed(batch: int) -> None:
    cost = decode_cost(ALIASES["llama-7b"].config, batch, 1024)
    moved = cost.weight_bytes + cost.kv_bytes
    cells = [str(batch), f"{moved / 1e9:.1f}", f"{(cost.product_operations + cost.attention_operations) / 1e12:.2f}"]
    for card in CARDS:
        floor = cost.floor(card)
        cells += [f"{1e3 * floor:.2f}", f"{batch / floor:,.0f}" if moved < card.memory else "too large"]
    assert f"| {' | '.join(cells)} |" in SECTIONS["appendix-b"]


# Each check can fail


def test_the_check_of_sections_sees_what_is_missing() -> None:
    stage, task = COURSE[0], COURSE[0].tasks[1]
    text = TEXTS[stage.chapter]
    assert section_problems(text.replace(f'<a id="{task.guide}"></a>\n', ""), stage) != []
    assert section_problems(text.replace(f"Task {task.id} · {task.title}", f"Task {task.id} · Another"), stage) != []
    assert section_problems(text.replace("# Chapter 1 ·", "# Chapter 2 ·"), stage) != []
    swapped = text.replace('id="task-1-1"', 'id="x"').replace('id="task-1-2"', 'id="task-1-1"').replace('"x"', '"task-1-2"')
    assert section_problems(swapped, stage) != []
    assert section_problems(text + '\n<a id="task-9-9"></a>\n', stage) != []


@pytest.mark.parametrize("part", [*PARTS, "BlockManager.fork", "30 minutes", "TASK=1.3"])
def test_the_check_of_a_task_sees_what_is_missing(part: str) -> None:
    stage, task = COURSE[0], COURSE[0].tasks[2]
    section = SECTIONS[task.guide]
    assert part in section
    assert len(task_problems(section.replace(part, "…"), stage, task)) == 1


def test_the_check_of_a_task_sees_a_wrong_parameter() -> None:
    stage, task = COURSE[0], COURSE[0].tasks[2]
    wrong = SECTIONS[task.guide].replace("fork(parent, child, num_tokens)", "fork(parent, kid, num_tokens)")
    assert task_problems(wrong, stage, task) == ["BlockManager.fork(parent, kid, num_tokens)"]


def test_the_check_of_paths_sees_a_wrong_one() -> None:
    text = "`solutions/core/engine.py`, `solutions/core/motor.py` and `stages/stage9_sleep/` but `vllm/v1/core/sched/x.py`"
    assert missing_paths(text) == ["solutions/core/motor.py", "stages/stage9_sleep/"]


def test_the_check_of_commands_sees_wrong_ones() -> None:
    text = (
        "To make sense: `make test-stage-1 TASK=1.3`\n\n```sh\nmake coffee\nmake hint TASK=1.9\nmake run-mine STAGES=1,8\n```\n"
    )
    assert unknown_commands(text) == ["make coffee", "TASK=1.9", "stage 1,8"]


def test_the_check_of_links_sees_dead_ones() -> None:
    text = '<a id="here"></a>\n[a](#here) [b](#there) [c](../README.md) [d](README.md) [e](https://example.org)'
    text += " [f](../stages/stage1_block_management/GUIDE.md#task-1-2) [g](../IMPLEMENTATION_GUIDE.md#task-1-2)"
    assert dead_links(text, "docs/text.md") == ["#there", "README.md", "../IMPLEMENTATION_GUIDE.md#task-1-2"]


@pytest.mark.parametrize(
    "code",
    [
        "BlockManger",
        "BlockManager.alocate",
        "BlockManager.allocate.x",
        "grab_block(seq)",
        "NULL_BLOCK()",
        "seq.num_computed",
        "num_tokns",
    ],
)
def test_the_check_of_symbols_sees_a_wrong_one(code: str) -> None:
    assert not NAMES.resolves(code)


@pytest.mark.parametrize(
    "code",
    [
        "BlockManager",
        "BlockManager.swap_out(seq)",
        "write_kv(key, value, kv_cache, slot_mapping)",
        "seq.num_computed_tokens",
        "Sequence.output_token_ids",
        "TextReader.read",
        "_SequenceState.num_ready",
        "NULL_BLOCK",
        "[T, H, D]",
        "k % 2",
        "insort",
    ],
)
def test_the_check_of_symbols_knows_a_right_one(code: str) -> None:
    assert NAMES.resolves(code)


def test_the_check_of_examples_sees_a_wrong_number() -> None:
    text = "## Blocks\n\n```python\n>>> from stages.memory.block_allocator import BlockAllocator\n"
    text += ">>> a = BlockAllocator(4)\n```\n"
    text += "\nThen:\n\n```python\n>>> a.allocate()\n0\n```\n"
    (name, code), *_ = examples(text).items()
    assert run_examples(name, code)[0] == 0
    assert run_examples(name, code.replace("\n0\n", "\n1\n"))[0] == 1


def test_the_check_of_answers_sees_one() -> None:
    line = "block, _ = self._free.popitem(last=False)"
    assert printed_answers(f"Write `{line}`.") == [f"BlockAllocator.allocate: {line}"]
