"""What ``config.json`` says, as the engine understands it; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    SmolLM3Config,
)
from transformers.activations import ACT2FN

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.models.config.aliases import ALIASES
from solutions.models.config.entries import ModelError
from solutions.models.config.families import FAMILIES
from solutions.models.config.model_config import ACTIVATIONS, OTHER_NAMES, ModelConfig
from solutions.models.config.readers import KINDS
from solutions.parallelism.tensor_parallel import ACTIVATION_FUNCTIONS
from solutions.tests import tiny_models
from solutions.tests.tiny_models import make_tiny_llama


def raises(what: str) -> Any:
    return pytest.raises(ModelError, match=what)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *OTHER_NAMES])
def test_activations_are_those_of_transformers(name: str) -> None:
    config = ModelConfig.from_hf(LlamaConfig(hidden_act=name, architectures=["LlamaForCausalLM"]).to_dict())
    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(ACTIVATION_FUNCTIONS[config.hidden_act](x), ACT2FN[name](x), atol=1e-6, rtol=1e-6)


def test_the_first_spelling_of_llama() -> None:
    config = LlamaConfig().to_dict()
    first, today = (
        ModelConfig.from_hf(config | {"architectures": [name]}) for name in ("LLaMAForCausalLM", "LlamaForCausalLM")
    )
    assert first == today


@pytest.mark.parametrize(
    ("alias", "reference"),
    [
        ("llama-7b", LlamaConfig(architectures=["LlamaForCausalLM"])),  # transformers' defaults are these models
        ("mistral-7b", MistralConfig(architectures=["MistralForCausalLM"], rms_norm_eps=1e-5, max_position_embeddings=32768)),
        ("gpt2", GPT2Config(architectures=["GPT2LMHeadModel"])),
    ],
    ids=["llama", "mistral", "gpt2"],
)  # fmt: skip
def test_built_in_configs(alias: str, reference: Any) -> None:
    ours = ALIASES[alias].config
    assert ours == ModelConfig.from_hf(reference.to_dict())
    assert ours.num_heads * ours.head_dim == ours.hidden_size == reference.hidden_size
    assert ours.intermediate_size == (getattr(reference, "intermediate_size", None) or 4 * reference.hidden_size)


@pytest.mark.parametrize(
    ("alias", "count"),
    [
        ("llama-3.2-1b", 1_235_814_400), ("qwen2.5-0.5b", 494_032_768), ("qwen3-0.6b", 596_049_920),
        ("smollm3", 3_075_098_624), ("phi-4-mini", 3_836_021_760), ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-270m", 268_098_176), ("mixtral-8x7b", 46_702_792_704), ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v2-lite", 15_706_484_224), ("gpt-oss-20b", 20_914_757_184),
    ],
)  # fmt: skip
def test_aliases_are_the_models_of_that_name(alias: str, count: int) -> None:
    """transformers makes of the same config.json a model of as many weights as its card says, and spells the config in its own
    way, which means the same here."""
    hf = ALIASES[alias].hf_config
    family = FAMILIES[hf["architectures"][0]]
    reference = AutoConfig.for_model(family.model_type, **json.loads(json.dumps(hf)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(reference)
    assert sum(param.numel() for param in model.parameters()) == count
    assert ModelConfig.from_hf(reference.to_dict()) == ALIASES[alias].config


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_configs_of_transformers_4_and_5_say_the_same(family: str) -> None:
    reference = AutoConfig.for_model(family, **tiny_models.FAMILIES[family]).to_dict()
    older = dict(reference)
    if rope := older.pop("rope_parameters", None):
        if "sliding_attention" in rope:
            older["rope_local_base_freq"], rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
        older |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor")}
        beside = ("rope_theta", "rope_type", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if key not in beside}
        older["rope_scaling"] = {"type": rope["rope_type"]} | scaling if scaling else None
    older["torch_dtype"] = older.pop("dtype", None)
    assert older != reference
    assert ModelConfig.from_hf(older) == ModelConfig.from_hf(reference)


def test_a_family_says_what_its_silent_files_mean() -> None:
    """Only what every file has; the rest is transformers' default."""
    for name, family in FAMILIES.items():
        needed = {"num_experts_per_tok": 6} if name == "DeepseekV2ForCausalLM" else {}  # which has no default
        reference = AutoConfig.for_model(family.model_type, **needed).to_dict()
        shown = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shown += ("max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions")
        silent = {key: reference[key] for key in shown if key in reference} | needed
        assert ModelConfig.from_hf(silent | {"architectures": [name]}) == ModelConfig.from_hf(
            reference | {"architectures": [name]}
        )


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


