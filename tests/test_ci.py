"""What CI installs: the programs that a fresh machine lacks, where it may; else it says by name what goes untested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
ARM = "g++-aarch64-linux-gnu qemu-user-static"

APT = """\
#!{bash}
echo "$@" >> {log}
[ "$1" = install ] && [ {works} = 1 ] && for name in clang++ aarch64-linux-gnu-g++ qemu-aarch64-static chromium; do
  printf '#!{bash}\\ncat >/dev/null\\n' > {folder}/$name; chmod +x {folder}/$name
done
exit 0
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with nothing but bash and cat."""
    for name in ("bash", "cat", "chmod"):
        (tmp_path / name).symlink_to(shutil.which(name))
    return tmp_path


def install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def tools(folder: Path, user: int) -> list[str]:
    install(folder, "id", f"#!{BASH}\necho {user}\n")
    run = subprocess.run([BASH, ROOT / ".ci/tools"], env={"PATH": str(folder)}, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout.splitlines()


def test_what_cannot_be_installed_is_named(machine: Path) -> None:
    for user, why in ((1000, "only root may install it"), (0, "there is no apt-get")):
        assert tools(machine, user) == [
            f"NOT TESTED: the C++ kernels by clang++. There is no clang, and {why}; on Debian: apt install clang",
            f"NOT TESTED: the C++ kernels for Arm. There is no arm-compiler, and {why}; on Debian: apt install {ARM}",
            f"NOT TESTED: the page in a browser. There is no chromium, and {why}; on Debian: apt install chromium",
        ]


@pytest.mark.parametrize("works", [True, False])
def test_root_installs_what_is_missing(works: bool, machine: Path) -> None:
    log = machine / "log"
    install(machine, "apt-get", APT.format(bash=BASH, log=log, works=int(works), folder=machine))
    said = tools(machine, 0)
    assert said[0] == "Installing clang"
    assert "install -y -qq --no-install-recommends clang" in log.read_text().splitlines()
    named = [line for line in said if line.startswith("NOT TESTED")]
    assert len(named) == (0 if works else 3)
    assert all("apt-get could not install it" in line for line in named)


def test_what_is_there_is_left_alone(machine: Path) -> None:
    for name in ("clang++", "aarch64-linux-gnu-g++", "qemu-aarch64-static", "google-chrome"):
        install(machine, name, f"#!{BASH}\ncat >/dev/null\n")
    assert tools(machine, 1000) == []


def test_ci_runs_the_gate_on_every_change_and_everything_at_night() -> None:
    text = (ROOT / ".ci/run").read_text()
    gate, night = text.split('if [ "${1:-}" = all ]; then\n')
    assert re.findall(r"^phase \S+ (.*)$", gate, re.MULTILINE) == [
        ".ci/tools | tee \"$untested\"", "make setup", "make lint", "make guide ARGS=build", "make test", "make check-course"
    ]  # fmt: skip
    for command in ("make test-slow", "make notebooks", "make fuzz MINUTES=2", "make test-cpu-kernels CXX=clang++"):
        assert f" {command}" in night
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"run: (\.ci/run.*)", workflow) == [".ci/run", ".ci/run all"]
    unknown = subprocess.run([BASH, ROOT / ".ci/run", "some"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stdout, unknown.stderr) == (2, "", "usage: .ci/run [all]\n")


def test_the_container_and_the_workflow_call_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    recipe = (ROOT / "Dockerfile").read_text()
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    commands = re.findall(r"\bmake ([a-z][a-z0-9-]*)", recipe) + re.findall(r'"make", "([a-z-]+)"', recipe)
    commands += re.findall(r"make ([a-z-]+)", container["postCreateCommand"])
    assert {"setup", "serve"} <= set(commands) <= targets
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for command in re.findall(r"run: (?:sudo )?(\S+)", workflow):
        assert os.access(ROOT / command, os.X_OK), command
