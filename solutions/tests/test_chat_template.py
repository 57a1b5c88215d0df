"""Templates that read texts, parts, or either, against transformers: given the right form by hand, it renders the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from solutions.core.engine import LLM
from solutions.core.text.chat_template import render_chat

START = "{% for message in messages %}<{{ message.role }}>"
END = "{% endfor %}<assistant>"
LOOP = "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
EITHER = "{% if message.content is string %}{{ message.content }}{% else %}" + LOOP + "{% endif %}"
# the form of Llama-Guard-3-1B: everything that is not a part of type text is skipped without a word
GUARD = (
    "{% if messages | length % 2 == 0 %}{% set role = 'Agent' %}{% else %}{% set role = 'User' %}{% endif %}"
    "Task: check {{ role }}\n{% for message in messages %}{% if message['role'] == 'user' %}{% set role = 'User' %}"
    "{% elif message['role'] == 'assistant' %}{% set role = 'Agent' %}{% endif %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ role }}: {{ content['text'] | trim }}\n{% endfor %}{% endfor %}"
)
MACRO = "{% macro show(content) %}{% for part in content %}{{ part['text'] }}{% endfor %}{% endmacro %}"
PARTS_OF = {  # template → roles whose content has to be parts
    "guard": (GUARD, {"user", "assistant", "system"}),
    "loop": (START + LOOP + END, {"user", "assistant", "system"}),
    "first part": (START + "{{ message['content'][0]['text'] }}" + END, {"user", "assistant", "system"}),
    "macro": (MACRO + START + "{{ show(message.content) }}" + END, {"user", "assistant", "system"}),
    "user only": (START + "{% if message.role == 'user' %}" + LOOP + "{% else %}{{ message.content }}{% endif %}" + END,
                  {"user"}),
    "system only": (START + "{% if message.role == 'system' %}" + LOOP + "{% else %}{{ message.content | trim }}{% endif %}"
                    + END, {"system"}),
    "text": (START + "{{ message['content'] }}" + END, set()),
    "trimmed": (START + "{{ message.content | trim }}" + END, set()),
    "added": (START + "{{ '' + message.content + '\\n' }}" + END, set()),
    "shouted": (START + "{{ message.content.upper() }}" + END, set()),
    "either": (START + EITHER + END, set()),
}  # fmt: skip
TALK = [
    {"role": "system", "content": " Be brief. "}, {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?\n"},
]  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), max_model_len=256, num_gpu_blocks_override=64, dtype="float32")


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of it."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def use(llm: LLM, monkeypatch: pytest.MonkeyPatch, template: str) -> Any:
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", template)
    return llm.get_tokenizer()


@pytest.mark.parametrize("name", PARTS_OF)
@pytest.mark.parametrize("turns", [TALK[1:2], TALK[:2], TALK, TALK[1:3]], ids=["user", "system", "talk", "assistant last"])
@pytest.mark.parametrize("given_as", ["text", "parts"])
def test_each_message_gets_the_form_that_the_template_reads(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str, turns: list[dict[str, str]], given_as: str
) -> None:
    template, wanted = PARTS_OF[name]
    tokenizer = use(llm, monkeypatch, template)
    right = [turn | {"content": parts(turn["content"])} if turn["role"] in wanted else turn for turn in turns]
    given = [turn | {"content": parts(turn["content"])} for turn in turns] if given_as == "parts" else turns
    expected = rendered(tokenizer, right)
    assert render_chat(tokenizer, given) == expected
    text = tokenizer.decode(expected).lower()
    assert all(turn["content"].strip().lower() in text for turn in turns)


def test_several_parts_stay_parts_where_they_are_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"role": "user", "content": parts("Name a", "colour")}]
    for template in (START + LOOP + END, START + EITHER + END, GUARD):
        tokenizer = use(llm, monkeypatch, template)
        assert render_chat(tokenizer, given) == rendered(tokenizer, given)
    joined = "Name a\ncolour"
    tokenizer = use(llm, monkeypatch, START + "{{ message.content }}" + END)
    assert render_chat(tokenizer, given) == rendered(tokenizer, [{"role": "user", "content": joined}])
    tokenizer = use(llm, monkeypatch, START + "{{ message['content'][0].text }}" + END)
    assert render_chat(tokenizer, given) == rendered(tokenizer, [{"role": "user", "content": parts(joined)}])


def test_messages_of_one_role_may_be_read_differently(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = START + "{% if loop.last %}" + LOOP + "{% else %}{{ message.content }}{% endif %}" + END
    tokenizer = use(llm, monkeypatch, template)
    right = [*TALK[:-1], {"role": "user", "content": parts(TALK[-1]["content"])}]
    assert render_chat(tokenizer, TALK) == rendered(tokenizer, right)


def test_a_template_may_leave_out_what_the_user_did_not_say_last(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for template in ("{{ messages[-1].content }}<assistant>", "{{ messages[-1].content[0].text }}<assistant>"):
        tokenizer = use(llm, monkeypatch, template)
        assert tokenizer.decode(render_chat(tokenizer, TALK)).endswith("And 3 + 3?\n<assistant>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("<assistant>", "leaves out what the user says"),
        ("{% for message in messages %}{{ message.text }}{% endfor %}", "leaves out what the user says"),
        ("{% for message in messages %}{{ message.content[0].value }}{% endfor %}", "leaves out what the user says"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages.nothing.there }}", "no attribute"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 'text'.index('q') }}", "not found"),
        ("{% for", "unexpected"),
    ],
)
def test_what_a_template_cannot_do_is_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch, template: str, says: str) -> None:
    use(llm, monkeypatch, template)
    with pytest.raises(ValueError, match=says) as caught:
        llm.chat(TALK[1:2], use_tqdm=False)
    assert "chat template" in str(caught.value)


def test_content_that_is_no_text_is_refused(llm: LLM) -> None:
    for content in ([{"type": "image_url", "image_url": {}}], [5]):
        with pytest.raises(ValueError, match="must be a text or a list"):
            llm.chat([{"role": "user", "content": content}], use_tqdm=False)


def test_no_template_is_one_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    use(llm, monkeypatch, "")
    with pytest.raises(ValueError, match="no chat template"):
        llm.chat(TALK[1:2], use_tqdm=False)


def test_a_template_is_tried_once_for_conversations_of_one_shape(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = use(llm, monkeypatch, GUARD + "{# counted #}")
    calls = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **kw: calls.append(kw) or apply(*args, **kw), raising=False
    )
    for text in ("a", "b", "c"):
        render_chat(tokenizer, [{"role": "user", "content": text}])
    assert sum("tokenize" not in call for call in calls) == 3
    assert sum("tokenize" in call for call in calls) <= 5


def test_roles_of_ones_own_are_written_or_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = use(llm, monkeypatch, START + "{{ message.content }}" + END)
    talk = [*TALK, {"role": "critic", "content": "Too long."}]
    assert render_chat(tokenizer, talk) == rendered(tokenizer, talk)
    known = "{% for message in messages %}{% if message.role != 'critic' %}{{ message.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out what the role 'critic' says"):
        render_chat(use(llm, monkeypatch, known), talk)


def test_many_roles_are_tried_in_few_ways(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ways for each of 40 roles would not end."""
    tokenizer = use(llm, monkeypatch, START + "{{ message.content[0].text }}" + END + "{# many #}")
    calls = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **kw: calls.append(kw) or apply(*args, **kw), raising=False
    )
    talk = [{"role": f"role{index}", "content": "x"} for index in range(40)]
    right = [{"role": each["role"], "content": parts("x")} for each in talk]
    assert render_chat(tokenizer, talk) == rendered(tokenizer, right)
    assert len(calls) < 10
