"""Conversations as token ids, in the form that a model's chat template can read.

A message's content is a text or a list of parts, ``{"type": "text", "text": ...}``. Some templates read only texts, others only
parts. A template that gets the wrong form raises no error: in Jinja a loop over a text finds no parts and writes nothing. So a
template is tried first, with the same roles and a made-up word for each text. Its output shows which words it has read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

Form = Literal["text", "parts", "part"]
"""A text; parts; one part, with the whole text."""
Shape = tuple[tuple[str, int | None, str], ...]
"""The role of each message; the number of its parts, None: it came as a text; and all that it has besides, as JSON."""
MARK = "zqmark"
"""A key of each part that no template asks for. If it is in the prompt, the template has printed the list of parts itself."""
CALLS = "tool_calls"
"""What a message has that calls tools; some templates leave out what such a message says."""
THOUGHT = {"reasoning_content": "zqthought", "reasoning": "zqthought"}
"""What stands for thoughts while a template is tried: no form depends on what they are."""
ROLES = ("system", "user", "assistant", "tool")
"""The roles that every API has. A template may leave out a message of one of them, such as what an assistant thought."""
MANY_MESSAGES = 256
"""With so many messages only a few combinations of forms are tried, because each of them renders the template."""
MAX_ROLES = 4
"""With more roles only a few combinations are tried too, because each role triples their number."""


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """A conversation as token ids, up to where the assistant speaks, unless `options` say something else.

    A message keeps its form unless the template reads only the other one. Parts that become a text are joined by line breaks.

    Args:
        tokenizer: of transformers.
        messages: each with a role and a content; a content that is None or missing is empty. What else they have, such as
            `tool_calls`, stays as it is.
        tools: what the model may call, for the template. options: more arguments of transformers' `apply_chat_template`,
            such as variables of the template.

    Raises:
        ValueError: there is no chat template, it does not take this conversation, or it leaves out all that the user says.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("this model has no chat template")
    contents = [_parts(message) for message in messages]
    came_as_text = [not isinstance(message.get("content"), list) for message in messages]
    shape = tuple(
        (message["role"], None if text else len(parts), _besides(message))
        for message, text, parts in zip(messages, came_as_text, contents, strict=True)
    )
    template = _Template(tokenizer, tools, options or {})
    try:
        forms, unread = _readable(template, shape)
        conversation = [
            {**message, "content": _content(parts, form)}
            for message, parts, form in zip(messages, contents, forms, strict=True)
        ]
        token_ids: list[int] = template.render(conversation, return_dict=False)
    except Exception as error:  # a template is a program, and may fail in any way
        reason = str(error) or type(error).__name__
        raise ValueError(f"the model's chat template does not take these messages: {reason}") from error
    said = [index for index, message in enumerate(messages) if message["role"] == "user" and any(contents[index])]
    if said and unread.issuperset(said):
        raise ValueError("the model's chat template leaves out what the user says")
    strange = [message["role"] for index, message in enumerate(messages) if index in unread and message["role"] not in ROLES]
    if strange:
        raise ValueError(f"the model's chat template leaves out what the role {strange[0]!r} says")
    return token_ids


class _Template:
    """A tokenizer's template, with the tools and the options that it is rendered with; equal to others of the same text."""

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]] | None, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = {"tools": tools, "add_generation_prompt": True, **options}
        self.text = repr((tokenizer.chat_template, self.options))  # of several templates, a dictionary

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.text == other.text

    def render(self, conversation: list[dict[str, Any]], **form: bool) -> Any:
        """A conversation as transformers gives it, in the form that its arguments ask for."""
        return self.tokenizer.apply_chat_template(conversation, **self.options, **form)

    def unread(self, shape: Shape, forms: Sequence[Form]) -> frozenset[int]:
        """Which messages of a conversation the template does not write in full, if they come in these forms.

        Raises:
            Exception: of any kind; the template does not take them.
        """
        words = [
            [] if CALLS in besides else [f"zq{index}x{part}qz" for part in range(parts or 1)]
            for index, (_, parts, besides) in enumerate(shape)
        ]
        conversation = [
            {"role": role, "content": _content(said, form, {MARK: MARK}), **json.loads(besides or "{}")}
            for (role, _, besides), said, form in zip(shape, words, forms, strict=True)
        ]
        prompt = self.render(conversation, tokenize=False).lower()
        if MARK in prompt:
            raise ValueError("it writes lists of parts as they are")
        return frozenset(index for index, said in enumerate(words) if not all(word in prompt for word in said))


@lru_cache(maxsize=256)
def _readable(template: _Template, shape: Shape) -> tuple[tuple[Form, ...], frozenset[int]]:
    """The forms, one for each message, in which the template reads the most messages, and the messages that it leaves out.

    Raises:
        Exception: of any kind; the template takes no combination of forms, and this is its error for texts.
    """
    best: tuple[tuple[Form, ...], frozenset[int]] | None = None
    for forms in _ways(shape):
        try:
            unread = template.unread(shape, forms)
        except Exception:  # not a form for this template
            continue
        if best is None or len(unread) < len(best[1]):
            best = forms, unread
        if not unread:
            return best
    if best is None:
        texts: tuple[Form, ...] = tuple("text" for _ in shape)
        return texts, template.unread(shape, texts)
    for other in ("part", "text"):  # of one role, some messages may be read in another form than the rest
        forms = tuple(other if index in best[1] else form for index, form in enumerate(best[0]))
        try:
            unread = template.unread(shape, forms)
        except Exception:
            continue
        if len(unread) < len(best[1]):
            best = forms, unread
    return best


def _ways(shape: Shape) -> Iterator[tuple[Form, ...]]:
    """Forms to try: as the messages came; all in one form; each combination of a form for every role."""
    yield tuple("text" if parts is None else "parts" for _, parts, _ in shape)
    roles = list(dict.fromkeys(role for role, *_ in shape))
    choices: list[tuple[Form, ...]] = [(form,) * len(roles) for form in ("text", "parts", "part")]
    if len(shape) < MANY_MESSAGES and len(roles) <= MAX_ROLES:
        choices += itertools.product(("text", "parts", "part"), repeat=len(roles))
    for choice in choices:
        by_role = dict(zip(roles, choice, strict=True))
        yield tuple(by_role[role] for role, *_ in shape)


def _besides(message: dict[str, Any]) -> str:
    """What a message has besides role and content, as JSON; nothing if it has nothing."""
    more = {name: THOUGHT.get(name, value) for name, value in message.items() if name not in ("role", "content")}
    return json.dumps(more) if more else ""


def _parts(message: dict[str, Any]) -> list[str]:
    """The texts of a message's content.

    Raises:
        ValueError: something in it is no text.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return [content or ""]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError('the content of a message must be a text or a list of {"type": "text", "text": "..."}')
    return [part["text"] for part in content]


def _content(texts: list[str], form: Form, more: dict[str, str] | None = None) -> str | list[dict[str, str]]:
    """Texts in a form; `more` goes into each part."""
    if form == "text":
        return "\n".join(texts)
    return [{"type": "text", "text": text, **(more or {})} for text in (texts if form == "parts" else ["\n".join(texts)])]
