"""How alike submissions are: fingerprints of runs of tokens, without names, layout and comments.

The method is winnowing (Schleimer, Wilkerson, Aiken, 2003): of each window of hashes the smallest is kept. What the starter,
the reference or more than half of a class of at least four has is nobody's own, and is left out.
"""

from __future__ import annotations

import io
import itertools
import keyword
import tokenize
import zlib
from collections import Counter
from dataclasses import dataclass

LENGTH, WINDOW = 12, 6
"""Tokens in a run, and runs of which one is kept."""
FEWEST, ALIKE = 12, 0.5
"""Own fingerprints that both must have, and the common share from which on a pair is named."""
IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.STRING, tokenize.ENDMARKER)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two submissions whose own fingerprints are alike, with the common share of the smaller one's."""

    first: str
    second: str
    share: float


def fingerprints(text: str) -> set[int]:
    """Of a Python file; what cannot be read as one has none."""
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in IGNORED]
    except (tokenize.TokenError, SyntaxError):
        return set()
    words = [
        "name" if token.type == tokenize.NAME and not keyword.iskeyword(token.string) else token.string.strip()
        for token in tokens
    ]
    runs = [zlib.crc32(" ".join(words[k : k + LENGTH]).encode()) for k in range(len(words) - LENGTH + 1)]
    return {min(runs[k : k + WINDOW]) for k in range(max(1, len(runs) - WINDOW + 1))} if runs else set()


def alike(submissions: dict[str, list[str]], common: list[str]) -> list[Pair]:
    """Pairs of submissions that are alike, the closest first.

    Args:
        submissions: name → texts of its files. common: texts that all may have: starters and reference.
    """
    known = set().union(*map(fingerprints, common))
    own = {name: set().union(*map(fingerprints, texts)) - known for name, texts in submissions.items()}
    counts = Counter(itertools.chain.from_iterable(own.values()))
    if len(own) >= 4:
        own = {name: {each for each in prints if counts[each] <= len(own) / 2} for name, prints in own.items()}
    pairs = []
    for (first, a), (second, b) in itertools.combinations(sorted(own.items()), 2):
        if min(len(a), len(b)) >= FEWEST and (share := len(a & b) / min(len(a), len(b))) >= ALIKE:
            pairs.append(Pair(first, second, round(share, 2)))
    return sorted(pairs, key=lambda pair: -pair.share)