LONGROPE = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM' is not supported; supported are LlamaForCausalLM"),
        ({"architectures": None, "model_type": "t5"}, "'t5' is not supported"),
        ({"architectures": None}, "'none named' is not supported"),
        ({"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "'axial' is not supported; supported are default, linear"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "no entry 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 32}}, "beta_fast above beta_slow"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "no entry 'long_factor'"),
        ({"rope_scaling": LONGROPE | {"long_factor": [2.0] * 3}}, "a divisor for each of 4 pairs, and there are 4 and 3"),
        ({"rope_scaling": LONGROPE | {"long_factor": [2.0, 2.0, 2.0, 0.0]}}, "long_factor must be a list of numbers above 0"),
        ({"rope_scaling": {"type": "linear"}}, "no entry 'factor'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "swish2"}, "'swish2' is not supported; supported are silu"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantized with hqq are not supported"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 KV heads"),
        ({"hidden_size": None, "num_attention_heads": None}, "no entry"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of str, got 'LlamaForCausalLM'"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number from 1 to .*, got '32'"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a whole number from 1 to 9999, got 1.5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number .*, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number of at least 0, got nan"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number of at least 1"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor above that"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"head_dim": 7}, "heads of 7 elements are not supported"),
        ({"max_position_embeddings": 2**24 + 1}, "a context of 16777217 tokens is not supported"),
        ({"quantization_config": ["gptq"]}, "quantization_config must be an object"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list of them, got '2'"),
        ({"eos_token_id": [2, 2.0]}, "eos_token_id must be a token id or a list of them"),
    ],
)  # fmt: skip
def test_unsupported_config(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    with raises(message):
        ModelConfig.from_hf(config)


def test_model_type_alone_is_enough() -> None:
    config = ModelConfig.from_hf(LLAMA | {"architectures": None, "model_type": "llama"})
    assert config.architecture == "LlamaForCausalLM"
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)


@pytest.mark.parametrize("name", sorted(LLAMA))
def test_null_for_what_every_model_has(name: str) -> None:
    with raises(f"config.json has no entry '{name}'" if name != "architectures" else "'none named' is not supported"):
        ModelConfig.from_hf(LLAMA | {name: None})


def test_null_for_what_has_a_default() -> None:
    names = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act", "sliding_window")
    named = LLAMA | dict.fromkeys(names) | {"tie_word_embeddings": None, "attention_bias": None, "dtype": None}
    assert ModelConfig.from_hf(named) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("scaling", "positions", "default", "longest"),
    [
        ({"type": "linear", "factor": 4.0}, 4096, 16384, 16384),  # Vicuna 1.5 16k
        ({"rope_type": "linear", "factor": 2.5}, 4096, 10240, 10240),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384, 16384, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, 4096, 8192),
        (LLAMA3, 131072, 131072, 131072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072, 131072),  # Qwen 2.5
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072, 131072),  # Qwen3
        ({"rope_type": "yarn", "factor": 2.0}, 4096, 8192, 8192),
        (LONGROPE | {"original_max_position_embeddings": 4096}, 131072, 131072, 131072),
        (None, 4096, 4096, 4096),
    ],
    ids=str,
)  # fmt: skip
def test_context_that_scaling_gives(scaling: dict[str, Any] | None, positions: int, default: int, longest: int) -> None:
    """As vLLM's `_get_and_verify_max_len`: the factor times the original context, but Llama 3's files say the whole one."""
    config = ModelConfig.from_hf(LLAMA | {"max_position_embeddings": positions, "rope_scaling": scaling})
    assert (config.max_position_embeddings, config.max_context) == (default, longest)


def test_linear_scaling_reaches_over_the_whole_context(tmp_path: Path) -> None:
    """Four times 32 positions, against transformers' logits at all of them."""
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    oracle = make_tiny_llama(tmp_path, max_position_embeddings=32, rope_parameters=scaling)
    ids = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    llm = LLM(str(tmp_path), dtype="float32")
    assert llm.llm_engine.limits.max_model_len == 128
    expected = oracle.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None)[0, 120:].tolist()
    output = llm.generate(
        {"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    assert output[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({}, (3,)),
        ({"no_rope_layer_interval": 2}, (1, 3)),
        ({"no_rope_layers": [0, 1, 1, 0, 0]}, (0, 3)),  # 1 means with RoPE
        ({"no_rope_layers": [1, 1, 1, 1], "no_rope_layer_interval": 2}, ()),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers has 2 entries for 4 layers"),
    ],
    ids=str,
)
def test_layers_without_rope(changes: dict[str, Any], still: tuple[int, ...] | str) -> None:
    config = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4, "num_key_value_heads": 4} | changes
    if isinstance(still, str):
        with raises(still):
            ModelConfig.from_hf(config)
    else:
        assert ModelConfig.from_hf(config).layers_without_rope == still
        assert [not turns for turns in SmolLM3Config(**config).no_rope_layers[:4]] == [layer in still for layer in range(4)]


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Phi3ForCausalLM", {"partial_rotary_factor": 0.4}, "RoPE over 3 of 8 elements of a head is not supported"),
        ("Phi3ForCausalLM", {"partial_rotary_factor": 1.5}, "RoPE over 12 of 8 elements"),
        ("Qwen3ForCausalLM", {"partial_rotary_factor": 0.5}, "part of the head .* not supported in this family"),
        ("Olmo2ForCausalLM", {"sliding_window": 64}, "OLMo 3"),
        ("Olmo3ForCausalLM", {"sliding_window": None, "num_hidden_layers": 4}, "a window in some layers and none in others"),
        ("Olmo3ForCausalLM", {"num_hidden_layers": 3}, "a window in some layers and none in others"),
    ],
)
def test_what_other_families_refuse(architecture: str, changes: dict[str, Any], message: str) -> None:
    with raises(message):
        ModelConfig.from_hf(LLAMA | {"architectures": [architecture]} | changes)


