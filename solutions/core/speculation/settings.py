"""How tokens are drafted: the keys of ``--speculative-config``, read and checked."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ...batching.token_tree import tree_of

METHODS = ("ngram", "draft_model", "eagle", "mtp", "deepseek_mtp")
HEADS = METHODS[2:]
"""Those that draft by a head; the last two are two names of one."""


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """How tokens are drafted; the keys of ``--speculative-config``. Names are vLLM's.

    Attributes:
        method: "ngram": what followed when the text last said the same; "draft_model": a smaller model; "eagle": a head that
            was trained to go on from the target's hidden states; "mtp" or "deepseek_mtp": the module of DeepSeek-V3 that was.
        num_speculative_tokens: most tokens drafted for a sequence in a step.
        prompt_lookup_min, prompt_lookup_max: of "ngram", how many last tokens must have occurred before; the longest counts.
        model, quantization: of "draft_model"; the model's vocabulary must be the target's. A quantized copy of the target
            will do. Of "eagle" the head's folder, and "int8" or "int4" for all its matrices but the first; of "mtp" for all.
        adaptive: draft as many tokens as pay, by what steps cost and how many drafts were right, and none where none do; false:
            always as many as the other fields say.
        disable_by_batch_size: with more sequences in a step nothing is drafted; None: however many there are.
        num_speculative_tokens_per_batch_size: sequences in a step, as "first-last" → most tokens drafted for each, in place of
            `num_speculative_tokens` where that is more. Between two ranges the earlier one holds.
        speculative_token_tree: of a head, the shape of drafts that branch: the path of each token, as a list of lists or in a
            string of Python tuples; see `token_tree.tree_of`. None: a chain.

    Raises:
        ValueError: a value is out of range, or does not belong to the method.
    """

    method: str
    num_speculative_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4
    model: str | None = None
    quantization: str | None = None
    adaptive: bool = True
    disable_by_batch_size: int | None = None
    num_speculative_tokens_per_batch_size: dict[str, int] = field(default_factory=dict)
    speculative_token_tree: str | list[list[int]] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--speculative-config: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "disable_by_batch_size"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and (name, value) != ("disable_by_batch_size", None):
                raise ValueError(f"--speculative-config: {name} must be an integer of at least 1, got {value!r}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("--speculative-config: prompt_lookup_min must not exceed prompt_lookup_max")
        if type(self.adaptive) is not bool:
            raise ValueError(f"--speculative-config: adaptive must be true or false, got {self.adaptive!r}")
        if not isinstance(self.num_speculative_tokens_per_batch_size, dict) or not all(
            re.fullmatch(r"[1-9]\d{0,8}-[1-9]\d{0,8}", str(key)) and type(count) is int and count >= 0
            for key, count in self.num_speculative_tokens_per_batch_size.items()
        ):
            raise ValueError(
                '--speculative-config: num_speculative_tokens_per_batch_size must be an object such as {"1-8": 4, "9-32": 2}, '
                f"got {self.num_speculative_tokens_per_batch_size!r}"
            )
        for name in ("model", "quantization"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"--speculative-config: {name} must be a string, got {value!r}")
            if value is not None and self.method == "ngram":
                raise ValueError(f"--speculative-config: method ngram takes no {name}; it drafts from the text itself")
        if self.method == "draft_model" and self.model is None:
            raise ValueError("--speculative-config: method draft_model needs a model, such as the target's own name")
        if self.method == "eagle" and self.model is None:
            raise ValueError("--speculative-config: method eagle needs a model, the folder of a head trained for the target")
        if self.model is not None and self.method in ("mtp", "deepseek_mtp"):
            raise ValueError(f"--speculative-config: method {self.method} takes no model; the target's files hold its module")
        if self.is_head and self.quantization not in (None, "int8", "int4"):
            raise ValueError(f"--speculative-config: quantization of a head is int8 or int4, got {self.quantization!r}")
        if self.speculative_token_tree is not None:
            self._check_tree()

    def _check_tree(self) -> None:
        refused = "--speculative-config: speculative_token_tree: "
        if not self.is_head:
            raise ValueError(f"{refused}method {self.method} drafts chains only; use eagle")
        paths = self.paths or []
        try:
            tree_of(paths)
        except ValueError as error:
            raise ValueError(f"{refused}{error}") from None
        if self.num_speculative_tokens != (count := len(paths)):
            raise ValueError(f"{refused}it has {count} tokens; leave num_speculative_tokens out, or write {count}")

    @property
    def is_head(self) -> bool:
        """Whether a head drafts, on top of what the target computes."""
        return self.method in HEADS

    @property
    def paths(self) -> list[tuple[int, ...]] | None:
        """Of a tree's tokens; None: drafts are chains. Raises what `read_paths` does."""
        return None if self.speculative_token_tree is None else read_paths(self.speculative_token_tree)

    @classmethod
    def parse(cls, given: str | dict[str, Any]) -> SpeculativeConfig:
        """From the JSON of ``--speculative-config``, or the same as a dictionary.

        Raises:
            ValueError: it is not a JSON object of known keys with good values; the message says what is wrong.
        """
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        try:
            values = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"--speculative-config is not valid JSON ({error}); write for example '{example}'") from None
        if not isinstance(values, dict) or "method" not in values:
            raise ValueError(f"--speculative-config must be a JSON object with a method, such as '{example}'")
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ValueError(f"--speculative-config: there is no {unknown[0]!r}; the keys are {', '.join(known)}")
        if (tree := values.get("speculative_token_tree")) is not None:
            values = {"num_speculative_tokens": len(read_paths(tree)) or 1} | values
        return cls(**values)

    def most(self, num_seqs: int) -> int:
        """Most tokens drafted for each of so many sequences in a step."""
        if self.disable_by_batch_size is not None and num_seqs > self.disable_by_batch_size:
            return 0
        begun = [
            (int(key.split("-")[0]), count)
            for key, count in self.num_speculative_tokens_per_batch_size.items()
            if int(key.split("-")[0]) <= num_seqs
        ]
        return min(self.num_speculative_tokens, max(begun)[1]) if begun else self.num_speculative_tokens


def read_paths(given: Any) -> list[tuple[int, ...]]:
    """The paths of a ``speculative_token_tree``.

    Raises:
        ValueError: it is no list of lists of integers, nor a string of one in Python's notation.
    """
    try:
        paths = [tuple(path) for path in (ast.literal_eval(given) if isinstance(given, str) else given)]
    except (ValueError, SyntaxError, TypeError):
        paths = [("",)]
    if not all(type(choice) is int for path in paths for choice in path):
        raise ValueError(
            f"--speculative-config: speculative_token_tree is a list of paths such as [[0], [1], [0, 0]], not {given!r}"
        )
    return paths
