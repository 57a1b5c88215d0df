"""What `make doctor` reports, on fake machines and on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from solutions.core import doctor
from solutions.models.loader import resolve_model


def install(folder: Path, command: str, output: str) -> None:
    """Put a program into the folder that prints `output`, whatever it is asked."""
    program = folder / command
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)


def test_the_first_compiler_that_is_installed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    install(tmp_path, "byov-clang", "Apple clang version 16.0.0 (clang-1600.0.26)\nTarget: arm64-apple-darwin")
    assert doctor.tool_version(["byov-gcc", "byov-clang"], r"(\d+\.\d+\.\d+)") == "byov-clang 16.0.0"
    install(tmp_path, "byov-gcc", "byov-gcc (Debian 12.2.0-14) 12.2.0")
    assert doctor.tool_version(["byov-gcc", "byov-clang"], r"(\d+\.\d+\.\d+)") == "byov-gcc 12.2.0"


def test_no_compiler_is_none_and_a_silent_one_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor.tool_version(["byov-gcc"], r"(\d+\.\d+)") is None
    install(tmp_path, "byov-gcc", "")
    assert doctor.tool_version(["byov-gcc"], r"(\d+\.\d+)") == "byov-gcc (version unknown)"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sse2", "avx2", "avx512f", "avx512_bf16"}, "AVX2 AVX512 AVX512-BF16"),
        ({"asimd", "i8mm", "bf16"}, "NEON Arm-BF16 Arm-I8MM"),
        ({"advsimd", "feat_bf16"}, "NEON Arm-BF16"),
        ({"sse2"}, "none known"),
    ],
)
def test_instruction_sets_have_names_for_people(flags: set[str], expected: str) -> None:
    assert doctor.instruction_sets(frozenset(flags)) == expected


def test_the_report_names_what_is_there_and_what_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    doctor.main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert {"system", "PyTorch", "processor", "nvcc", "GPU"} <= lines.keys()
    assert lines["model"].strip() == "smollm2-135m"
    assert lines["threads"].strip() == "3"
    assert lines["dtype"].partition(",")[0].strip() in ("bfloat16", "float32", "float16")
    assert lines["longest"].split() == ["sequence", "8192", "tokens"]  # SmolLM2's context


def test_without_the_model_the_machine_is_still_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "resolve_model", lambda name: resolve_model("/no/such/model"))
    with pytest.raises(SystemExit, match="The engine cannot start: there is no model '/no/such/model'"):
        doctor.main()
    assert "PyTorch" in capsys.readouterr().out