WINDOWED = {"use_sliding_window": True, "sliding_window": 24, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 24}, None),
        (WINDOWED | {"max_window_layers": 2}, None),
        (WINDOWED | {"max_window_layers": 0}, 24),
        (WINDOWED | {"layer_types": ["sliding_attention"] * 2}, 24),
        (WINDOWED | {"layer_types": ["full_attention"] * 2}, None),
        (WINDOWED | {"max_window_layers": 1}, (None, 24)),
        (WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}, (24, None)),
        (WINDOWED | {"layer_types": ["sliding_attention"]}, "layer_types must be"),
        (WINDOWED | {"layer_types": ["sliding_attention", "chunked_attention"]}, "layer_types must be"),
    ],
    ids=str,
)
def test_windows_of_all_layers_or_of_each(family: str, changes: dict[str, Any], window: Any) -> None:
    config = LLAMA | {"architectures": [family], "num_key_value_heads": 4} | changes
    if isinstance(window, str):
        with raises(window):
            ModelConfig.from_hf(config)
        return
    found = ModelConfig.from_hf(config)
    differ = isinstance(window, tuple)
    assert (found.sliding_window, found.layer_windows) == ((None, window) if differ else (window, ()))
    assert found.windows == (window if differ else (window,))
    assert [found.windows[found.place_of(layer)[0]] for layer in range(found.num_layers)] == (
        list(window) if differ else [window] * found.num_layers
    )


def test_gemma_says_what_transformers_says() -> None:
    """Older files, newer files, and what a silent one means."""
    for alias, kind in (("gemma-2-2b", Gemma2Config), ("gemma-3-270m", Gemma3TextConfig)):
        given = {name: value for name, value in ALIASES[alias].hf_config.items() if name != "architectures"}
        saved = kind(**given).to_dict() | {"architectures": ALIASES[alias].hf_config["architectures"]}
        assert ModelConfig.from_hf(saved) == replace(ALIASES[alias].config, torch_dtype=ModelConfig.from_hf(saved).torch_dtype)
        theirs, ours = kind(**given), ALIASES[alias].config
        kinds = [KINDS[window is not None] for window in ours.layer_windows]
        assert (kinds, set(ours.layer_windows)) == (theirs.layer_types, {None, theirs.sliding_window})
        assert ours.logit_soft_cap == theirs.final_logit_softcapping
    old = LLAMA | {
        "architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 5000.0, "rope_theta": 2e6, "sliding_window_pattern": 2, "num_hidden_layers": 4,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = ModelConfig.from_hf(old)
    assert (config.local_rope_theta, config.rope_theta, config.layer_windows) == (5000.0, 2e6, (4096, None) * 2)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert config.max_position_embeddings == old["max_position_embeddings"]
    with raises("bidirectional"):
        ModelConfig.from_hf(old | {"use_bidirectional_attention": True})


def test_olmo_3_as_its_files_say_it() -> None:
    """YaRN is for the layers that see everything; transformers 4 wrote it without kinds of layers, transformers 5 with them."""
    yarn = {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    }  # fmt: skip
    old = LLAMA | {
        "architectures": ["Olmo3ForCausalLM"], "num_hidden_layers": 8, "max_position_embeddings": 65536, "rope_theta": 500000,
        "rope_scaling": yarn, "sliding_window": 4096, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    }  # fmt: skip
    saved = Olmo3Config(**json.loads(json.dumps(old))).to_dict()
    config = ModelConfig.from_hf(old)
    assert config == ModelConfig.from_hf(saved | {"architectures": old["architectures"]})
    assert (config.local_rope_theta, config.rope_theta, config.layer_windows) == (5e5, 5e5, (4096, 4096, 4096, None) * 2)
    assert config.rope_scaling is not None
    assert config.rope_scaling["factor"] == 8.0
    assert config.max_position_embeddings == 65536
    assert ModelConfig.from_hf({k: v for k, v in old.items() if k != "layer_types"}) == config
