"""A layer's experts in a step in which adapters change some of them.

A token and an expert that it chose are a pair, and a pair has its token's adapter. Pairs are sorted by expert, and those of an
expert by adapter, so that an adapter's rows are neighbours, too. Then experts are computed one by one, each by its own layers,
whose products add what adapters say as those of any layer do; Triton's product of all experts at once has no part in it. On a
CPU one call in C++ does the same (``adapted_experts_cpu.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..moe import Experts
from .products import AdaptersOfStep


class AdaptedExperts:
    """Takes the place of `Experts.forward`.

    Args:
        experts: whose `forward` it was, which other steps are left to.
        step: says which of its tokens are whose. rows: the same of the rows of the expert that is being computed; products of
            experts look there.
        num_slots: of adapters, and the one for none. multiply: in the place of `one_by_one`.
    """

    def __init__(
        self, experts: Experts, step: AdaptersOfStep, rows: AdaptersOfStep, num_slots: int,
        multiply: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.experts, self.forward = experts, experts.forward
        self.step, self.rows, self.num_slots = step, rows, num_slots
        self.multiply = multiply or self.one_by_one

    def __call__(self, x: Tensor, logits: Tensor, add_to: Tensor | None = None) -> Tensor:
        """See `Experts.forward`."""
        if not self.step.reaches_experts:
            return self.forward(x, logits, add_to)
        experts = self.experts
        weights, chosen = experts.choose(logits)  # [T, k]
        kinds = (chosen * self.num_slots + self.step.slots[:, None]).flatten()  # [T·k], an expert with an adapter
        order = kinds.argsort(stable=True)
        every = torch.arange(len(experts.load) * self.num_slots + 1, device=x.device)
        bounds = torch.searchsorted(kinds[order], every)  # expert e with the adapter in slot s: from e · num_slots + s on
        experts.load += bounds[:: self.num_slots].diff()
        rows = self.multiply(x[order // chosen.shape[1]], bounds)  # [T·k, hidden]
        by_token = torch.empty_like(rows).index_copy_(0, order, rows).view(*chosen.shape, -1)  # [T, k, hidden]
        y = (by_token.float() * weights[..., None]).sum(dim=1).to(x.dtype)
        return y if add_to is None else add_to.add_(y)

    def one_by_one(self, rows: Tensor, bounds: Tensor) -> Tensor:
        """Each row through its expert with its adapter; zeros for experts of other ranks.

        Args:
            rows: [T·k, hidden], sorted by expert and adapter. bounds: where the rows of each of these begin, expert by expert.
        """
        out, in_order, every = torch.zeros_like(rows), np.arange(len(rows)), bounds.tolist()
        for number, expert in self.experts.own.items():
            starts = every[number * self.num_slots : (number + 1) * self.num_slots + 1]
            first, last = starts[0], starts[-1]
            groups = [(slot, at - first, end - first) for slot, (at, end) in enumerate(pairwise(starts)) if at < end]
            self.rows.active = any(slot for slot, *_ in groups)
            if self.rows.active:
                self.rows.arrange(in_order[: last - first], groups)
            if groups:
                out[first:last] = expert(rows[first:last], None)
        self.rows.active = False
        return out
