"""Before chapter 1: a model's answer token by token, what its cache saves, and what a batch and a machine allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Sequence[int]], int]
"""The whole text so far, as token ids → the next token."""


def generate(step: Step, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The naive loop: for each new token, hand the whole text so far to the model.

    Args:
        step: the model, with the choice of a token. It is called once for each new token.
        prompt: token ids; it stays as it is. num_tokens: how many new ones are wanted; 0 or more.

    Returns:
        The new tokens alone, without the prompt.
    """
    # Hint: Work on a list of your own, and give back its end.
    raise NotImplementedError("Stage 0 · Task 0.1: generate, see stages/stage0_warm_up/README.md#01-the-naive-loop")


def attend(query: Tensor, key: Tensor, value: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of one new token, with a KV cache: softmax(q·k / √D) over all tokens up to and including the new one.

    Args:
        query, key, value: [D], of the new token.
        keys, values: of all earlier tokens, each [D], in their order: the cache. The new token's are appended here.

    Returns:
        The mean of all values, weighted by the softmax: [D].
    """
    # Hint: torch.stack makes a matrix of the list; append comes first.
    raise NotImplementedError("Stage 0 · Task 0.2: attend, see stages/stage0_warm_up/README.md#02-the-kv-cache")


def floor_seconds(num_bytes: float, num_operations: float, bytes_per_second: float, operations_per_second: float) -> float:
    """The roofline: the shortest time in which a machine can do some work. It reads and computes at once, so the slower of the
    two decides (Williams, Waterman and Patterson, "Roofline", CACM 2009).

    Args:
        num_bytes: that must be read from memory. num_operations: additions and multiplications.
        bytes_per_second, operations_per_second: what the machine can do; both above 0.
    """
    # Hint: Two divisions; it takes as long as the slower of the two.
    raise NotImplementedError(
        "Stage 0 · Task 0.3: floor_seconds, see stages/stage0_warm_up/README.md#03-the-roofline-of-your-machine"
    )


def static_batches(lengths: Sequence[int], batch_size: int) -> tuple[int, float]:
    """Static batches: requests are taken in their order, `batch_size` at a time (the last batch may be smaller). A batch takes
    as many steps as its longest answer has tokens, and the next one begins when it is done.

    Args:
        lengths: tokens of each answer, 1 or more. batch_size: 1 or more.

    Returns:
        Steps in all, and the share of the seats that give a token: tokens / (batch_size · steps). Of no requests: 0 and 1.0.
    """
    # Hint: range has a third argument; a slice may end too late.
    raise NotImplementedError("Stage 0 · Task 0.4: static_batches, see stages/stage0_warm_up/README.md#04-static-batches")
