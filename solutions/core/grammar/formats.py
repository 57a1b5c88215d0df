"""The formats of strings in a JSON schema, as patterns over the whole text.

Some formats allow more than their pattern here, such as letters beyond ASCII in an ``idn-email``: the pattern is the part that
every reader accepts. A format that the standard does not name is an annotation, as the standard says.

Source: JSON Schema 2020-12, validation 7.3, and the RFCs named there.
"""

from __future__ import annotations

import functools

from .automata import Automaton, intersect
from .ecma_regex import lengths, whole

_DAY = "(0[1-9]|1[0-9]|2[0-8])"
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = rf"({_YEAR}-((0[1-9]|1[0-2])-{_DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{_LEAP}-02-29)"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_H = "[0-9a-fA-F]{1,4}"
_IPV6 = "(" + "|".join([rf"({_H}:){{7}}{_H}", *(
    (rf"({_H}(:{_H}){{0,{left - 1}}})?" if left else "") + "::" + (rf"({_H}(:{_H}){{0,{6 - left}}})?" if left < 7 else "")
    for left in range(8)
)]) + ")"  # fmt: skip
_LABEL = "[a-zA-Z0-9]+(-[a-zA-Z0-9]+)*"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?\\^_`{|}~\\-]+"
_CHAR = "([a-zA-Z0-9\\-._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})"
_TAIL = rf"(\?({_CHAR}|[/?])*)?(#({_CHAR}|[/?])*)?"
_AUTHORITY = rf"//({_HOST}|{_IPV4})(:[0-9]{{1,4}})?(/{_CHAR}*)*"
_URI = rf"[a-zA-Z][a-zA-Z0-9+\-.]*:({_AUTHORITY}|{_CHAR}+(/{_CHAR}*)*|/({_CHAR}+(/{_CHAR}*)*)?){_TAIL}"
_UNITS = "([0-9]{1,9}H([0-9]{1,9}M([0-9]{1,9}S)?)?|[0-9]{1,9}M([0-9]{1,9}S)?|[0-9]{1,9}S)"
_DAYS = "([0-9]{1,9}Y([0-9]{1,9}M([0-9]{1,9}D)?)?|[0-9]{1,9}M([0-9]{1,9}D)?|[0-9]{1,9}D)"
_POINTER = r"(/([^/~\x00-\x1f\x7f]|~[01])*)*"
_PLAIN = "[a-zA-Z0-9 _,:;/@!#%&<>=~'\"\\-]"
_CLASS = r"\[\^?([a-zA-Z0-9_ .,:;/@]|a-z|a-f|A-Z|A-F|0-9|\\[dswDSW.\-\[\]\\])+\]"
_PIECE = rf"({_PLAIN}|\.|\\[dswDSW.*+?()|\[\]{{}}^$/\\]|{_CLASS})"
_OFTEN = r"([*+?]\??|\{[0-9]{1,2}\})?"
_GROUP = rf"\((\?:)?({_PIECE}{_OFTEN})+(\|({_PIECE}{_OFTEN})+)*\)"
_REGEX = rf"\^?(({_PIECE}|{_GROUP}){_OFTEN})*\$?"
_EMAIL = rf"{_ATOM}(\.{_ATOM})*@{_HOST}"

_LONGEST = {"hostname": 63, "idn-hostname": 63, "email": 64, "idn-email": 64}
"""Characters within which no part of the text is too long."""
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "duration": rf"P({_DAYS}(T{_UNITS})?|T{_UNITS}|[0-9]{{1,9}}W)",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": _IPV4,
    "ip-address": _IPV4,
    "ipv6": _IPV6,
    "uri": _URI,
    "iri": _URI,
    "uri-reference": rf"({_URI}|({_AUTHORITY}|/({_CHAR}+(/{_CHAR}*)*)?|([a-zA-Z0-9\-._~]+(/{_CHAR}*)*)?){_TAIL})",
    "iri-reference": rf"({_URI}|/({_CHAR}+(/{_CHAR}*)*)?{_TAIL})",
    "uri-template": r"([a-zA-Z0-9\-._~:/?#@!$&()*+,;=]|\{[a-zA-Z0-9_]+\})*",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(0|[1-9][0-9]{{0,8}})(#|{_POINTER})",
    "regex": _REGEX,
}
EXACT = {"date", "ipv4", "ip-address", "uuid"}
"""Formats of which the pattern is all, so that a text outside it has not the format."""


@functools.cache
def texts_of(name: str) -> Automaton:
    """The texts of a format."""
    found = whole(FORMATS[name])
    return intersect(found, lengths(0, _LONGEST[name])) if name in _LONGEST else found
