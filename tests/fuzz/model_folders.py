"""Model folders with one or a few things wrong: in a JSON file, the header of the weights, or SentencePiece's file."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral
from tests.fuzz.loading import SIZES, check_loads_or_is_refused, damage, quiet

NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    4,
    7,
    256,
    319,
    320,
    321,
    2**31 - 1,
    2**32 - 1,
    2**63,
    10**30,
    0.5,
    1.0,
    2.5,
    -1.0,
    1e308,
    float("nan"),
)
VALUES = (*NUMBERS, None, True, False, "", "x", "1", "</s>", [], [1], [None], ["x"], {}, {"a": 1}, [[1]], "é" * 50)
SCALINGS = tuple(
    {"rope_type": kind, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | more
    for kind in ("linear", "dynamic", "llama3", "yarn", "longrope", "default", 3)
    for factor in (1.0, 2.5, 4, 0, -1, None, "2")
    for more in ({}, {"original_max_position_embeddings": 128}, {"original_max_position_embeddings": None})
)
AUTO_MAPS = ({"AutoTokenizer": ["own.Own", None]}, {"AutoConfig": "own.Own"}, ["own.Own", None], "own.Own")
ENTRIES: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "config.json": (
        ("rope_scaling", SCALINGS), ("rope_parameters", SCALINGS), ("eos_token_id", (319, 320, [320, 5], "x")),
        ("auto_map", AUTO_MAPS), ("tie_word_embeddings", (True, False, None)), ("head_dim", NUMBERS),
        ("sliding_window", NUMBERS), ("quantization_config", ({}, {"quant_method": "gptq", "bits": 4, "group_size": 8}, [1])),
        ("architectures", (["MistralForCausalLM"], ["GPT2LMHeadModel"], ["Own"], [])), ("vocab_size", (319, 321, 257)),
    ),
    "generation_config.json": (("eos_token_id", (320, [320, 5], [], "x", -1)),),
    "tokenizer_config.json": (
        ("tokenizer_class", ("LlamaTokenizer", "GPT2Tokenizer", "Own", "TokenizersBackend", None, 5)), ("auto_map", AUTO_MAPS),
        ("extra_special_tokens", (["<x>"], {"a": "<x>"}, 5)), ("eos_token", ("<new>", "a", None, 5, {"content": "<s>"})),
        ("added_tokens_decoder", ({"259": {"content": "<x>"}}, {"400": {"content": "<x>"}}, {"-1": 5}, [1])),
        ("add_bos_token", (True, False, None, 1)), ("legacy", (True, False, None, "x")), ("chat_template", VALUES),
    ),
    "tokenizer.json": (("version", ("2.0", None, 1)), ("truncation", ({"max_length": 1}, None)), ("added_tokens", ([], None))),
}  # fmt: skip


@cache
def bases() -> list[Path]:
    """Small models of every family, and one with SentencePiece's file alone."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    make_tiny_llama(root / "llama", **SIZES)
    make_tiny_mistral(root / "mistral", **SIZES)
    make_tiny_llama(root / "tied", **SIZES, tie_word_embeddings=True)
    make_tiny_gpt2(root / "gpt2", n_embd=16, n_layer=1, n_head=2)
    folder = shutil.copytree(root / "llama", root / "sentencepiece")
    (folder / "tokenizer.json").unlink()
    text = [" ".join(random.Random(seed).choices(["ab", "c", "the", "end", "of", "it"], k=12)) for seed in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=290, minloglevel=2, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return sorted(path for path in root.iterdir() if path.is_dir())


def run(rng: random.Random) -> None:
    """One folder, with the mistakes that `rng` draws."""
    with quiet(), tempfile.TemporaryDirectory() as made:
        folder = Path(shutil.copytree(rng.choice(bases()), Path(made) / "model"))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            spoil(folder, rng)
        check_loads_or_is_refused(folder)


def spoil(folder: Path, rng: random.Random) -> None:
    """Change one thing in one file."""
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".model")])
    content = file.read_bytes()
    kind = rng.random()
    if kind < 0.05:
        file.unlink()
    elif kind < 0.25 or not content:
        file.write_bytes(damage(content, rng, within=4000))
    elif file.suffix == ".safetensors":
        file.write_bytes(spoil_header(content, rng))
    elif file.suffix == ".json":
        try:
            parsed = json.loads(content)
        except ValueError:
            return
        file.write_text(json.dumps(spoil_json(parsed, rng, ENTRIES.get(file.name, ()))))


def spoil_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.dumps(spoil_json(json.loads(content[8 : 8 + size]), rng, ())).encode()
    except ValueError:
        return damage(content, rng, within=8)
    for name in rng.sample(["F32", "F16", "I32", "BOOL", "F8_E4M3", "F64", "XX"], 1):
        if rng.random() < 0.3:
            header = header.replace(b'"F32"', f'"{name}"'.encode(), 1)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def spoil_json(parsed: Any, rng: random.Random, entries: tuple[tuple[str, tuple[Any, ...]], ...]) -> Any:
    """The same but for one value."""
    if not isinstance(parsed, dict) or rng.random() < 0.02:
        return rng.choice(VALUES)
    if entries and rng.random() < 0.5:
        name, values = rng.choice(entries)
        return parsed | {name: rng.choice(values)}
    place: Any = parsed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return parsed
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
        return parsed
