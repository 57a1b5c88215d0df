"""Tries the schemas of a folder, such as ``data/`` of JSONSchemaBench (Geng et al., 2025): which are refused, and is a random
answer of the others ever invalid?

``python -m tests.schema_bench FOLDER --sample 24 --seed 1``
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.validators import extend, validator_for
from rich.console import Console
from rich.progress import track
from rich.table import Table

from solutions.core.grammar.json_schema import to_grammar
from tests.fuzz.schemas import compiler, multiple, walk

OUTCOMES = ("valid", "endless", "refused", "INVALID")


def try_schema(schema: Any, rng: random.Random, walks: int) -> tuple[str, str]:
    """One of `OUTCOMES`, and what there is to say: "valid" when all answers are, "endless" when no walk came to an end."""
    try:
        grammar = compiler().compile_grammar(to_grammar(json.dumps(schema)))
    except ValueError as error:
        return "refused", str(error)
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = extend(kind, {"multipleOf": multiple})(schema)
    answers = [answer for _ in range(walks) if (answer := walk(grammar, rng)) is not None]
    for answer in answers:
        if error := next(validator.iter_errors(json.loads(answer)), None):
            return "INVALID", f"{answer[:200]}: {error.message[:200]}"
    return ("valid" if answers else "endless"), ""


def main() -> int:
    """Print what became of the schemas, set by set; returns 1 if an answer was invalid."""
    parser = argparse.ArgumentParser(prog="python -m tests.schema_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of folders of .json files, each a schema")
    parser.add_argument("--sample", type=int, default=24, metavar="N", help="schemas of each folder (default: 24)")
    parser.add_argument("--walks", type=int, default=6, metavar="N", help="answers of each schema (default: 6)")
    parser.add_argument("--seed", type=int, default=1, help="chooses schemas and answers (default: 1)")
    args = parser.parse_args()
    rng, console, found = random.Random(args.seed), Console(), Counter()
    sets = sorted(path for path in args.folder.iterdir() if path.is_dir())
    if not sets:
        sys.exit(f"error: {args.folder} has no folders of schemas")
    for folder in sets:
        files = sorted(folder.glob("*.json"))
        for file in track(rng.sample(files, min(args.sample, len(files))), folder.name, console=console, transient=True):
            outcome, text = try_schema(json.loads(file.read_text(encoding="utf-8")), rng, args.walks)
            found[folder.name, outcome] += 1
            if text:
                console.print(f"{folder.name}/{file.name} {outcome}: {text}", markup=False, highlight=False, soft_wrap=True)
    table = Table("schemas", *OUTCOMES)
    for folder in sets:
        table.add_row(folder.name, *(str(found[folder.name, outcome]) for outcome in OUTCOMES))
    console.print(table)
    console.print(f"seed {args.seed}, XGrammar {version('xgrammar')}", highlight=False)
    return int(any(outcome == "INVALID" for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
