"""The adapters of an engine: their names, and which slot of the model each lies in.

A request holds its adapter by the slot. An adapter that is unloaded loses its name at once, so no new request can ask for it;
its weights stay until the last request that has them is done, and only then another adapter may have the slot.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # the server reads this file before it has its port, and torch takes seconds to import
    from ...batching.sequence import Sequence
    from ...models.lora.adapter_files import Adapter


class UnknownAdapterError(ValueError):
    """A request names an adapter that is not loaded, or no more."""


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter as vLLM's `LLM.generate` is asked for it; `lora_int_id` is vLLM's own number and means nothing here."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def folder_at(path: str) -> Path:
    """The folder that a path means.

    Raises:
        ValueError: it begins with the home of nobody.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse(*_: object) -> NoReturn:
    raise ValueError("this engine takes no LoRA adapters; start it with --enable-lora")


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter that requests can name.

    Attributes:
        created: in seconds since 1970.
        salt: begins the cache salt of its requests: keys and values of one adapter are none of another's. Nobody can guess it,
            so no salt of a request can stand for it, and it is a new one for weights that are loaded anew.
    """

    slot: int
    folder: Path
    created: int = field(default_factory=lambda: int(time.time()))
    salt: str = field(default_factory=lambda: secrets.token_hex(16))


class AdapterRegistry:
    """Names and slots. All methods but `read` are for the engine's thread.

    Args:
        num_slots: most adapters at once; 0, and nothing else: none are taken.
        read: reads a folder, without changing anything. load: puts what was read into a slot.
        unfinished: the sequences that wait or run.

    Attributes:
        loaded: by name.
    """

    def __init__(
        self, num_slots: int, read: Callable[[Path], Adapter] = _refuse,
        load: Callable[[int, Path, Adapter], None] = _refuse, unfinished: Callable[[], Iterable[Sequence]] = tuple,
    ) -> None:  # fmt: skip
        self.num_slots = num_slots
        self._read, self._load, self._unfinished = read, load, unfinished
        self.loaded: dict[str, Loaded] = {}

    def read(self, folder: Path) -> Adapter:
        """Read an adapter and see that the model can have it; any thread may.

        Raises:
            ValueError: it cannot.
        """
        return self._read(folder)

    def add(self, name: str, folder: Path, adapter: Adapter, replace: bool = False) -> None:
        """Give an adapter that `read` has given a name and a slot; with `replace` it may take the name from another one.

        Raises:
            ValueError: the name is taken, or no slot is free.
        """
        if name in self.loaded and not replace:
            raise ValueError(f"The lora adapter {name!r} has already been loaded.")
        used = {entry.slot for other, entry in self.loaded.items() if other != name}
        held = {seq.adapter for seq in self._unfinished()} - used
        free = [slot for slot in range(1, self.num_slots + 1) if slot not in used | held]
        if not free:
            waits = f", {len(held - {0})} for requests that still run" if held - {0} else ""
            raise ValueError(f"all {self.num_slots} adapters of --max-loras are in use{waits}; unload one first")
        self._load(free[0], folder, adapter)
        self.loaded[name] = Loaded(free[0], folder)

    def remove(self, name: str) -> None:
        """Take an adapter's name away. Requests that have it go on.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        self._entry(name)
        del self.loaded[name]

    def as_now(self, name: str) -> str | Loaded:
        """The adapter of this name, for several requests of which each must have the same; the name if there is none."""
        return self.loaded.get(name, name)

    def lend(self, adapter: str | Loaded, sequences: list[Sequence]) -> None:
        """Let new sequences be computed by an adapter.

        Raises:
            UnknownAdapterError: there is none of that name, or this one is not loaded any more.
        """
        if isinstance(adapter, Loaded) and adapter not in self.loaded.values():
            raise UnknownAdapterError("The lora adapter was unloaded while a search went on with it.")
        entry = adapter if isinstance(adapter, Loaded) else self._entry(adapter)
        for seq in sequences:
            seq.adapter = entry.slot
            seq.cache_salt = entry.salt + (seq.cache_salt or "")

    def load_all(self, modules: Iterable[str]) -> None:
        """Load what ``--lora-modules`` lists, each as ``NAME=FOLDER``.

        Raises:
            ValueError: an entry is not of this form, or its adapter cannot be loaded.
        """
        for module in modules:
            name, equals, folder = module.partition("=")
            if not (name and equals and folder):
                raise ValueError(f"--lora-modules: {module!r} is not NAME=FOLDER")
            path = folder_at(folder)
            self.add(name, path, self.read(path))

    def name_of(self, request: LoRARequest) -> str:
        """The name of an adapter, which is loaded if it is not there yet.

        Raises:
            ValueError: it cannot be loaded, or the name is another folder's.
        """
        name, folder = request.lora_name, folder_at(request.lora_path)
        if name not in self.loaded:
            self.add(name, folder, self.read(folder))
        elif self.loaded[name].folder != folder:
            raise ValueError(f"the adapter {name!r} is that of {self.loaded[name].folder}, not of {folder}")
        return name

    def _entry(self, name: str) -> Loaded:
        if name not in self.loaded:
            raise UnknownAdapterError(f"The lora adapter {name!r} cannot be found.")
        return self.loaded[name]
