"""The tokenizer inside a GGUF file, as a Hugging Face fast tokenizer.

A GGUF stores vocabulary, merges or scores, and special ids; how text is cut before that is only named, see `gguf_cutting`.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from .config.entries import Entries, ModelError
from .gguf_bert import word_piece_tokenizer, word_pieces
from .gguf_cutting import CUTTINGS

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

    kind, tokens, words = metadata.text("ggml.model", None), metadata.many("ggml.tokens", str), dict[str, str]()
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens)
    elif kind == "bert":
        tokens = word_pieces(metadata, tokens)
        tokenizer, words = word_piece_tokenizer(metadata, tokens)
    else:
        raise ModelError(f"tokenizer {kind!r} in the GGUF file is not supported; supported are gpt2, llama and bert")
    types = metadata.many("ggml.token_type", int, [])
    for token, token_type in zip_longest(tokens, types[: len(tokens)]):
        if token in END_TOKENS:
            token_type = _CONTROL  # whatever the file says, as in llama.cpp
        if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type != _USER_DEFINED, normalized=False)])
    named = {name: _special_id(metadata, key, len(tokens)) for name, key in _SPECIAL_TOKENS.items()}
    special = {f"{name}_token": tokens[index] for name, index in named.items() if index is not None}
    if tokenizer.post_processor is None:
        tokenizer.post_processor = _around(metadata, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **(special | words), chat_template=_chat_template(metadata), model_max_length=context,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _around(metadata: Entries, special: dict[str, str]) -> processors.TemplateProcessing:
    """BOS in front of a text and EOS behind it, where a file wants them and has them."""
    wanted = {"bos_token": _adds_bos(metadata), "eos_token": metadata.flag("ggml.add_eos_token", False)}
    before, after = ([special[name]] if wanted[name] and name in special else [] for name in wanted)
    second = [f"{token}:1" for token in (*before, "$B", *after)]
    tokens = metadata.many("ggml.tokens", str)
    known = [(token, tokens.index(token)) for token in dict.fromkeys((*before, *after))]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *second], special_tokens=known
    )


def _chat_template(metadata: Entries) -> str | dict[str, str] | None:
    """The file's template; with those that it names besides ("tool_use", "rag"), if there are some."""
    default, prefix = metadata.text("chat_template", None), "chat_template."
    others = {key.removeprefix(prefix): metadata.text(key) for key in metadata.content if key.startswith(prefix)}
    return others | ({} if default is None else {"default": default}) if others else default


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
    """Files that do not say: llama.cpp begins every text with BOS for SentencePiece, and where `Cutting.begins` says so."""
    cutting = CUTTINGS.get(metadata.text("ggml.pre", ""))
    silent = metadata.text("ggml.model") == "llama" or (cutting is not None and cutting.begins)
    return metadata.flag("ggml.add_bos_token", silent)


def _byte_level_bpe(metadata: Entries, tokens: list[str]) -> Tokenizer:
    pre = metadata.text("ggml.pre", "default")
    if pre not in CUTTINGS:
        raise ModelError(f"pre-tokenizer {pre!r} in the GGUF file is not supported; known: {', '.join(CUTTINGS)}")
    cutting = CUTTINGS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.many("ggml.merges", str)]
    tokenizer = Tokenizer(_bpe(vocab=vocab, merges=merges, ignore_merges=cutting.whole_words))
    tokenizer.pre_tokenizer = cutting.words
    if cutting.normalizer is not None:
        tokenizer.normalizer = cutting.normalizer
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
