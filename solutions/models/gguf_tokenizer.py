"""The tokenizer inside a GGUF file, as a Hugging Face fast tokenizer.

A GGUF stores vocabulary, merges or scores, and special ids; how text is cut before that is only named
(``tokenizer.ggml.pre``), so each name's meaning is written here, as the model's original ``tokenizer.json`` has it.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from .config.entries import Entries, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_TOKENS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "</s>", "<eos>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|return|>", "<|call|>",
)  # fmt: skip
"""Tokens that end a text or a turn wherever a vocabulary has them. llama.cpp knows them by these names, too, because files
often name one end and chat templates write another. It also stops at names that part files of code, which end no text."""

_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""transformers' names, and GGUF's."""

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
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(pattern), behavior="isolated"), use_regex=False)


_GPT2 = _byte_level(use_regex=True)
_SINGLE_DIGITS = _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)
_LLAMA3 = _split(_LLAMA3_SPLIT)
_QWEN2 = _split(_QWEN2_SPLIT)
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "olmo": _GPT2,  # GPT-NeoX, too
    "command-r": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "dbrx": _split(_LLAMA3_SPLIT),  # OLMo 2
    "qwen2": _QWEN2,
    "gpt-4o": _split(_GPT4O_SPLIT),  # Phi-4-mini
    "tekken": _split(_TEKKEN_SPLIT),
}
"""By ``tokenizer.ggml.pre``."""


def end_tokens(metadata: Entries) -> list[int]:
    """Ids of the tokens that end a text, those that the file names as such first."""
    tokens = metadata.many("tokenizer.ggml.tokens", str)
    kinds = [metadata.token_ids(f"tokenizer.ggml.{kind}_token_id", len(tokens)) for kind in ("eos", "eot", "eom")]
    named = [token for ids in kinds for token in ids or ()]
    names = set(END_TOKENS)
    if {"<|return|>", "<|call|>"} <= set(tokens):
        names.discard("<|end|>")  # there it ends a message, behind which the answer goes on
    found = [index for index, token in enumerate(tokens) if token in names]
    return list(dict.fromkeys(named + found))


def tokenizer_from_gguf(metadata: Entries, context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        metadata: the keys under ``tokenizer.``, without that prefix.
        context: the model's context in tokens.

    Raises:
        ModelError: the kind of tokenizer, or its pre-tokenizer, is not supported, or an entry is missing or wrong.
    """
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    kind, tokens = metadata.text("ggml.model", None), metadata.many("ggml.tokens", str)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens)
    else:
        raise ModelError(f"tokenizer {kind!r} in the GGUF file is not supported; supported are gpt2 and llama")
    types = metadata.many("ggml.token_type", int, [])
    for token, token_type in zip_longest(tokens, types[: len(tokens)]):
        if token in END_TOKENS:
            token_type = _CONTROL  # whatever the file says, as in llama.cpp
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type != _USER_DEFINED, normalized=False)])
    named = {name: _special_id(metadata, key, len(tokens)) for name, key in _SPECIAL_TOKENS.items()}
    special = {f"{name}_token": tokens[index] for name, index in named.items() if index is not None}
    if named["bos"] is not None and _adds_bos(metadata):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, named["bos"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, chat_template=metadata.text("chat_template", None), model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _special_id(metadata: Entries, key: str, num_tokens: int) -> int | None:
    """The id in an entry; None: there is none.

    Raises:
        ModelError: it is outside the vocabulary, and texts would be cut otherwise without it.
    """
    name = f"ggml.{key}_token_id"
    found = metadata.token_ids(name, num_tokens)
    if found == [] and key in ("bos", "unknown"):
        raise ModelError(f"{metadata.where}: {name} is {metadata.content[name]}, and the vocabulary has {num_tokens} tokens")
    return found[0] if found else None


def _adds_bos(metadata: Entries) -> bool:
    """Files that do not say: llama.cpp begins every text with BOS for SentencePiece and for Llama 3."""
    silent = metadata.text("ggml.model") == "llama" or PRE_TOKENIZERS.get(metadata.text("ggml.pre", "")) is _LLAMA3
    return metadata.flag("ggml.add_bos_token", silent)


def _byte_level_bpe(metadata: Entries, tokens: list[str]) -> Tokenizer:
    pre = metadata.text("ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"pre-tokenizer {pre!r} in the GGUF file is not supported; known: {', '.join(PRE_TOKENIZERS)}")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.many("ggml.merges", str)]
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=merges, ignore_merges=PRE_TOKENIZERS[pre] is _LLAMA3))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    if PRE_TOKENIZERS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _bpe(**parts: Any) -> BPE:
    try:
        return BPE(**parts)
    except Exception as error:  # the library has no narrower type
        raise ModelError(f"the tokenizer in the GGUF file is damaged ({error})") from None


def _sentencepiece_bpe(metadata: Entries, tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE as Hugging Face writes it: spaces are ``▁``, unknown characters fall back to bytes."""
    vocab = {token: index for index, token in enumerate(tokens)}
    scores = metadata.many("ggml.scores", float)
    if len(scores) < len(tokens):
        raise ModelError(f"{metadata.where}: ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    merges = merges_from_scores(vocab, scores)
    unknown = tokens[_special_id(metadata, "unknown", len(tokens)) or 0]
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins_with_space = metadata.flag("ggml.add_space_prefix", True)
    spaces, unspaces = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if begins_with_space else [spaces])
    strip = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    tokenizer.decoder = decoders.Sequence([unspaces, decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score of the result first: training scored in merge order."""
    merges: list[tuple[float, int, str, str]] = []
    for token, index in vocab.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = sorted((vocab[a], vocab[b], a, b) for a, b in pairs if a in vocab and b in vocab)
        merges.extend((-scores[index], index, a, b) for _, _, a, b in known)
    merges.sort(key=lambda merge: merge[:2])
    return [(a, b) for _, _, a, b in merges]
