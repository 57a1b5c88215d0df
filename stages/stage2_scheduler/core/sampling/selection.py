"""Choosing from rows as long as a vocabulary: the arg-max, the k largest, min-p / top-k / top-p, and a random draw.

Rows are float32 [R, W], contiguous and padded to whole blocks, logits with -inf and weights with 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
"""Tokens in a block. On a CPU torch reduces with vector instructions (amax, sum) but selects with scalar ones (argmax,
topk, cumsum), so every selection looks at one number a block first and then into the few blocks that matter."""

CANDIDATES = 64
"""Most likely tokens in which a cutoff is looked for before a whole row is gone through."""


def argmax(x: Tensor) -> Tensor:
    """[R] index of the largest of each row [R, W], the first among equals."""
    blocks = x.view(len(x), -1, BLOCK)
    best = blocks.amax(-1).argmax(-1)
    return best * BLOCK + _pick(blocks, best).argmax(-1)


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [R, W], in descending order, and their indices; W of them if that is less than k.

    They lie in the k blocks with the largest maxima.
    """
    blocks = x.view(len(x), -1, BLOCK)
    count = blocks.shape[1]
    best = blocks.amax(-1).topk(min(k, count), sorted=False).indices  # [R, K]
    first = torch.arange(len(x), device=x.device)[:, None] * count
    members = x.view(-1, BLOCK).index_select(0, (best + first).flatten()).view(len(x), -1)  # [R, K * BLOCK]
    values, places = members.topk(min(k, members.shape[1]))
    return values, best.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def ranked(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row [R, W], in descending order, equal ones in the order of their indices; all W if that
    is less than k.

    They lie in the k blocks with the largest maxima, of equal ones the first.
    """
    blocks = x.view(len(x), -1, BLOCK)
    count = blocks.shape[1]
    best = _first_largest(blocks.amax(-1), k).sort().values  # [R, K]
    first = torch.arange(len(x), device=x.device)[:, None] * count
    members = x.view(-1, BLOCK).index_select(0, (best + first).flatten()).view(len(x), -1)  # [R, K * BLOCK]
    places = _first_largest(members, k)
    return best.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def _first_largest(x: Tensor, k: int) -> Tensor:
    """Indices [R, k] as in `ranked`, of short rows [R, K]: a key of 64 bits a number, whose upper half orders the numbers (the
    bits of a float order it like an integer, those of a negative one inverted) and whose lower half orders equal ones."""
    bits = (x + 0.0).view(torch.int32)  # of the two zeros it makes one
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (order.long() << 32) - torch.arange(x.shape[1], device=x.device)
    return keys.topk(min(k, x.shape[1])).indices


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """[R] the first index at which the running sum of each row exceeds u · total: the inverse of the cumulative
    distribution. A weight of 0 is never drawn; a row of NaN gives index 0.

    Args:
        weights: [R, W] not negative, not all 0, of any sum; W is whole blocks or less than one.
        u: [R] float64 in [0, 1).
    """
    blocks = weights.view(len(weights), -1, min(BLOCK, weights.shape[1]))
    block, rest = _first_above(blocks.sum(-1), u)
    inside, _ = _first_above(_pick(blocks, block), rest)
    return block * blocks.shape[2] + inside


def _pick(blocks: Tensor, index: Tensor) -> Tensor:
    """[R, B] from blocks [R, K, B] the one at index [R]."""
    return blocks[torch.arange(len(blocks), device=blocks.device), index]


def _first_above(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Index [R] at which the running sum of `weights` [R, K] first exceeds u · total, and what share [R] of the weight
    there lies below that target: uniform in [0, 1) again."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    target = (u[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))  # below the total: the index exists
    index = (sums <= target).sum(-1, keepdim=True)
    weight = weights.gather(1, index).double()
    share = 1.0 - (sums.gather(1, index) - target) / weight
    return index.squeeze(1), share.clamp(0.0, 1.0).squeeze(1)


@dataclass(slots=True)
class Filters:
    """Min-p, top-k and top-p, in this order. Together they come to one number a row, its cutoff: the least logit kept.

    - min-p keeps tokens at least `min_p` times as likely as the most likely one;
    - top-k keeps tokens with fewer than `top_k` tokens strictly more likely;
    - top-p keeps tokens with less than `top_p` of the remaining mass on tokens strictly more likely (nucleus sampling,
      Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020, §3.1).

    So at least one token is kept, and tokens that tie are kept or dropped together, whatever the order of a sort.

    Attributes:
        min_p: [R] float32, 0: off.
        top_k: [R] int64, W or more: off.
        top_p: [R] float64, 1: off.
        need_mass: some row has top-p alone, which takes the mass of its whole row.
    """

    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    need_mass: bool

    def mask(self, x: Tensor, scratch: Tensor) -> None:
        """Set the logits [R, W] that are not kept to -inf. `scratch` [>= R, W] is overwritten."""
        cutoff, _, _, _ = self._cutoffs(x, scratch)
        x.masked_fill_(x < cutoff[:, None], -math.inf)

    def draw(self, x: Tensor, u: Tensor, scratch: Tensor) -> Tensor:
        """[R] tokens from logits [R, W] at the numbers u [R]. `scratch` [>= R, W] is overwritten.

        Tokens stand in the order of their ids, not of their logits: where two are nearly as likely, rounding may change which
        of them comes first, and the token at the same number would be another one.
        """
        cutoff, uncertain, values, ids = self._cutoffs(x, scratch)
        largest = values[:, :1]
        if values.shape[1] == x.shape[1]:
            return draw((x - largest).exp_() * (x >= cutoff[:, None]), u)
        ids, order = ids.sort(1)
        values = values.gather(1, order)
        weights = (values - largest).exp_() * (values >= cutoff[:, None])
        tokens = ids.gather(1, draw(weights, u)[:, None]).squeeze(1)
        for row in uncertain:
            kept = functional.threshold(x[row], _below(cutoff[row]), -math.inf)
            tokens[row] = draw((kept - largest[row]).exp_()[None], u[row, None])[0]
        return tokens

    def _cutoffs(self, x: Tensor, scratch: Tensor) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """Cutoffs [R]; candidates' logits and ids, both [R, K]; before those, the rows that keep more than these."""
        width = x.shape[1]
        if x.device.type != "cpu":  # there a sort is cheap, and waiting for what it found is not
            values, ids = x.sort(-1, descending=True)
            return self._cutoffs_of_largest(values, width, None)[0], [], values, ids
        values, ids = top(x, CANDIDATES)
        mass = 1.0 / torch.softmax(x, -1, out=scratch[: len(x)]).amax(-1) if self.need_mass else None
        cutoff, certain = self._cutoffs_of_largest(values, width, mass)
        uncertain = [row for row, sure in enumerate(certain.tolist()) if not sure]
        for row in uncertain:
            cutoff[row] = self._cutoff_of_row(row, x[row], values[row, 0])
        return cutoff, uncertain, values, ids

    def _cutoffs_of_largest(self, values: Tensor, width: int, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cutoffs [R] from the K largest logits of each row, `values` [R, K] in descending order, and whether each is
        certain [R]: every logit that is kept is among them.

        Min-p and top-k together have a bound, -inf where both are off, and top-p takes its share of what is not below it: the
        cutoff is the logit at which the mass from the largest down reaches `top_p` of that. Where top-p is off, it is the
        bound. With K < `width` there are logits that nobody has seen, which are at most the last of `values`. So a cutoff is
        certain above that one, if what top-p takes its share of is known: the bound itself is above it, or there is none and
        `mass` is it. With K = `width` each is. A row whose largest logit is not finite counts as certain, as nothing helps it.

        Args:
            width: W, logits of a whole row.
            mass: [R] the sum of ``exp(logit - largest)`` over the whole row; None if no row needs it (`need_mass`).
        """
        # Hint: Take one row and do each thing with a pencil: which index does it touch, and what must stay as it is?
        # Then ask what changes if this row is the third of five.
        raise NotImplementedError(
            "Stage 2 · Task 2.10: Filters._cutoffs_of_largest, see stages/stage2_scheduler/GUIDE.md#task-2-10"
        )

    def _cutoff_of_row(self, row: int, logits: Tensor, largest: Tensor) -> Tensor:
        """The cutoff of one row from all its logits [W] and the largest of them."""
        gaps = largest - logits + 0.0  # of -0.0, the gap between the two zeros, it makes 0.0
        cutoff = largest + self.min_p[row].log()
        if (top_k := int(self.top_k[row])) < len(logits):
            cutoff = cutoff.maximum(_reach(logits, gaps, torch.ones_like(gaps), top_k))
        if (top_p := float(self.top_p[row])) < 1.0:
            weights = (functional.threshold(logits, _below(cutoff), -math.inf) - largest).exp_()
            cutoff = cutoff.maximum(_reach(logits, gaps, weights, top_p * float(weights.sum(dtype=torch.float64))))
        return cutoff


def _below(cutoff: Tensor) -> float:
    """What a kept logit is greater than: `functional.threshold` is 10x faster on a CPU than a mask of booleans."""
    return float(cutoff.nextafter(cutoff.new_tensor(-math.inf)))


def _reach(logits: Tensor, gaps: Tensor, weights: Tensor, target: float) -> Tensor:
    """The largest c such that the weights [W] of the logits [W] from c up sum to at least `target`.

    A radix selection, far cheaper than a sort: the upper 16 bits of a float32 >= 0 order it like an integer, so those of
    `gaps` [W], ``largest - logits``, are the buckets of a histogram; only the bucket in which the sum reaches the target
    is sorted.
    """
    bucket = gaps.view(torch.int32) >> 16
    sums = torch.bincount(bucket, weights.double()).cumsum(0)
    place = int((sums < target).sum().clamp(max=len(sums) - 1))
    members = (bucket == place).nonzero().squeeze(1)
    values, order = logits[members].sort(descending=True)
    inside = weights[members[order]].cumsum(0, dtype=torch.float64) + (sums[place - 1] if place else 0.0)
    return values[int((inside < target).sum().clamp(max=len(values) - 1))]
