"""What ``--kv-transfer-config`` says: how KV blocks travel between engines, and which end of the way this engine is."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

CONNECTORS, ROLES = ("shm", "tcp"), ("kv_producer", "kv_consumer")
EXAMPLE = '{"kv_connector": "tcp", "kv_role": "kv_producer", "kv_addresses": ["127.0.0.1:14579"]}'


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Keys of the JSON object; the first two and `kv_buffer_size` have vLLM's names.

    Attributes:
        kv_connector: "tcp": through a connection; "shm": through memory that two processes of one machine share.
        kv_role: "kv_producer": computes prompts and hands their blocks out; "kv_consumer": fetches them, and writes answers.
        kv_addresses: a producer's own, one; those of all producers that a consumer may ask. HOST:PORT for tcp, the path of a
            Unix socket for shm.
        kv_buffer_size: most bytes of blocks that a producer keeps for those who come for them.
        kv_lease_seconds: so long it keeps them.

    Raises:
        ValueError: a value is none of its choices, of another type, or out of range.
    """

    kv_connector: str
    kv_role: str
    kv_addresses: tuple[str, ...]
    kv_buffer_size: int = 1 << 30
    kv_lease_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, choices in (("kv_connector", CONNECTORS), ("kv_role", ROLES)):
            if getattr(self, name) not in choices:
                raise _refusal(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not self.kv_addresses or not all(isinstance(address, str) for address in self.kv_addresses):
            raise _refusal("kv_addresses is a list of texts, one at least")
        if self.is_producer and len(self.kv_addresses) > 1:
            raise _refusal("a kv_producer has one address")
        for address in self.kv_addresses:
            host, _, port = address.rpartition(":")
            if self.kv_connector == "tcp" and not (host and port.isdecimal() and int(port) < 1 << 16):
                raise _refusal(f"{address!r} is no address for tcp; write HOST:PORT")
            if self.kv_connector == "shm" and "/" not in address:
                raise _refusal(f"{address!r} is no address for shm; write the path of a Unix socket, such as ./kv.sock")
        for name in ("kv_buffer_size", "kv_lease_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise _refusal(f"{name} is a number above 0, not {value!r}")

    @property
    def is_producer(self) -> bool:
        """Whether this engine computes prompts for others."""
        return self.kv_role == "kv_producer"

    @classmethod
    def parse(cls, text: str) -> TransferConfig:
        """From JSON.

        Raises:
            ValueError: it is no object of known keys with good values; the message says what is wrong.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise _refusal(f"not valid JSON ({error}); write for example '{EXAMPLE}'") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or (missing := [key for key in known[:3] if key not in values]):
            raise _refusal(f"no {missing[0]} given; write for example '{EXAMPLE}'" if isinstance(values, dict) else "no object")
        if unknown := [key for key in values if key not in known]:
            raise _refusal(f"there is no {unknown[0]!r}; the keys are {', '.join(known)}")
        addresses = values["kv_addresses"]
        return cls(**{**values, "kv_addresses": tuple(addresses) if isinstance(addresses, list) else ()})


def _refusal(text: str) -> ValueError:
    return ValueError(f"--kv-transfer-config: {text}")
