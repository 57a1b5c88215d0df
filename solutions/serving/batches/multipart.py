"""Reads forms with files, as browsers and OpenAI's clients post them.

Source: RFC 7578 (multipart/form-data), RFC 2046, section 5.1 (boundaries).
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser

MAX_PARTS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form: its content, and the client's name for the file if it is one."""

    content: bytes
    filename: str | None


def read_form(content_type: str, body: bytes) -> dict[str, Part]:
    """The fields of a form by their names.

    Raises:
        ValueError: it is no form, is cut off, has two fields of one name or too many of them.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary:
        raise ValueError("the body must be multipart/form-data with a boundary")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"), MAX_PARTS + 1)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ValueError(f"the form is cut off, or has more than {MAX_PARTS} fields")
    form: dict[str, Part] = {}
    for piece in pieces[1:-1]:
        head, empty_line, content = piece.partition(b"\r\n\r\n")
        headers = HeaderParser().parsestr(head.decode("utf-8", "replace").lstrip())
        name = headers.get_param("name", header="content-disposition")
        if not empty_line or not isinstance(name, str):
            raise ValueError("a field of the form has no name")
        if name in form:
            raise ValueError(f"the form has two fields {name!r}")
        form[name] = Part(content, headers.get_filename())
    return form
