"""What a GGUF file of BERT says of its model and its words, and what any file says of embeddings.

llama.cpp writes WordPiece's vocabulary (Devlin et al., 2019) the other way round: what begins a word has a space (``▁``) in
front, where BERT marks what goes on within a word with ``##``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import PoolingType
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from .config.entries import Entries, ModelError

OUTER_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}
LAYER_NAMES = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
POOLINGS = {int(PoolingType.MEAN): "mean", int(PoolingType.CLS): "cls", int(PoolingType.LAST): "lasttoken"}
"""By ``pooling_type``; 0 is none."""


def bert_config(metadata: Entries, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """The ``config.json`` of a BERT, but for its dtype.

    Raises:
        ModelError: an entry is missing or wrong.
        KeyError: a tensor is missing.
    """
    heads = metadata.whole("bert.attention.head_count")
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": metadata.whole("bert.embedding_length"),
        "intermediate_size": metadata.whole("bert.feed_forward_length"),
        "num_hidden_layers": metadata.whole("bert.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": int(tensors["position_embd.weight"].shape[1]),
        "type_vocab_size": int(tensors["token_types.weight"].shape[1]),
        "layer_norm_eps": float(str(np.float32(metadata.number("bert.attention.layer_norm_epsilon")))),  # the shortest decimal
        "hidden_act": "gelu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def word_pieces(metadata: Entries, tokens: list[str]) -> list[str]:
    """A file's tokens as BERT has them. Those with a type of their own, such as ``[CLS]``, are the same."""
    control = int(gguf.TokenType.CONTROL)
    types = metadata.many("ggml.token_type", int, [])
    types = types + [0] * (len(tokens) - len(types))
    return [
        token if kind == control else token[1:] if token.startswith("▁") else f"##{token}"
        for token, kind in zip(tokens, types, strict=False)
    ]


def word_piece_tokenizer(metadata: Entries, tokens: list[str]) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer of `word_pieces`, and its special tokens by the names that transformers has for them.

    Raises:
        ModelError: it has no token for unknown words, or none for an end of a text.
    """
    keys = {"cls": "cls", "sep": "seperator", "unk": "unknown", "mask": "mask"}  # sic
    special: dict[str, str] = {}
    for name, key in keys.items():
        ids = metadata.token_ids(f"ggml.{key}_token_id", len(tokens))
        if ids or f"[{name.upper()}]" in tokens:  # as BERT calls them, where a file is silent
            special[f"{name}_token"] = tokens[ids[0]] if ids else f"[{name.upper()}]"
    if not {"cls_token", "sep_token", "unk_token"} <= special.keys():
        raise ModelError(
            f"{metadata.where}: ggml.cls_token_id, ggml.seperator_token_id or ggml.unknown_token_id names no token"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token=special["unk_token"]))
    lowercase = metadata.flag("ggml.normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=metadata.flag("ggml.normalizer.strip_accents", lowercase)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(special[name], vocab[special[name]]) for name in ("sep_token", "cls_token")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer, special


def write_pooling(metadata: Entries, folder: Path) -> None:
    """How texts become vectors, in the files that sentence-transformers has for it; nothing where the file does not say it.

    Raises:
        ModelError: vectors are made in a way that is not supported.
    """
    name = metadata.text("general.architecture")
    kind = metadata.whole(f"{name}.pooling_type", 0, low=0)
    if not kind:
        return
    if kind not in POOLINGS:
        raise ModelError(f"{metadata.where}: {name}.pooling_type {kind} is not supported; 1 (mean), 2 (cls) and 3 (last) are")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    content = [{"path": path, "type": f"sentence_transformers.models.{module}"} for path, module in modules]
    (folder / "modules.json").write_text(json.dumps(content))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": POOLINGS[kind]}))
