"""The JSON texts of numbers within bounds, as automata over their characters.

Readers hold numbers with a fraction as 64-bit floats, and integers exactly. Every reader must find that a number keeps its
bound. So integers are compared with the bound's exact value, and a number with a fraction has at most 14 digits before the
point, and so few after it that none rounds to a bound that it must not reach. A power of ten (``1e5``) is written only if the
schema asks nothing of the number. An integer has no point: 1 is never written as ``1.0``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from .automata import (
    EMPTY,
    Automaton,
    Regex,
    any_of,
    build,
    cat,
    complement,
    either,
    explore,
    intersect,
    literal,
    one_of,
    repeat,
)
from .charsets import CharSet
from .ecma_regex import whole

INTEGER_DIGITS = 40
"""Most digits of an integer, unless a bound has more."""
FRACTION_DIGITS = 15
MAX_PLACES = 12
"""Most digits after the point of what a number must be a multiple of."""
FREE = r"-?(0|[1-9][0-9]{0,39})(\.[0-9]{1,20})?|-?[0-9](\.[0-9]{1,20})?[eE][+\-]?([0-9]{1,2}|[12][0-9][0-9]|30[0-7])"
"""A number of which nothing is asked; within the range of a float."""
ZERO = (Decimal(0), False)
_ANY_DIGIT = one_of(((48, 57),))


@dataclass(frozen=True)
class Bounds:
    """What is asked of a number.

    Attributes:
        low, high: (bound, whether the bound itself is left out), or None; a bound is an int or a finite float.
        integer, fraction: whether it must have no fraction, or must have one.
        multiples, others: what it must, and must not, be a multiple of. barred: what it must not be.
    """

    low: tuple[int | float, bool] | None = None
    high: tuple[int | float, bool] | None = None
    integer: bool = False
    fraction: bool = False
    multiples: tuple[int | float, ...] = ()
    others: tuple[int | float, ...] = ()
    barred: tuple[int | float, ...] = ()


def _digits(low: int, high: int | None) -> Regex:
    return repeat(_ANY_DIGIT, low, high)


def _digit(low: int, high: int) -> Regex:
    return one_of(((48 + low, 48 + high),)) if low <= high else either()


def _same_length(text: str, above: bool, first: bool = True) -> Regex:
    """Digits, as many as in `text` and without a leading zero, that are not below it, or not above it."""
    if not text:
        return EMPTY
    digit = int(text[0])
    other = _digit(digit + 1, 9) if above else _digit(int(first and len(text) > 1), digit - 1)
    return either(
        cat(other, _digits(len(text) - 1, len(text) - 1)), cat(_digit(digit, digit), _same_length(text[1:], above, False))
    )


def _from(bound: int) -> Regex:
    """Integers from a bound ≥ 0 on."""
    text = str(bound)
    longer = cat(_digit(1, 9), _digits(len(text), max(INTEGER_DIGITS, len(text) + 1) - 1))
    return either(_same_length(text, True), longer)


def _up_to(bound: int) -> Regex:
    """Integers from 0 to a bound."""
    text = str(bound)
    if len(text) == 1:
        return _digit(0, bound)
    return either(literal("0"), cat(_digit(1, 9), _digits(0, len(text) - 2)), _same_length(text, False))


def _fraction(text: str, above: bool, strict: bool, left: int) -> Regex:
    """At most `left` digits that as a fraction are not below (above) that of `text`; strictly: nor equal to it."""
    if not text:
        if not above:
            return either() if strict else repeat(_digit(0, 0), 0, left)
        if not strict:
            return _digits(0, left)
        return either(*(cat(literal("0" * i), _digit(1, 9), _digits(0, left - i - 1)) for i in range(left)))
    if not left:
        return either() if above else EMPTY
    digit = int(text[0])
    other = _digit(digit + 1, 9) if above else _digit(0, digit - 1)
    found = [
        cat(other, _digits(0, left - 1)),
        cat(_digit(digit, digit), _fraction(text[1:], above, strict, left - 1)),
    ]
    return either(*found) if above else either(EMPTY, *found)


def _decimals(low: tuple[Decimal, bool], high: tuple[Decimal, bool] | None, digits: int) -> Automaton:
    """Numbers with a point between two bounds ≥ 0, with at most `digits` digits behind the point."""
    found = whole(rf"(0|[1-9][0-9]{{0,13}})\.[0-9]{{1,{digits}}}")
    for bound, above in ((low, True), (high, False)):
        if bound is None:
            continue
        front, _, behind = format(bound[0], "f").partition(".")
        at = cat(literal(f"{front}."), _fraction(behind.rstrip("0"), above, bound[1], digits))
        if above:
            rest = _from(int(front) + 1)
        elif int(front):
            rest = _up_to(int(front) - 1)
        else:
            rest = either()
        found = intersect(found, build(either(at, cat(rest, literal("."), _digits(1, digits)))))
    return found


def exact(number: int | float) -> Fraction:
    """The number that is written: 0.01 is a hundredth, though a float is only near to one."""
    return Fraction(repr(number))


def _multiples(of: int | float) -> Automaton:
    """Numbers, with a sign or without, that are multiples of a number, as decimals say.

    A state is where in the number, how many digits behind the point, and the remainder of all digits; remainders that the same
    digits make whole are taken as one.

    Raises:
        ValueError: there are too many remainders, or digits behind the point.
    """
    step, places = exact(of), 0
    while step.denominator != 1 and places < MAX_PLACES:
        step, places = step * 10, places + 1
    if step.denominator != 1:
        raise ValueError(f"{of!r} has more than {MAX_PLACES} digits behind the point")
    size = int(step)
    alike: dict[tuple[int | None, ...], int] = {}

    def rest_of(digits: int) -> int:
        rest, power = digits % size, 1
        wanted: list[int | None] = []
        while power < 10 * size:  # the digits, 0, 1, 2 of them …, that would make it whole
            missing = -rest * power % size
            wanted.append(missing if missing < power else None)
            power *= 10
        return alike.setdefault(tuple(wanted), rest)

    def moves(state: tuple[str, int, int]) -> list[tuple[CharSet, tuple[str, int, int]]]:
        where, behind, rest = state
        if behind == places and where in ("point", "behind"):
            return [(((48, 48),), ("behind", behind, rest))]
        after = behind + (where in ("point", "behind"))
        where_to = "behind" if after else "front"
        out: list[tuple[CharSet, tuple[str, int, int]]] = [
            (((48 + digit, 48 + digit),), (where_to, after, rest_of(rest * 10 + digit))) for digit in range(10)
        ]
        if where == "start":
            out.append((((45, 45),), ("sign", 0, 0)))
        if where == "front":
            out.append((((46, 46),), ("point", 0, rest)))
        return out

    def final(state: tuple[str, int, int]) -> bool:
        where, behind, rest = state
        return where in ("front", "behind") and rest * 10 ** (places - behind) % size == 0

    found = explore(("start", 0, 0), moves, final)
    if Fraction(of) == exact(of):
        return found
    return intersect(found, whole(rf"-?[0-9]+|-?[0-9]{{1,{FRACTION_DIGITS - places}}}\.[0-9]+"))  # as a float reads it back


def _integers(low: int | None, high: int | None) -> Automaton:
    pieces = []
    if high is None or high >= 0:
        pieces.append(_range(max(low or 0, 0), high, ""))
    if low is None or low < 0:
        pieces.append(_range(1 if high is None else max(1, -high), None if low is None else -low, "-"))
    return any_of(*pieces)


def _range(low: int, high: int | None, sign: str) -> Automaton:
    limit = 10**INTEGER_DIGITS
    if low >= limit:
        raise ValueError(f"bounds of more than {INTEGER_DIGITS} digits are not supported")
    found = build(cat(literal(sign), _from(low)))
    return found if high is None else intersect(found, build(cat(literal(sign), _up_to(min(high, limit - 1)))))


def _with_fraction(bounds: Bounds) -> Automaton:
    low, high = ((Decimal(repr(end[0])), end[1]) if end else None for end in (bounds.low, bounds.high))
    ends = [end for end in (low, high) if end]
    digits = max([FRACTION_DIGITS, *(-int(end[0].as_tuple().exponent) for end in ends)])
    digits = min(
        [digits, 40, *(FRACTION_DIGITS - 1 - end[0].adjusted() for end in ends if end[1] and end[0] and end[0].adjusted() < 15)]
    )
    pieces = []
    if digits > 0 and (high is None or high[0] >= 0):
        pieces.append(_decimals(low if low and low[0] >= 0 else ZERO, high, digits))
    if digits > 0 and (low is None or low[0] < 0):
        start = (-high[0], high[1]) if high and high[0] <= 0 else ZERO
        found = _decimals(start, (-low[0], low[1]) if low else None, digits)
        pieces.append(Automaton((((((45, 45),), 1),), *_moved(found)), (False, *found.final)))
    return any_of(*pieces)


def _moved(automaton: Automaton) -> list[tuple[tuple[CharSet, int], ...]]:
    """Its edges where a state has been put before the first."""
    return [tuple((chars, target + 1) for chars, target in out) for out in automaton.edges]


@functools.lru_cache(512)
def numbers(bounds: Bounds) -> Automaton:
    """The texts of all numbers of which `bounds` holds.

    Raises:
        ValueError: it cannot be had; the message begins with the bound at fault.
    """
    if bounds == Bounds():
        return whole(FREE)
    low = high = None
    if bounds.low:
        exact = Fraction(bounds.low[0])
        low = math.floor(exact) + 1 if bounds.low[1] else math.ceil(exact)
    if bounds.high:
        exact = Fraction(bounds.high[0])
        high = math.ceil(exact) - 1 if bounds.high[1] else math.floor(exact)
    if bounds.multiples:  # digits and remainders are counted together
        most = 10 ** max(FRACTION_DIGITS, len(str(low or 0)), len(str(high or 0)))
        low, high = -most if low is None else low, most if high is None else high
    found = build(either())
    if not bounds.fraction:
        found = _integers(low, high) if low is None or high is None or low <= high else found
    if not bounds.integer:
        found = any_of(found, _with_fraction(bounds))
    if bounds.fraction:
        found = intersect(found, whole(r"-?[0-9]+\.[0-9]*[1-9][0-9]*"))
    for one in bounds.multiples:
        found = intersect(found, _multiples(one))
    for one in bounds.others:
        found = intersect(found, complement(_multiples(one)))
    for one in bounds.barred:
        text = format(Decimal(repr(one)), "f")
        spelled = text.rstrip("0").rstrip(".") if "." in text else text
        zeros = literal("") if "." in spelled else either(EMPTY, cat(literal("."), repeat(_digit(0, 0), 1, None)))
        tail = cat(literal(spelled), repeat(_digit(0, 0), 0, None) if "." in spelled else zeros)
        found = intersect(found, complement(build(tail if one else cat(either(EMPTY, literal("-")), tail))))
    return found
