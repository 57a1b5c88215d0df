"""Small random encoders with a tokenizer of words, in the layouts of folders that there are; and what they should answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, PreTrainedModel

CONTEXT = 64
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "sea", "is", "blue",
    ".", "!",
]  # fmt: skip
TEXTS = ["the sea is blue.", "a", "hello world! ", "The Sea IS blue", "sea " * 20, "ß"]
PIPELINE = "sentence_transformers.models."
POOLED = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken", "cls": "pooling_mode_cls_token"}


def make_bert(path: Path, **overrides: Any) -> BertModel:
    """Save a BERT whose layers and positions matter to `path`, with its tokenizer; overrides are arguments of `BertConfig`."""
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
        "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    model = BertModel(BertConfig(**(sizes | overrides))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(0.0, 0.2, generator=generator)
            else:
                param.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return model


def describe(path: Path, kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"), pooling: Any = None) -> None:
    """Write what sentence-transformers writes beside a model. pooling: the module's config.json; default: mean."""
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": folders.get(kind, kind), "type": PIPELINE + kind} for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    flags = {"word_embedding_dimension": 64, **{flag: kind == "mean" for kind, flag in POOLED.items()}}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(flags if pooling is None else pooling))


def pooled(hidden: np.ndarray, mask: np.ndarray, kind: str, normalize: bool) -> np.ndarray:
    """What sentence-transformers makes of hidden states [S, L, hidden], padded on the right: [S, hidden]."""
    if kind == "mean":
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    else:
        vectors = hidden[np.arange(len(hidden)), mask.sum(1) - 1 if kind == "last" else 0]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


@torch.inference_mode()
def oracle(model: PreTrainedModel, prompts: list[list[int]], kind: str = "mean", normalize: bool = True) -> np.ndarray:
    """The vectors of prompts by transformers, all in one padded batch: [S, hidden]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return pooled(hidden.float().numpy(), mask.numpy(), kind, normalize)


def tokens(path: Path, texts: list[str], limit: int = CONTEXT, side: str = "right") -> list[list[int]]:
    """Token ids by transformers' tokenizer, cut as it cuts."""
    tokenizer = AutoTokenizer.from_pretrained(path, truncation_side=side)
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    return ids
