"""Structured answers: JSON that follows a schema, a regular expression, one of several choices, or a grammar.

Each is compiled once into an automaton over the vocabulary, which a `Guide` then follows along a sequence. The automaton is
XGrammar's (Dong et al., "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", 2024).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch

from ...batching.sampling_params import StructuredOutput
from ..grammar.json_schema import to_grammar
from ..grammar.structural_tag import checked, tag_format, to_xgrammar, with_grammars
from .guide import Guide

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, TokenizerInfo

OBJECT = '{"type": "object"}'
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""What XGrammar's messages begin with: a time, and a line of its source."""


class GrammarCompiler:
    """Compiles for one model; any thread may call it.

    Args:
        tokenizer: a fast tokenizer of transformers. vocab_size: V, the length of a row of logits. eos_token_ids: what ends an
            answer, which is allowed only where the form is complete.

    Raises:
        ValueError: XGrammar is not installed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        try:
            import xgrammar
        except ImportError:
            raise ValueError("structured_output needs XGrammar, which is not installed; run: pip install xgrammar") from None
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=list(eos_token_ids))
        self._set_up(info, vocab_size)

    @classmethod
    def from_vocabulary(cls, vocabulary: str, vocab_size: int) -> GrammarCompiler:
        """What another process's compiler is made of: its `vocabulary` and `vocab_size`."""
        from xgrammar import TokenizerInfo

        compiler = cls.__new__(cls)
        compiler._set_up(TokenizerInfo.deserialize_json(vocabulary), vocab_size)
        return compiler

    def _set_up(self, info: TokenizerInfo, vocab_size: int) -> None:
        from xgrammar import GrammarCompiler as Compiler

        self.vocab_size = vocab_size
        self._info = info
        self._compiler = Compiler(info, max_threads=1, cache_enabled=False)

    @property
    def vocabulary(self) -> str:
        """Tokens and ends of answers, in XGrammar's own form."""
        return self._info.serialize_json()

    def compile(self, wanted: StructuredOutput) -> CompiledGrammar:
        """The automaton of a form. What answers to a JSON schema look like, and which schemas there are, `to_grammar` says.

        Raises:
            ValueError: it is not well-formed, and the message says where; or no text has this form.
        """
        kind, text = wanted.kind, wanted.definition
        try:
            if kind in ("json", "json_object"):
                schema = OBJECT if kind == "json_object" else text
                grammar = self._compiler.compile_grammar(_json_grammar(schema, wanted.white_space))
            elif kind == "regex":
                grammar = self._compiler.compile_regex(checked("regex", text))
            elif kind == "structural_tag":
                tag = {"type": "structural_tag", "format": with_grammars(tag_format(text), {})}
                grammar = self._compiler.compile_structural_tag(tag)
            elif kind == "choice":
                quoted = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                grammar = self._compiler.compile_grammar(f"root ::= {' | '.join(quoted)}")
            else:
                grammar = self._compiler.compile_grammar(to_xgrammar(text))
        except RecursionError:
            raise ValueError(f"structured_output: the {kind} is nested too deeply") from None
        except RuntimeError as error:  # XGrammar's only kind of error
            message = _PLACE.sub("", str(error)).strip().splitlines()[0]
            raise ValueError(f"structured_output: the {kind} is not valid: {message}") from None
        except UnicodeEncodeError:
            raise ValueError(f"structured_output: the {kind} is not valid: it holds half of a surrogate pair") from None
        first = torch.empty(1, -(-self.vocab_size // 32), dtype=torch.int32)
        Guide(grammar).allow([[]], first)
        if not bool(first.any()):
            raise ValueError(f"structured_output: the {kind} is not valid: there is no text of this form")
        return grammar


def _json_grammar(schema: str, white_space: str | None) -> str:
    try:
        return to_grammar(schema, white_space)
    except ValueError as error:
        place = "" if str(error).startswith("the keyword") else "the json is not valid: "
        raise ValueError(f"structured_output: {place}{error}") from None
