"""Text models inside models that also see: what they write is what transformers' whole model writes without an image."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from solutions.batching.sampling_params import SamplingParams
from solutions.core import cli
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.config.text_part import text_config, text_name
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, _save

TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
CLIP = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
EYE = {"model_type": "clip_vision_model"} | CLIP
QWEN_EYE = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 64}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]}}
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 8, "num_gpu_blocks_override": 60}
PROMPTS = [[(7 * i + j * j) % 250 for j in range(3 + 9 * i)] for i in range(4)]


def config_of(name: str) -> Any:
    return {
        "llava": lambda: transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=EYE),
        "mistral3": lambda: transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**TEXT, head_dim=16), vision_config={"model_type": "pixtral"} | CLIP
        ),
        "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=QWEN_EYE),
        "qwen3_vl": lambda: transformers.Qwen3VLConfig(
            text_config=TEXT | MROPE | {"head_dim": 16}, vision_config=QWEN_EYE | {"deepstack_visual_indexes": [0]},
            tie_word_embeddings=True,
        ),
        "smolvlm": lambda: transformers.SmolVLMConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=CLIP),
        "internvl": lambda: transformers.InternVLConfig(
            text_config=transformers.Qwen2Config(**TEXT), vision_config=CLIP | {"image_size": [16, 16], "patch_size": [8, 8]}
        ),
    }[name]()  # fmt: skip


CASES = ("llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
EXPECTED = dict(zip(CASES, ("Llama", "Mistral", "Qwen2", "Qwen3", "Llama", "Qwen2"), strict=True))


@cache
def made(name: str) -> tuple[Path, PreTrainedModel]:
    """A tiny random model that sees, and its folder."""
    folder = Path(tempfile.mkdtemp(prefix=f"sees-{name}-"))
    return folder, _save(transformers.AutoModelForImageTextToText.from_config(config_of(name)), folder)


def check(folder: Path, model: PreTrainedModel, **settings: Any) -> LLM:
    """The engine's greedy tokens are the likeliest ones to the whole model, and as likely as it says."""
    llm = LLM(str(folder), **SETTINGS | settings)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    try:
        for output in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False):
            answer = list(output.outputs[0].token_ids)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([output.prompt_token_ids + answer])).logits[0].float()
            rows = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
            assert rows.argmax(-1).tolist() == answer
            for row, token, entry in zip(rows, answer, output.outputs[0].logprobs, strict=True):
                assert abs(entry[token].logprob - float(row[token])) < 1e-3
    finally:
        llm.llm_engine.close()
    return llm


@pytest.mark.parametrize(
    "name", [name if name in ("llava", "qwen3_vl") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_text_is_what_the_whole_model_writes(name: str) -> None:
    folder, model = made(name)
    llm = check(folder, model)
    assert llm.llm_engine.model_config.architecture == f"{EXPECTED[name]}ForCausalLM"
    assert llm.llm_engine.model_config.eos_token_ids == (EOS,)


@pytest.mark.slow
def test_two_ranks() -> None:
    check(*made("qwen3_vl"), tensor_parallel_size=2)


def renamed(name: str, target: Path, old: str, new: str, drop: str = "") -> Path:
    """A copy of a model's folder whose tensors are called otherwise."""
    folder, _ = made(name)
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {key.replace(old, new): value for key, value in tensors.items() if not (drop and key.startswith(drop))}
    assert kept.keys() != tensors.keys()
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llava", "language_model.model.", "model.language_model."),
        ("qwen3_vl", "model.language_model.", "language_model."),
        ("smolvlm", "model.text_model.", "text_model."),
    ],
)
def test_other_spellings_of_the_prefix(name: str, old: str, new: str, tmp_path: Path) -> None:
    check(renamed(name, tmp_path / "model", old, new), made(name)[1])


def test_a_text_model_may_stand_alone_in_such_a_folder(tmp_path: Path) -> None:
    check(renamed("llava", tmp_path / "model", "language_model.", "", drop="vision_tower."), made("llava")[1])


def test_a_part_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    folder = renamed("llava", tmp_path / "model", "multi_modal_projector.", "telepathy.")
    with pytest.raises(ModelError, match=r"holds telepathy\.linear_1\.bias, which is no weight of a LlamaForCausalLM"):
        LLM(str(folder), **SETTINGS)


def test_older_files_describe_qwen_s_without_parts(tmp_path: Path) -> None:
    folder, model = made("qwen2_5_vl")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    target = renamed("qwen2_5_vl", tmp_path / "model", "visual.", "model.visual.")
    (target / "config.json").write_text(json.dumps(flat))
    check(target, model)


def test_what_a_text_config_leaves_out_is_its_family_s_default() -> None:
    """The whole text_config of a known LLaVA."""
    said = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama", "vocab_size": 32064}
    made = text_config({"model_type": "llava", "text_config": said, "torch_dtype": "float16", "eos_token_id": 7})
    expected = transformers.LlamaConfig(max_position_embeddings=4096, vocab_size=32064).to_dict()
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", *said):
        assert made[name] == (expected | said)[name], name
    assert (made["torch_dtype"], made["eos_token_id"]) == ("float16", 7)


def test_a_text_model_that_is_not_supported_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["X"], "model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="model architecture 'mllama_text_model' is not supported"):
        resolve_model(str(tmp_path))


def test_names_that_only_look_like_a_part() -> None:
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "visualizer.weight", "model.embed_tokens.weight"):
        assert text_name(name) == name
    assert text_name("language_model.lm_head") == "lm_head"
    assert text_name("model.visual.blocks.0.weight") is text_name("image_newline") is None


def test_a_template_that_the_processor_keeps(tmp_path: Path) -> None:
    folder = renamed("llava", tmp_path / "model", "language_model.", "")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    assert load_tokenizer(resolve_model(str(folder))).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    assert load_tokenizer(resolve_model(str(folder))).chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--revision", "main"], "--revision is not supported: fetch that revision with hf download"),
        (["--trust-remote-code"], "--trust-remote-code is not supported: no code from a model's folder is run"),
        (["--tokenizer-revision=x"], "--tokenizer-revision is not supported: .* --tokenizer"),
    ],
)
def test_flags_that_are_refused_say_what_to_do(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    with pytest.raises(SystemExit):
        cli.main(LLM, flags)
    assert re.search(message, capsys.readouterr().err)


def test_a_prompt_that_is_read_in_both_directions_is_refused() -> None:
    """PaliGemma 2's text model is a Gemma 2, and would run."""
    config = transformers.PaliGemmaConfig(text_config=transformers.Gemma2Config(**TEXT), vision_config=CLIP).to_dict()
    assert config["text_config"]["model_type"] == "gemma2"
    with pytest.raises(ModelError, match="paligemma is not supported: each token of its prompts sees those behind it"):
        text_config(config)
