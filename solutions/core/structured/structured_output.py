"""Structured answers: JSON that follows a schema, a regular expression, one of several choices, or a grammar.

A grammar is compiled once into an automaton over the vocabulary. At each step it says which tokens may come next; all others
get a logit of minus infinity. The automaton is XGrammar's (Dong et al., "XGrammar: Flexible and Efficient Structured
Generation Engine for Large Language Models", 2024); here it is followed along a sequence, drafts on trial included.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...batching.sampling_params import StructuredOutput
from ..grammar.json_schema import to_grammar
from ..grammar.structural_tag import checked, tag_format, to_xgrammar, with_grammars
from ..platform.transfer import to_device

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, TokenizerInfo

TOKEN_SECONDS = 0.0125
"""Processor time that each token of an automaton may take in the long run; 0.0003 is usual."""
SLACK_SECONDS = 1.0
"""Time beyond that, over all tokens, after which the answer is cut off, because the whole batch waits for it."""
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


class Guide:
    """Says which tokens may come next in one sequence.

    Args:
        give_up: called, with the number of certain output tokens, when the automaton has held up everybody for too long.
    """

    def __init__(self, grammar: CompiledGrammar, give_up: Callable[[int], None] | None = None) -> None:
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(grammar)
        self._seen = 0
        """Output tokens that the automaton has gone through."""
        self._give_up = give_up
        self._excess = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the answer is complete, with the token that ends it."""
        return self._matcher.is_terminated()

    def allow(self, outputs: list[list[int]], masks: Tensor) -> None:
        """Say which tokens may follow each of several outputs, each of which is the one before and one token more.

        Only the first output is certain. The others hold drafts, which the automaton forgets again. After a draft that does not
        fit the form, any token may come, because that draft is rejected anyway.

        Args:
            outputs: R lists of output tokens. masks: [R, ceil(V / 32)] int32, a bit for each token; overwritten.
        """
        before = time.thread_time()
        self._follow(outputs, masks)
        self._excess = max(0.0, self._excess + time.thread_time() - before - TOKEN_SECONDS * len(outputs))
        if self._excess > SLACK_SECONDS and self._give_up is not None:
            self._give_up(len(outputs[0]))

    def _follow(self, outputs: list[list[int]], masks: Tensor) -> None:
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
        guide.allow([seq.output_token_ids for _, seq in places], masks[start : start + len(places)])
        start += len(places)
    bits = (
        to_device(masks, torch.int32, logits.device)[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32)
        & 1
    )
    forbidden = bits.flatten(1)[:, :vocab_size] == 0  # [R, V]
    for index, row in enumerate(rows):
        logits[row, :vocab_size].masked_fill_(forbidden[index], -torch.inf)


def by_guide(sequences: Sequence[Any]) -> list[tuple[Guide, list[tuple[int, Any]]]]:
    """Guides with their rows, in the order of the rows."""
    found: dict[Guide, list[tuple[int, Any]]] = {}
    for row, seq in enumerate(sequences):
        if seq.guide is not None:
            found.setdefault(seq.guide, []).append((row, seq))
    return list(found.items())
