"""Tests whether an automaton is fast enough for an engine, by following it along some texts and measuring the time."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from .guide import Guide

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

WALKS = 2
STEPS = 64
"""Tokens of a walk. Automata that slow down do so early."""
ALLOWANCE = 16
"""All tokens together may take as long as this many tokens at the limit: an eighth of all."""


def probe(grammar: CompiledGrammar, vocab_size: int, seconds: float) -> bool:
    """Follow an automaton along random texts of its form, the same ones each time.

    Returns:
        Whether it is too slow: one token took more than `seconds` of processor time, or all of them `ALLOWANCE` times that.
    """
    masks = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32)
    draw, total = random.Random(0), 0.0
    for _ in range(WALKS):
        guide = Guide(grammar)
        output: list[int] = []
        for _ in range(STEPS):
            before = time.thread_time()
            guide.allow([output], masks)
            took = time.thread_time() - before
            total += took
            if took > seconds or total > ALLOWANCE * seconds:
                return True
            bits = np.unpackbits(masks.numpy().view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits[:vocab_size])
            if guide.has_ended or not len(allowed):
                break
            output = [*output, int(allowed[draw.randrange(len(allowed))])]
    return False
