"""DeepSeek-V3's module for more tokens: what it drafts is what plain PyTorch says, and tokens are those of plain decoding.

transformers leaves the module's weights out, so one step of it is written out here, around its decoder layer.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.speculation.settings import SpeculativeConfig
from solutions.models.config.entries import ModelError
from solutions.models.heads.deepseek_mtp import MtpHead, find_mtp
from solutions.models.loader import resolve_model
from solutions.tests.eagle_heads import GREEDY, PROMPTS, check_chances, three_tokens, tokens, watch
from solutions.tests.engine_twins import folder
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny

SETTINGS = {"dtype": "float32", "max_model_len": 256, "block_size": 4, "num_gpu_blocks_override": 256}
MTP = {"method": "mtp", "num_speculative_tokens": 3, "adaptive": False}
SECOND = "model-00002-of-00002.safetensors"
TREE = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]


class Oracle:
    """One step of the module after another, over the whole text each time and without a cache.

    Attributes:
        weights: of the module, by a checkpoint's names behind ``model.layers.N.``.
    """

    def __init__(self, target: Path, seed: int = 0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
        config, generator = self.model.config, torch.Generator().manual_seed(seed)
        size, self.eps, self.number = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        self.layer = DeepseekV3DecoderLayer(config, self.number)  # with experts, or without where the model has none
        shapes = {name: each.shape for name, each in self.layer.state_dict().items()}
        shapes |= {"enorm.weight": (size,), "hnorm.weight": (size,), "shared_head.norm.weight": (size,)}
        shapes["eh_proj.weight"] = (size, 2 * size)
        self.weights = {
            name: torch.randn(shape, generator=generator) * 0.2 + float("norm" in name) for name, shape in shapes.items()
        }
        self.layer.load_state_dict({name: self.weights[name] for name in self.layer.state_dict()})

    def saved(self) -> dict[str, Tensor]:
        """The module's tensors as DeepSeek's files have them: embedding and head once more, each matrix of each expert."""
        tensors = dict(self.weights)
        gate_up, down = (tensors.pop(f"mlp.experts.{name}", None) for name in ("gate_up_proj", "down_proj"))
        for number in range(0 if down is None else len(down)):
            gate, up = gate_up[number].chunk(2)
            for name, matrix in (("gate", gate), ("up", up), ("down", down[number])):
                tensors[f"mlp.experts.{number}.{name}_proj.weight"] = matrix.contiguous()
        tensors["embed_tokens.weight"] = self.model.model.embed_tokens.weight.detach().clone()
        tensors["shared_head.head.weight"] = self.model.lm_head.weight.detach().clone()
        return {f"model.layers.{self.number}.{name}": each for name, each in tensors.items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[f"{name}.weight"]

    @torch.no_grad()
    def output(self, text: list[int], given: list[int], first: int = 0) -> Tensor:
        """What the module makes of the last position [hidden], behind a text and the tokens that are `given` after it, as in a
        draft; its context begins at position `first`."""
        body = self.model.model
        features = body(torch.tensor([text[:-1]])).last_hidden_state[0, first:]
        behind = text[first + 1 :]
        for token in [*given, -1]:
            embedded = body.embed_tokens(torch.tensor(behind))
            joined = torch.cat((self.norm(embedded, "enorm"), self.norm(features, "hnorm")), dim=1)
            x = (joined @ self.weights["eh_proj.weight"].T)[None]
            positions = torch.arange(first, first + len(behind))[None]
            mask = torch.full((len(behind), len(behind)), float("-inf")).triu(1)[None, None]
            out = self.layer(x, attention_mask=mask, position_embeddings=body.rotary_emb(x, positions))[0]
            behind, features = [*behind, token], torch.cat((features, out[-1:]))
        return features[-1]

    def best(self, output: Tensor, count: int) -> list[int]:
        with torch.no_grad():
            return self.model.lm_head(self.norm(output, "shared_head.norm")).topk(count).indices.tolist()

    def draft(self, text: list[int], paths: list[list[int]], first: int = 0) -> list[int]:
        """The token of each path of a tree behind a text; a chain's are [0], [0, 0] and so on."""
        said: dict[tuple[int, ...], int] = {}
        for path in sorted(map(tuple, paths), key=len):
            given = [said[path[:depth]] for depth in range(1, len(path))]
            said[path] = self.best(self.output(text, given, first), 1 + path[-1])[path[-1]]
        return [said[tuple(path)] for path in paths]


