"""GGUF files of BERT: words are cut and texts become vectors as transformers does it with the model that a file was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel

from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.embedding_models import TEXTS, WORDS, make_bert, oracle, tokens
from solutions.tests.gguf_files import cache, write_out, write_shape

__all__ = ["cache"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert(path: Path, model: PreTrainedModel, pooling: int | None = None, kind: str = "F32", **more: Any) -> Path:
    """A file as llama.cpp's converter writes it: words with a space in front, and the pieces that go on without a mark.

    Args:
        pooling: ``bert.pooling_type``. kind: of the matrices. more: ids of special tokens, and other words (`names`) by id.
    """
    writer, config = gguf.GGUFWriter(path, "bert"), model.config
    write_shape(writer, config)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    words = [word if word in SPECIAL else word[2:] if word.startswith("##") else f"▁{word}" for word in WORDS]
    for index, word in more.pop("names", {}).items():
        words[index] = word
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in WORDS])
    ids = {"unknown": 1, "cls": 2, "seperator": 3, "mask": 4, "padding": 0} | more
    for name, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if not name.startswith("pooler"):
            values, stored = tensor.numpy(), gguf.GGMLQuantizationType[kind if ".layer." in name and tensor.ndim > 1 else "F32"]
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(values, stored), raw_dtype=stored)
    write_out(writer)
    return path


def vectors(path: Path, **settings: Any) -> np.ndarray:
    llm = LLM(str(path), **({"dtype": "float32"} | settings))
    outputs = llm.embed(list(TEXTS), use_tqdm=False)
    llm.llm_engine.close()
    return np.array([output.outputs.embedding for output in outputs])


@pytest.mark.parametrize(("pooling", "kind"), [(1, "mean"), (2, "cls"), (3, "last")])
def test_texts_become_the_vectors_of_transformers(tmp_path: Path, cache: Path, pooling: int, kind: str) -> None:
    model = make_bert(tmp_path / "hf")
    prompts = tokens(tmp_path / "hf", TEXTS)
    path = write_bert(tmp_path / "model.gguf", model, pooling)
    assert np.abs(vectors(path) - oracle(model, prompts, kind)).max() < 1e-4


def test_special_tokens_are_known_by_their_names(tmp_path: Path, cache: Path) -> None:
    model = make_bert(tmp_path / "hf")
    silent = dict.fromkeys(("unknown", "cls", "seperator", "mask"))
    ours = load_tokenizer(resolve_model(str(write_bert(tmp_path / "model.gguf", model, **silent))))
    for text, expected in zip(TEXTS, tokens(tmp_path / "hf", TEXTS), strict=True):
        assert ours(text)["input_ids"] == expected
    assert (ours.cls_token_id, ours.sep_token_id, ours.unk_token_id, ours.mask_token_id) == (2, 3, 1, 4)


def test_blocks_as_they_are(tmp_path: Path, cache: Path) -> None:
    """Quantized, as a file's own codes or not, vectors are near those of the whole weights."""
    model = make_bert(tmp_path / "hf")
    path = write_bert(tmp_path / "model.gguf", model, 1, "Q8_0")
    whole = oracle(model, tokens(tmp_path / "hf", TEXTS), "mean")
    for quantization in (None, "gguf"):
        close = (vectors(path, quantization=quantization) * whole).sum(1)
        assert (close > 0.99).all()
        assert (close < 0.999999).any()


def test_what_is_refused(tmp_path: Path, cache: Path) -> None:
    model = make_bert(tmp_path / "hf")
    for number, (changes, message) in enumerate([
        ({"pooling": 4}, r"bert.pooling_type 4 is not supported; 1 \(mean\), 2 \(cls\) and 3 \(last\) are"),
        ({"names": {2: "one"}, "cls": None}, "ggml.cls_token_id, .* or ggml.unknown_token_id names no token"),
    ]):  # fmt: skip
        with pytest.raises(ModelError, match=message):
            resolve_model(str(write_bert(tmp_path / f"{number}.gguf", model, **changes)))
