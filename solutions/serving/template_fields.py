"""The fields of a request that a chat template reads besides messages and tools."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from .openai_fields import Bool, Request

OURS = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "self", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
"""What transformers and this server give a template, or do with its text: none of it is a variable of a request's."""


class TemplateFields(Request):
    """The fields of a request."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """How much the model shall think: a variable of the same name. "none" sets `enable_thinking` to false, all others to true,
    unless the request sets it itself. Most templates read neither."""
    add_generation_prompt: Bool | None = None
    """Whether the prompt ends where the assistant speaks; true, unless it ends in the last message."""
    continue_final_message: Bool | None = None
    """The prompt ends in the last message, and the answer is how it goes on."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        if taken := sorted(OURS & (variables or {}).keys()):
            raise ValueError(f"{taken[0]!r} is no variable of a chat template that a request may set")
        return variables

    @field_validator("continue_final_message")
    @classmethod
    def _check_end(cls, goes_on: bool | None, info: ValidationInfo) -> bool | None:
        if goes_on and info.data.get("add_generation_prompt"):
            raise ValueError("cannot be combined with add_generation_prompt; leave that out")
        return goes_on

    @property
    def template_options(self) -> dict[str, Any]:
        """What a template is rendered with."""
        options: dict[str, Any] = {
            "add_generation_prompt": not self.continue_final_message and self.add_generation_prompt is not False
        }
        if self.continue_final_message:
            options["continue_final_message"] = True
        if self.reasoning_effort is not None:
            options |= {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return options | (self.chat_template_kwargs or {})
