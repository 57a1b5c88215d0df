"""No setting is taken and ignored: each flag, field of a record or of a request, and `make` variable has a reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.config import EngineConfig
from solutions.serving import answer_forms, embeddings, openai_protocol, tokenizer_routes
from tests.readers import Readers, flags_of

ROOT = Path(__file__).parents[1]
ENGINE = sorted(path for path in (ROOT / "solutions").rglob("*.py") if "tests" not in path.parts)
PATHS = [*ENGINE, *sorted((ROOT / "benchmarks").glob("*.py"))]

RECORDS = (
    "EngineConfig",
    "SchedulerConfig",
    "SpeculativeConfig",
    "TransferConfig",
    "SamplingParams",
    "StructuredOutput",
    "ReplicaSettings",
    "Limits",
    "ModelConfig",
    "Pooling",
    "PoolingParams",
    "Recipe",
)
REQUESTS = sorted(
    name for name, value in (vars(answer_forms) | vars(openai_protocol) | vars(tokenizer_routes) | vars(embeddings)).items()
    if isinstance(value, type) and issubclass(value, openai_protocol.Request) and value is not openai_protocol.Request
)  # fmt: skip

BY_NAME = {*SamplingParams.__dataclass_fields__, *answer_forms.FORMS, *answer_forms.StructuredOutputs.model_fields}
"""Fields of a request that its methods copy or look through by their names; SamplingParams' own fields have readers."""

ACCEPTED = {
    ("GenerationRequest", "user"): "says who the client's user is",
    ("EmbeddingRequest", "user"): "says who the client's user is",
    ("EmbeddingRequest", "add_special_tokens"): "has one value, which is what happens",
    ("JsonSchema", "name"): "a title",
    ("JsonSchema", "description"): "tells a model what the form is for; ours follows it anyway",
    ("JsonSchema", "strict"): "an answer follows the schema always",
    ("ResponseFormat", "type"): "is compared by its name, as the other forms have none",
    ("Recipe", "method"): "a part of the result's identity, which is made of all fields",
}
"""What nobody reads by its attribute, and why that is right."""

COPIED = {
    "solutions/quantization/layerwise.py": "Recipe",
    "solutions/serving/replicas/replica_settings.py": "ReplicaSettings",
    "solutions/benchmarks/datasets.py": "Workload",
}
"""Files whose flags fill a record by the names of its fields → that record."""


@pytest.fixture(scope="module")
def readers() -> Readers:
    return Readers(PATHS)


def test_every_setting_of_the_engine_has_a_flag_and_a_reader(readers: Readers) -> None:
    assert readers.records["EngineConfig"].fields == list(EngineConfig.__dataclass_fields__)
    assert readers.unread("EngineConfig") == []


@pytest.mark.parametrize("record", [*RECORDS, *REQUESTS])
def test_every_field_has_a_reader(record: str, readers: Readers) -> None:
    assert readers.records[record].fields
    accepted = {name for owner, name in ACCEPTED if owner == record} | (BY_NAME if record in REQUESTS else set())
    assert [name for name in readers.unread(record) if name not in accepted] == []


def test_what_is_accepted_without_a_reader_has_none(readers: Readers) -> None:
    assert [entry for entry in ACCEPTED if entry[1] not in readers.unread(entry[0])] == []


@pytest.mark.parametrize("path", [path for path in PATHS if any(flags_of(path))], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_has_a_reader(path: Path, readers: Readers) -> None:
    flags = dict(flags_of(path))
    read = set(readers.flag_reads[path])
    if record := COPIED.get(str(path.relative_to(ROOT))):
        read |= {*readers.records[record].fields}
    if path.stem == "datasets":  # whose flags are a part of the benchmarks': each of them reads what is left
        users = [other for other in PATHS if "add_workload_flags(parser)" in other.read_text()]
        read |= set.intersection(*(readers.flag_reads[user] for user in users))
    assert [flag for name, flag in flags.items() if name not in read] == []


def test_every_make_variable_is_used_and_every_one_in_a_line_of_help_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    variables = re.findall(r"^([A-Z_]+) *:?=", makefile, re.MULTILINE)
    assert {"MODEL", "ARGS", "SANITIZE"} <= {*variables}
    of_make = {"SHELL"}
    assert [name for name in variables if name not in of_make and not re.search(rf"\$\((?:origin )?{name}\b", makefile)] == []
    named = {name for line in re.findall(r"## (.*)", makefile) for name in re.findall(r"\b([A-Z_]{2,})=", line)}
    of_the_environment = {"CXX", "STAGES"}
    assert named - {*variables} - of_the_environment <= {"NAME"}  # as in ARGS="--url NAME=URL"


# The finder of readers itself

SOURCE = """
from dataclasses import dataclass

@dataclass
class Settings:
    read: int
    through_self: int
    by_a_call: int
    in_a_loop: int
    only_checked: int
    only_in_the_error: int
    only_copied: int
    of_another: int

    def __post_init__(self) -> None:
        if self.only_checked < 0:
            raise ValueError(f"{self.only_checked} {self.only_in_the_error}")

@dataclass
class Other:
    of_another: int

def make() -> Settings: ...

class User:
    def __init__(self, settings: Settings, other: Other) -> None:
        self.settings = settings
        print(settings.read, other.of_another)

    def use(self, many: list[Settings]) -> None:
        copies = {name: getattr(self.settings, name) for name in ("only_copied",)}
        self.settings.only_copied = 1
        print(self.settings.through_self, make().by_a_call, [one.in_a_loop for one in many])
"""


def test_a_field_that_is_only_checked_copied_or_anothers_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert Readers([path]).unread("Settings") == ["only_checked", "only_in_the_error", "only_copied", "of_another"]


@pytest.mark.parametrize("annotation", ["argparse.Namespace", "Flags"])
def test_flags_are_read_of_a_namespace_by_either_of_its_names(annotation: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"import argparse\nFlags = argparse.Namespace\ndef f(a: {annotation}, b: Other): print(a.read, b.others)\n")
    assert Readers([path]).flag_reads[path] == {"read"}


def test_a_flag_that_nobody_reads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import argparse\n"
        "def main():\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--used', '-u')\n"
        "    parser.add_argument('--not-used', type=int)\n"
        "    args = parser.parse_args()\n"
        "    if args.not_used < 1:\n"
        "        parser.error('--not-used must be more than 0')\n"
        "    print(args.used)\n"
    )
    assert dict(flags_of(path)) == {"used": "--used", "not_used": "--not-used"}
    assert Readers([path]).flag_reads[path] == {"used"}
