"""The tokenizer inside a GGUF file, as a Hugging Face fast tokenizer.

A GGUF stores vocabulary, merges or scores, and special ids; how text is cut before that is only named
(``tokenizer.ggml.pre``), so each name's meaning is written here, as the model's original ``tokenizer.json`` has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from .config.model_config import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Token types of llama.cpp that are not cut by the tokenizer's model."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(pattern), behavior="isolated"), use_regex=False)


_GPT2 = _byte_level(use_regex=True)
_SINGLE_DIGITS = _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)
_LLAMA3 = _split(_LLAMA3_SPLIT)
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "tekken": _split(_TEKKEN_SPLIT),
}
"""By ``tokenizer.ggml.pre``."""


def tokenizer_from_gguf(metadata: dict[str, Any], context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        metadata: the keys under ``tokenizer.``, without that prefix.
        context: the model's context in tokens.

    Raises:
        ModelError: the kind of tokenizer, or its pre-tokenizer, is not supported.
    """
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    kind = metadata.get("ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise ModelError(f"tokenizer {kind!r} in the GGUF file is not supported; supported are gpt2 and llama")
    tokens, types = metadata["ggml.tokens"], metadata.get("ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type != _USER_DEFINED, normalized=False)])
    special = {
        f"{name}_token": tokens[metadata[f"ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if metadata.get(f"ggml.{key}_token_id") is not None
    }
    if _adds_bos(metadata) and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, metadata["ggml.bos_token_id"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, chat_template=metadata.get("chat_template"), model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Files that do not say: llama.cpp begins every text with BOS for SentencePiece and for Llama 3."""
    silent = metadata["ggml.model"] == "llama" or PRE_TOKENIZERS.get(metadata.get("ggml.pre", "")) is _LLAMA3
    return metadata.get("ggml.add_bos_token", silent)


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    pre = metadata.get("ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"pre-tokenizer {pre!r} in the GGUF file is not supported; known: {', '.join(PRE_TOKENIZERS)}")
    vocab = {token: index for index, token in enumerate(metadata["ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["ggml.merges"]]
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=merges, ignore_merges=PRE_TOKENIZERS[pre] is _LLAMA3))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(**parts: Any) -> BPE:
    try:
        return BPE(**parts)
    except Exception as error:  # the library has no narrower type
        raise ModelError(f"the tokenizer in the GGUF file is damaged ({error})") from None


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE as Hugging Face writes it: spaces are ``▁``, unknown characters fall back to bytes."""
    tokens = metadata["ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, metadata["ggml.scores"])
    unknown = tokens[metadata.get("ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins_with_space = metadata.get("ggml.add_space_prefix", True)
    spaces, unspaces = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if begins_with_space else [spaces])
    strip = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    tokenizer.decoder = decoders.Sequence([unspaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score of the result first: training scored in merge order."""
    merges = []
    for token, index in vocab.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab)
        merges.extend((-scores[index], index, a, b) for _, _, a, b in known)
    merges.sort(key=lambda merge: merge[:2])
    return [(a, b) for _, _, a, b in merges]