def with_module(target: Path, into: Path, oracle: Oracle, change=None) -> str:
    """The model in a folder of its own, the module's tensors in the second of two files."""
    shutil.copytree(target, into)
    (into / "model.safetensors").rename(into / "model-00001-of-00002.safetensors")
    tensors = oracle.saved()
    if change is not None:
        change(tensors)
    save_file(tensors, into / SECOND, {"format": "pt"})
    return str(into)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(folder("deepseek_v3"))


@pytest.fixture(scope="module")
def target(tmp_path_factory, oracle) -> str:
    return with_module(folder("deepseek_v3"), tmp_path_factory.mktemp("mtp") / "model", oracle)


def chain(count: int) -> list[list[int]]:
    return [[0] * depth for depth in range(1, count + 1)]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("budget", slow_after(1, [16, 256]))
def test_it_drafts_what_plain_pytorch_says(target, oracle, kernels, budget):
    """Three tokens of one module; whole prompts or chunks, several sequences, accepted and rejected drafts."""
    settings = SETTINGS | {"max_num_batched_tokens": budget, "enable_cpu_kernels": kernels}
    llm = LLM(target, **settings, speculative_config=MTP, enable_prefix_caching=False)
    params = dataclasses.replace(GREEDY, max_tokens=16)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:3], params, use_tqdm=False)
    seen = watch(llm, plain)
    assert tokens(llm.generate(PROMPTS[:3], params, use_tqdm=False)) == tokens(plain)
    assert len(seen) > 12
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 8
    for text, draft, first in seen:
        assert first == 0
        assert draft == oracle.draft(text, chain(len(draft)))


def test_long_prompts_go_the_plain_way_through_the_module_as_well(target, oracle):
    llm = LLM(target, **SETTINGS, speculative_config=MTP)
    llm.llm_engine.executor.worker.backend.plain_from = 12
    seen = watch(llm)
    llm.generate(PROMPTS[4:], dataclasses.replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert {first for _, _, first in seen} == {0}
    assert all(draft == oracle.draft(text, chain(len(draft))) for text, draft, _ in seen)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
def test_with_batch_invariance_it_drafts_what_it_would_draft(target, oracle):
    """The target computes a token at a time then, and the module does not."""
    llm = LLM(target, **SETTINGS, speculative_config=MTP, batch_invariant=True)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    seen = watch(llm, plain)
    assert tokens(llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)) == tokens(plain)
    assert seen
    assert all(draft == oracle.draft(text, chain(len(draft))) for text, draft, _ in seen)


def test_a_tree_is_what_plain_pytorch_says(target, oracle):
    config = {"method": "deepseek_mtp", "speculative_token_tree": TREE, "adaptive": False}
    params = dataclasses.replace(GREEDY, max_tokens=16)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:2], params, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=config)
    order = sorted(TREE, key=lambda path: (any(path), len(path), path))  # the likeliest chain, then level after level
    seen = watch(llm, plain)
    assert tokens(llm.generate(PROMPTS[:2], params, use_tqdm=False)) == tokens(plain)
    whole = [(text, draft) for text, draft, _ in seen if len(draft) == len(TREE)]
    assert whole
    for text, draft in whole:
        assert draft == oracle.draft(text, order)


