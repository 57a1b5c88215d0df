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
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(step(tokens))
    return tokens[len(prompt) :]


def attend(query: Tensor, key: Tensor, value: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of one new token, with a KV cache: softmax(q·k / √D) over all tokens up to and including the new one.

    Args:
        query, key, value: [D], of the new token.
        keys, values: of all earlier tokens, each [D], in their order: the cache. The new token's are appended here.

    Returns:
        The mean of all values, weighted by the softmax: [D].
    """
    keys.append(key)
    values.append(value)
    scores = torch.stack(keys) @ query / len(query) ** 0.5
    return torch.softmax(scores, dim=0) @ torch.stack(values)


def floor_seconds(num_bytes: float, num_operations: float, bytes_per_second: float, operations_per_second: float) -> float:
    """The roofline: the shortest time in which a machine can do some work. It reads and computes at once, so the slower of the
    two decides (Williams, Waterman and Patterson, "Roofline", CACM 2009).

    Args:
        num_bytes: that must be read from memory. num_operations: additions and multiplications.
        bytes_per_second, operations_per_second: what the machine can do; both above 0.
    """
    return max(num_bytes / bytes_per_second, num_operations / operations_per_second)


def static_batches(lengths: Sequence[int], batch_size: int) -> tuple[int, float]:
    """Static batches: requests are taken in their order, `batch_size` at a time (the last batch may be smaller). A batch takes
    as many steps as its longest answer has tokens, and the next one begins when it is done.

    Args:
        lengths: tokens of each answer, 1 or more. batch_size: 1 or more.

    Returns:
        Steps in all, and the share of the seats that give a token: tokens / (batch_size · steps). Of no requests: 0 and 1.0.
    """
    steps = sum(max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size))
    return steps, sum(lengths) / (batch_size * steps) if steps else 1.0
