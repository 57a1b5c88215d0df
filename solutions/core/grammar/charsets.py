"""Sets of characters, as tuples of ranges, sorted and apart. Half a surrogate pair is no character here."""

from __future__ import annotations

import functools

CharSet = tuple[tuple[int, int], ...]
ALL: CharSet = ((0, 0xD7FF), (0xE000, 0x10FFFF))


@functools.lru_cache(1 << 14)
def union(*sets: CharSet) -> CharSet:
    """All characters of several sets."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for one in sets for pair in one):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


@functools.lru_cache(1 << 14)
def common(a: CharSet, b: CharSet) -> CharSet:
    """The characters of both sets."""
    found = [(max(low, other[0]), min(high, other[1])) for low, high in a for other in b]
    return union(tuple((low, high) for low, high in found if low <= high))


def inverse(chars: CharSet) -> CharSet:
    """The characters that are not in a set."""
    gaps, start = [], 0
    for low, high in chars:
        gaps.append((start, low - 1))
        start = high + 1
    return common(tuple((a, b) for a, b in [*gaps, (start, 0x10FFFF)] if a <= b), ALL)