@pytest.mark.parametrize("dense", [False, True])
def test_the_module_is_a_layer_like_the_models_last(tmp_path, dense):
    """With experts, or with one MLP where all layers have that."""
    make_tiny("deepseek_v3", tmp_path / "plain", first_k_dense_replace=9 if dense else 1, num_hidden_layers=2)
    oracle = Oracle(tmp_path / "plain")
    assert any("experts" in name for name in oracle.weights) != dense
    llm = LLM(with_module(tmp_path / "plain", tmp_path / "model", oracle), **SETTINGS, speculative_config=MTP)
    seen = watch(llm)
    llm.generate(PROMPTS[:1], dataclasses.replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert seen
    assert all(draft == oracle.draft(text, chain(len(draft))) for text, draft, _ in seen)


def test_a_module_in_floats_of_8_bits_is_read_as_the_model_is(tmp_path):
    """DeepSeek's own files: a scale for each block of 128 x 128 of some matrices."""
    oracle, changed = Oracle(folder("deepseek_v3")), {}
    for name in ("eh_proj", "self_attn.o_proj", "self_attn.kv_a_proj_with_mqa"):
        weight = oracle.weights[f"{name}.weight"]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -weight.shape[0] % 128))
        scales = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / 448
        every = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        codes = (weight / every).to(torch.float8_e4m3fn)
        weight.copy_(codes.float() * every)
        changed |= {f"model.layers.3.{name}.weight": codes, f"model.layers.3.{name}.weight_scale_inv": scales}
    oracle.layer.load_state_dict({name: oracle.weights[name] for name in oracle.layer.state_dict()})
    model = with_module(folder("deepseek_v3"), tmp_path / "model", oracle, lambda tensors: tensors.update(changed))
    config = json.loads((Path(model) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (Path(model) / "config.json").write_text(json.dumps(config))
    llm = LLM(model, **SETTINGS, speculative_config=MTP)
    seen = watch(llm)
    llm.generate(PROMPTS[:2], dataclasses.replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert seen
    assert all(draft == oracle.draft(text, chain(len(draft))) for text, draft, _ in seen)


@pytest.mark.parametrize("mode", slow_after(1, ["recompute", "swap"]))
def test_greedy_and_seeded_tokens_are_those_of_plain_decoding(target, mode):
    """With chunks of prompts, preemption and hits in the prefix cache."""
    prompts = PROMPTS + PROMPTS[:3]
    params = [dataclasses.replace(GREEDY, temperature=0.8 * (i % 2), seed=i) for i in range(len(prompts))]
    plain = LLM(target, **SETTINGS).generate(prompts, params, use_tqdm=False)
    tight = SETTINGS | {"num_gpu_blocks_override": 64, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    llm = LLM(target, **tight, preemption_mode=mode, speculative_config=MTP, swap_space=1 << 20)
    watch(llm, plain)
    for _ in range(2):
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(plain)
    stats = llm.llm_engine.stats()
    assert stats.num_preemptions > 0
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens


@pytest.mark.slow
def test_sampled_tokens_follow_the_targets_distribution(target):
    """Chi-square over pairs of tokens, the second of which was on trial; the chances are transformers'."""
    expected = three_tokens(Oracle(folder("deepseek_v3")).model, PROMPTS[1]["prompt_token_ids"])
    llm = LLM(target, **SETTINGS | {"num_gpu_blocks_override": 2048}, max_num_seqs=16, speculative_config=MTP, seed=5)
    proposer, chance = llm.llm_engine.drafter.proposer, random.Random(0)
    propose = proposer.propose

    def informed(output, wanted):  # some of the target's likeliest, so that drafts are accepted as well as rejected
        drafts = propose(output, wanted)
        for seq, draft in drafts.items():
            said = tuple(seq.tokens[seq.num_prompt_tokens :])
            known = sorted({key[len(said)] for key in expected if len(said) < 3 and key[: len(said)] == said})
            if known:
                draft.token_ids[0] = chance.choice(known)
        return drafts

    proposer.propose = informed
    check_chances(llm, PROMPTS[1], expected)
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 100


def test_its_matrices_can_be_rounded(target):
    """A module in 8 bits drafts nearly what the whole one does; the tokens stay those of the model."""
    params = dataclasses.replace(GREEDY, max_tokens=12)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:2], params, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=MTP | {"quantization": "int8"})
    head = llm.llm_engine.drafter.proposer.drafts.passes.head
    assert isinstance(head, MtpHead)
    assert {param.dtype for param in (head.eh_proj.weight, head.layer.self_attn.o_proj.weight)} == {torch.uint8}
    assert tokens(llm.generate(PROMPTS[:2], params, use_tqdm=False)) == tokens(plain)


def test_only_files_with_tensors_of_the_module_are_read(target):
    found = find_mtp(resolve_model(target))
    assert [file.name for file in found.files] == [SECOND]


# What is refused


def drop(*names: str):
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[f"model.layers.3.{name}"]

    return change


def other(name: str):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.3.{name}"] += 1.0

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("eh_proj.weight"), r"method mtp: .* was saved without its module for more tokens \(model\.layers\.3\.eh_proj"),
        (drop("hnorm.weight"), r"lacks weights of the model: head\.hnorm\.weight"),
        (drop("mlp.experts.4.up_proj.weight"), r"lacks weights of the model: head\.layer\.mlp\.experts\.4\.gate_up_proj"),
        (other("embed_tokens.weight"), r"embed_tokens\.weight of .* is another than model\.embed_tokens\.weight"),
        (other("shared_head.head.weight"), r"shared_head\.head\.weight of .* is another than lm_head\.weight"),
        (lambda each: each.update({"model.layers.3.fnorm.weight": torch.ones(4)}), "holds model.layers.3.fnorm.weight"),
    ],
)
def test_a_module_that_is_not_whole_is_one_clear_error(tmp_path, oracle, change, message):
    model = with_module(folder("deepseek_v3"), tmp_path / "model", oracle, change)
    with pytest.raises((ValueError, ModelError), match=message) as error:
        LLM(model, **SETTINGS, speculative_config=MTP)
    assert "\n" not in str(error.value)


