"""An engine whose model is never run: all that a step costs the host, beside a device that takes as long as it is told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ...models.loader import resolve_model
from ..config import EngineConfig
from ..engine import LLMEngine
from .device import SimulatedDevice

TEXT = (
    "The harbour opens at 6:30, and by 7 o'clock there are usually 14 or 15 boats at the quay. Each of them wants a berth, "
    "none of them knows how long it will stay, and the harbour master, Zoë, has only so much room to give away. In her first "
    "year she kept a long berth free for everybody – just in case. “It's simple,” she used to say; it was, and half of the "
    "quay stood empty while people waited outside! Now she hands out short pieces, one after the other, and writes into a "
    "table which piece belongs to whom: boat № 3 lies at pieces 8, 2 and 41… The café at the corner has never been busier.\n"
)
"""Decoded over and over: words, numbers, punctuation, and characters of several bytes, as in real outputs."""


def make_engine(num_seqs: int, num_tokens: int, prefix_caching: bool, tokenizer_of: str) -> LLMEngine:
    """An engine whose model is never run, with room for `num_seqs` sequences of `num_tokens` tokens at once. Raises ValueError
    if the model whose tokenizer it gets cannot be had, or has none."""
    source, block_size = resolve_model(tokenizer_of), EngineConfig().block_size
    if source.tokenizer_path is None:
        raise ValueError(f"{tokenizer_of} has no tokenizer here, and making text is a part of what is measured")
    tiny: dict[str, int | float] = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    tiny |= {"hidden_size": 16, "intermediate_size": 16, "vocab_size": source.config.vocab_size, "rms_norm_eps": 1e-5}
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096} | tiny
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        config = EngineConfig(
            model=folder, tokenizer=str(source.tokenizer_path), load_format="dummy", device="cpu", dtype="float32",
            max_model_len=max(num_tokens, 2), max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs * num_tokens,
            num_gpu_blocks_override=int(1.02 * num_seqs * -(-num_tokens // block_size)) + 2,
            enable_prefix_caching=prefix_caching,
        )  # fmt: skip
        engine = LLMEngine(config)
    assert engine.tokenizer is not None  # it has a path
    stand_in: Any = SimulatedDevice(0.0, engine.tokenizer.encode(TEXT))
    engine.executor = stand_in
    return engine
