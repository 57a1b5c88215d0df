"""Answers of a given form: JSON after a schema, a regular expression, one of some choices, a grammar.

A grammar is compiled once into an automaton over the vocabulary; at each step it says which tokens may come next, and all
others get a logit of minus infinity. The automaton is XGrammar's (Dong et al., "XGrammar: Flexible and Efficient Structured
Generation Engine for Large Language Models", 2024); here it is followed along a sequence, drafts on trial included.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batching.sequence import StructuredOutput
from ..grammar.json_schema import to_grammar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

CACHE_BYTES = 256 << 20
"""Compiled grammars that are kept."""
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
        self._vocab_size = vocab_size
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)

    def compile(self, wanted: StructuredOutput) -> CompiledGrammar:
        """The automaton of a form. What answers to a JSON schema look like, and which schemas there are, `to_grammar` says.

        Raises:
            ValueError: it is not well-formed, and the message says where; or no text has this form.
        """
        kind, text = wanted.kind, wanted.definition
        try:
            if kind in ("json", "json_object"):
                grammar = self._compiler.compile_grammar(_json_grammar(OBJECT if kind == "json_object" else text))
            elif kind == "regex":
                grammar = self._compiler.compile_regex(text)
            elif kind == "choice":
                quoted = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
                grammar = self._compiler.compile_grammar(f"root ::= {' | '.join(quoted)}")
            else:
                grammar = self._compiler.compile_grammar(text)
        except RuntimeError as error:  # XGrammar's only kind of error
            message = _PLACE.sub("", str(error)).strip().splitlines()[0]
            raise ValueError(f"structured_output: the {kind} is not valid: {message}") from None
        except UnicodeEncodeError:
            raise ValueError(f"structured_output: the {kind} is not valid: it holds half of a surrogate pair") from None
        first = torch.empty(1, -(-self._vocab_size // 32), dtype=torch.int32)
        Guide(grammar).allow([[]], first)
        if not bool(first.any()):
            raise ValueError(f"structured_output: the {kind} is not valid: there is no text of this form")
        return grammar


def _json_grammar(schema: str) -> str:
    try:
        return to_grammar(schema)
    except ValueError as error:
        place = "" if str(error).startswith("the keyword") else "the json is not valid: "
        raise ValueError(f"structured_output: {place}{error}") from None


class Guide:
    """Which tokens may come next in one sequence."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(grammar)
        self._seen = 0
        """Output tokens that the automaton has gone through."""

    def allow(self, outputs: list[list[int]], masks: Tensor) -> None:
        """Say what may come behind each of several outputs, of which each is the one before and a token more.

        Only the first is certain: those behind it hold drafts, which the automaton forgets again. Behind a draft that it would
        not take anything may come, for that draft is rejected.

        Args:
            outputs: R lists of output tokens. masks: [R, ceil(V / 32)] int32, a bit for each token; overwritten.
        """
        masks.fill_(-1)
        for token in outputs[0][self._seen :]:
            self._matcher.accept_token(token)
        self._seen = len(outputs[0])
        trial = 0
        for row, output in enumerate(outputs):
            if row:
                if self._matcher.is_terminated() or not self._matcher.accept_token(output[-1]):
                    break
                trial += 1
            if not self._matcher.is_terminated():
                self._matcher.fill_next_token_bitmask(masks, row)
        if trial:
            self._matcher.rollback(trial)


def forbid(logits: Tensor, guided: list[tuple[Guide, list[tuple[int, Any]]]], vocab_size: int) -> None:
    """Give every token that may not come next a logit of minus infinity.

    Args:
        logits: [N, W], changed in place. guided: each guide with its rows and their sequences, shortest first.
        vocab_size: V, of the W columns.
    """
    rows = [row for _, places in guided for row, _ in places]
    masks = torch.empty(len(rows), -(-vocab_size // 32), dtype=torch.int32)
    start = 0
    for guide, places in guided:
        guide.allow([seq.tokens[seq.num_prompt_tokens :] for _, seq in places], masks[start : start + len(places)])
        start += len(places)
    bits = masks.to(logits.device)[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32) & 1
    forbidden = bits.flatten(1)[:, :vocab_size] == 0  # [R, V]
    for index, row in enumerate(rows):
        logits[row, :vocab_size].masked_fill_(forbidden[index], -torch.inf)


def by_guide(sequences: list[Any]) -> list[tuple[Guide, list[tuple[int, Any]]]]:
    """Guides with their rows, in the order of the rows."""
    found: dict[Guide, list[tuple[int, Any]]] = {}
    for row, seq in enumerate(sequences):
        if seq.guide is not None:
            found.setdefault(seq.guide, []).append((row, seq))
    return list(found.items())