def test_copies_of_embedding_and_head_may_be_missing(tmp_path, oracle):
    change = drop("embed_tokens.weight", "shared_head.head.weight")
    llm = LLM(with_module(folder("deepseek_v3"), tmp_path / "model", oracle, change), **SETTINGS, speculative_config=MTP)
    seen = watch(llm)
    llm.generate(PROMPTS[:1], dataclasses.replace(GREEDY, max_tokens=3), use_tqdm=False)
    assert all(draft == oracle.draft(text, chain(len(draft))) for text, draft, _ in seen)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("deepseek_v2", {}, "only DeepSeek-V3 and its kin have such modules, and .* is a DeepseekV2ForCausalLM"),
        ("llama", {}, "is a LlamaForCausalLM"),
        ("deepseek_v3", {}, "was saved without its module"),
        ("deepseek_v3", {"tensor_parallel_size": 2}, "only with one rank in the engine's process"),
    ],
)
def test_models_and_settings_without_modules_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=f"^--speculative-config: method mtp: .*{message}"):
        LLM(str(folder(name)), **SETTINGS, **settings, speculative_config=MTP)


def test_random_weights_have_no_module():
    with pytest.raises(ValueError, match="--load-format dummy makes no such module"):
        find_mtp(dataclasses.replace(resolve_model(str(folder("deepseek_v3"))), path=None))


def test_it_takes_no_folder_of_its_own():
    with pytest.raises(ValueError, match="method mtp takes no model; the target's files hold its module"):
        SpeculativeConfig.parse(MTP | {"model": "head"})


def test_without_drafts_the_module_is_not_loaded(target):
    llm = LLM(target, **SETTINGS)
    assert not any("eh_proj" in name for name, _ in llm.llm_engine.executor.worker.model.named_parameters())
    assert {name for name in load_file(Path(target) / SECOND) if "eh_proj" in name}
