"""SentencePiece's own file, ``tokenizer.model``, as a Hugging Face fast tokenizer.

Llama 2 and what was made of it, Vicuna for one, are often kept with this file alone. The conversion that transformers has
drops the space in front of a text that begins with one, takes every model for BPE, and normalizes nothing.
SentencePiece is Kudo and Richardson, 2018; BPE and its scores are described in `gguf_tokenizer`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from .config.entries import Entries, ModelError, read_json
from .gguf_tokenizer import merges_from_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Types of pieces."""
_UNIGRAM, _BPE = 1, 2
"""Types of models; the others, words and characters, no language model has."""
_OF_OTHER_CLASSES = {
    "tokenizer_class", "auto_map", "legacy", "sp_model_kwargs", "add_prefix_space", "tokenizer_file", "vocab_file",
    "add_bos_token", "add_eos_token",
}  # fmt: skip
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def load_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder without ``tokenizer.json``; special and added tokens and the template as its other files say.

    Raises:
        ModelError: it is no SentencePiece model, or of a kind that is not supported.
    """
    from transformers import PreTrainedTokenizerFast  # takes a second

    proto = read_proto(folder / "tokenizer.model")
    config_file = folder / "tokenizer_config.json"
    given = read_json(config_file) if config_file.is_file() else {}
    tokenizer = convert(proto, every_part=Entries(given, config_file.name).flag("legacy", False))
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    special = {name: proto.pieces[index].piece for name, index in ids.items() if 0 <= index < len(proto.pieces)}
    config = special | {"clean_up_tokenization_spaces": False} | given
    config = {key: value for key, value in config.items() if key not in _OF_OTHER_CLASSES}
    with tempfile.TemporaryDirectory() as made:  # in the form that the library reads all of this from
        tokenizer.save(f"{made}/tokenizer.json")
        (Path(made) / config_file.name).write_text(json.dumps(config), encoding="utf-8")
        for file in _BESIDE:
            if (folder / file).is_file():
                shutil.copy(folder / file, made)
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(made)
    ends = {"bos": given.get("add_bos_token", True), "eos": given.get("add_eos_token", False)}
    added = {key: getattr(loaded, f"{key}_token") for key, wanted in ends.items() if wanted}
    bos, eos = (f"{added[key]} " if added.get(key) is not None else "" for key in ends)
    known = [(token, loaded.convert_tokens_to_ids(token)) for token in added.values() if token is not None]
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}$A {eos}".strip(), pair=f"{bos}$A {eos}{bos}$B {eos}".strip(), special_tokens=known
    )
    return loaded


def read_proto(path: Path) -> Any:
    """The ``ModelProto`` in a file.

    Raises:
        ModelError: there is none.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it when it is imported
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ModelError(f"{path} is no SentencePiece model; give the folder a tokenizer.json") from None
    if not proto.pieces:
        raise ModelError(f"{path} is no SentencePiece model: it has no pieces")
    return proto


def convert(proto: Any, every_part: bool = False) -> Tokenizer:
    """A tokenizer that cuts a text as SentencePiece does.

    Args:
        proto: a ``ModelProto``.
        every_part: put the space that SentencePiece puts before a text also behind each special token, as transformers did at
            first and still does for files that say ``legacy``.

    Raises:
        ModelError: the model is neither BPE nor unigram, or takes spaces for the ends of words.
    """
    spec = proto.trainer_spec
    if spec.model_type not in (_UNIGRAM, _BPE) or spec.treat_whitespace_as_suffix:
        raise ModelError("tokenizer.model: only SentencePiece's BPE and unigram models with spaces before words are supported")
    pieces = [piece.piece for piece in proto.pieces]
    unknown = next((index for index, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
    if unknown is None or len(set(pieces)) < len(pieces):
        raise ModelError("tokenizer.model is damaged: it has no unknown piece, or one piece twice")
    if spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        tokenizer = Tokenizer(Unigram(scores, unk_id=unknown, byte_fallback=spec.byte_fallback))
    else:
        mergeable = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
        merges = merges_from_scores(mergeable, [piece.score for piece in proto.pieces])
        vocab = {piece: index for index, piece in enumerate(pieces)}
        tokenizer = Tokenizer(
            BPE(vocab=vocab, merges=merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=spec.byte_fallback)
        )
    _shape_text(tokenizer, proto.normalizer_spec, every_part)
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece.piece, special=piece.type != _USER_DEFINED, normalized=False)])
    return tokenizer


def _shape_text(tokenizer: Tokenizer, spec: Any, every_part: bool) -> None:
    """What happens to a text before it is cut, and to the pieces when they become a text again."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    prefix_once = spec.add_dummy_prefix and not every_part
    if spec.remove_extra_whitespaces:  # a space that the prefix would double stays: "first" below takes it for the prefix
        steps += [normalizers.Replace(Regex("[ ▁]{2,}"), " "), normalizers.Strip(left=not prefix_once)]
    if spec.add_dummy_prefix and every_part:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    before: list[pre_tokenizers.PreTokenizer] = []
    if prefix_once:
        # "first" adds nothing to a text that begins with the character itself, and by now none begins with a space
        before = [pre_tokenizers.Metaspace("▁" if spec.remove_extra_whitespaces else " ", "first", split=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.Metaspace("▁", "never", split=False)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
