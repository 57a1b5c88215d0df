"""Chooses one of several engines for a request: the one whose cache holds the longest beginning of its prompt.

A prompt is known by the hashes of its first blocks. Each hash covers everything before it, as in an engine's own prefix cache.
The router remembers which engine has seen which hash; it does not ask whether the engine still has that block. An engine with
many more requests than the least loaded one is passed over. So a popular beginning does not overload one engine while others
idle: a second engine learns it, and from then on both share it.

Nothing here knows of Ray, HTTP or engines. Source of the idea: SGLang's cache-aware load balancer (2024).
"""

from __future__ import annotations

import abc
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

BLOCK_TOKENS, BLOCK_CHARACTERS = 16, 64
"""What one hash covers of a prompt in token ids, and in text: about the same."""
MAX_BLOCKS = 512
"""Most hashes of one prompt. What longer prompts share beyond them does not count."""


def prefix_keys(prompt: str | Sequence[int], salt: str = "") -> list[bytes]:
    """Hashes of a prompt's first full blocks, shortest beginning first; none for a prompt shorter than a block.

    Key n stands for the salt and all of the first n blocks, each of `BLOCK_CHARACTERS` or `BLOCK_TOKENS`: two prompts have it
    in common where these are the same, and else not. It is the same in every process. There are at most `MAX_BLOCKS`. The work
    grows with the prompt and not with its square.

    Args:
        prompt: text, in which JSON may have put half of a surrogate pair, or token ids, each of 32 bits.
        salt: prompts with different ones share nothing. It is text of the same kind.
    """
    size = BLOCK_CHARACTERS if isinstance(prompt, str) else BLOCK_TOKENS
    keys: list[bytes] = []
    parent = blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
    for start in range(0, min(len(prompt) - size + 1, MAX_BLOCKS * size), size):
        block = prompt[start : start + size]
        content = block.encode(errors="surrogatepass") if isinstance(block, str) else array("i", block).tobytes()
        parent = blake2b(parent + content, digest_size=16).digest()
        keys.append(parent)
    return keys


def request_keys(body: Any) -> list[bytes]:
    """`prefix_keys` of the prompt in the body of an OpenAI request, or of the first prompt if there are several. A body that is
    not such a request has none; an engine will refuse it."""
    if not isinstance(body, dict):
        return []
    prompt, salt = body.get("prompt"), body.get("cache_salt")
    if isinstance(body.get("messages"), list):
        prompt = "".join(map(_message_text, body["messages"]))
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(_is_token_id(token) for token in prompt)):
        return []
    return prefix_keys(prompt, salt if isinstance(salt, str) else "")


def _message_text(message: Any) -> str:
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "\0".join([str(message.get("role")), *(str(part.get("text")) for part in parts if isinstance(part, dict)), ""])


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


class Policy(abc.ABC):
    """Chooses an engine, by name, for each request."""

    @abc.abstractmethod
    def choose(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> str:
        """The engine for a request.

        Args:
            keys: of its prompt. loads: requests that each engine has now; not empty.
        """
        ...

    def retain(self, names: Collection[str]) -> None:
        """Forget all engines but these."""
        return


class RoundRobin(Policy):
    """One after another."""

    def __init__(self) -> None:
        self._turns = itertools.count()

    def choose(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> str:
        return sorted(loads)[next(self._turns) % len(loads)]


class PrefixAffinity(Policy):
    """The engine that knows the longest beginning of the prompt, unless it has too much to do; else the least loaded one.

    Args:
        max_imbalance, max_ratio: an engine has too much to do with more requests than the least loaded one has plus
            `max_imbalance`, and also more than `max_ratio` times as many.
        min_share: of the prompt's blocks that must be known for it to matter. What all prompts begin with, such as a short
            system prompt, would otherwise draw them all to one engine.
        max_entries: hashes that are remembered; the least recently used are forgotten first.
    """

    def __init__(
        self, max_imbalance: int = 16, max_ratio: float = 1.5, min_share: float = 0.25, max_entries: int = 200_000
    ) -> None:
        self.max_imbalance, self.max_ratio = max_imbalance, max_ratio
        self.min_share, self.max_entries = min_share, max_entries
        self._owners: OrderedDict[bytes, set[str]] = OrderedDict()
        self._num_owned: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def choose(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> str:
        """See `Policy.choose`. The chosen one is remembered as one that has seen the keys.

        In question are the engines that know the longest beginning (`_knowing`), but for those that have too much to do; if
        there are none, all. Of these the one with the fewest requests is chosen; of several the one that has seen the fewest
        keys, so that beginnings are dealt out evenly; and of several such the first by name.
        """
        least = min(loads.values())
        limit = max(least + self.max_imbalance, least * self.max_ratio)
        candidates = [name for name in self._knowing(keys, loads) if loads[name] <= limit] or list(loads)
        # of equally loaded ones that which knows least, so that beginnings are dealt out evenly
        chosen = min(candidates, key=lambda name: (loads[name], self._num_owned.get(name, 0), name))
        self._remember(keys, chosen)
        return chosen

    def retain(self, names: Collection[str]) -> None:
        gone = self._num_owned.keys() - set(names)
        if not gone:
            return
        for name in gone:
            del self._num_owned[name]
        for key, owners in list(self._owners.items()):
            owners -= gone
            if not owners:
                del self._owners[key]

    def _knowing(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """Engines that know the longest beginning that any of `loads` knows; none if that is less than `min_share` of the
        prompt, or nobody knows any.

        An engine knows a beginning whose key it has seen (`_owners`), whether or not shorter ones of the same prompt are
        remembered. One that is not in `loads` is not there any more.
        """
        for count in range(len(keys), 0, -1):
            if count < self.min_share * len(keys):
                break
            if names := [name for name in self._owners.get(keys[count - 1], ()) if name in loads]:
                return names
        return []

    def _remember(self, keys: Sequence[bytes], name: str) -> None:
        """Note that an engine has seen these keys, and forget what is too much.

        All of them are used now, a shorter beginning later than a longer one: so the longer one of a prompt is forgotten before
        the shorter one that others share. Above `max_entries` the least recently used keys go, with all that have seen them.
        `_num_owned` says of each engine that was ever chosen how many of the keys in `_owners` it has seen.
        """
        self._num_owned.setdefault(name, 0)
        for key in reversed(keys):  # the shortest beginning is used last, so longer ones are forgotten before it
            owners = self._owners.setdefault(key, set())
            self._owners.move_to_end(key)
            if name not in owners:
                owners.add(name)
                self._num_owned[name] += 1
        while len(self._owners) > self.max_entries:
            for owner in self._owners.popitem(last=False)[1]:
                self._num_owned[owner] -= 1

    def check_invariants(self) -> None:
        """The counts are those of the map.

        Raises:
            AssertionError: names the engine whose count is wrong.
        """
        assert len(self._owners) <= self.max_entries
        for name, count in self._num_owned.items():
            assert count == sum(name in owners for owners in self._owners.values()), f"the count of {name} is wrong"
