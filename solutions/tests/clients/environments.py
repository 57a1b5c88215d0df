"""An environment for each client: a folder of the cache with the pinned packages, made when it is first asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from solutions.core.platform.machine import cache_root

HERE = Path(__file__).parent


class UnavailableError(Exception):
    """The client's packages cannot be had here; the message says why in one line."""


@dataclass(frozen=True)
class Client:
    """A row of the catalogue.

    Attributes:
        name: what people call it. script: of this folder; it prints a line of JSON for each feature.
        packages: pinned, for pip or, if the script is JavaScript, for npm; the first one is the client itself.
    """

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def version(self) -> str:
        return self.packages[0].replace("==", "@").rpartition("@")[2]

    @property
    def in_node(self) -> bool:
        return self.script.endswith(".mjs")

    @property
    def folder(self) -> Path:
        """Where its environment is, or will be."""
        made_of = repr((sys.version_info[:2], self.packages))
        return cache_root() / "clients" / f"{Path(self.script).stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"


def catalogue() -> list[Client]:
    """All clients, in the table's order."""
    rows = tomllib.loads((HERE / "catalogue.toml").read_text(encoding="utf-8"))["client"]
    return [Client(row["name"], row["script"], tuple(row["packages"])) for row in rows]


def command(client: Client) -> list[str]:
    """What runs the client's script; the environment is made if it is not there.

    Raises:
        UnavailableError: the packages cannot be installed.
    """
    folder = client.folder
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (_fill_node if client.in_node else _fill_python)(client)
        (folder / "ready").touch()
    if client.in_node:  # Node looks for packages beside the script
        for path in (HERE / "shared.mjs", HERE / client.script):
            shutil.copy(path, folder)
        return ["node", str(folder / client.script)]
    return [str(folder / "bin" / "python"), str(HERE / client.script)]


def _fill_python(client: Client) -> None:
    _run([sys.executable, "-m", "venv", "."], client)
    _run(["bin/python", "-m", "pip", "install", "--quiet", "--no-input", "--prefer-binary", *client.packages], client)


def _fill_node(client: Client) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        raise UnavailableError("Node and npm are not installed")
    (client.folder / "package.json").write_text('{"private": true, "type": "module"}')
    _run(["npm", "install", "--no-fund", "--no-audit", *client.packages], client)


def _run(words: list[str], client: Client) -> None:
    """Run a command in the environment's folder; its last error is the reason if it fails."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(words, cwd=client.folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise UnavailableError(f"{words[0]} says: {errors[-1].strip()[:200]}")
