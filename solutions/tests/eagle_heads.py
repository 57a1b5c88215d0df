"""Heads for tiny targets: random, saved as the command that trains one saves them; and what transformers says they draft."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_output import Draft
from solutions.core.engine import LLM
from solutions.models.heads.eagle import WEIGHTS, EagleHead, save_head
from solutions.models.loader import load_model, resolve_model

GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [(i * j + i) % 200 for j in range(3 + 5 * i)]} for i in range(1, 7)]


def tokens(outputs) -> list[list[int]]:
    """What each answer says."""
    return [completion.token_ids for output in outputs for completion in output.outputs]


def target_embedding(target: str) -> Tensor:
    """The embedding [V, hidden] of the model in a folder."""
    model = load_model(resolve_model(target, progress=False), torch.float32, torch.device("cpu"), progress=False)
    return model.model.embed_tokens.weight


def make_random_head(folder: Path, target: str, num_drafted: int = 64, seed: int = 0) -> EagleHead:
    """A head with random weights, rounded to the type in which they are kept, in `folder`: it drafts every fifth token."""
    generator = torch.Generator().manual_seed(seed)
    config = resolve_model(target, progress=False).config
    with torch.no_grad():
        head = EagleHead(config, num_drafted)
        for parameter in head.parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.1
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)).bfloat16())
        head.token_ids.copy_(torch.arange(num_drafted) * (config.vocab_size // num_drafted))
    save_head(folder, head, config, target_embedding(target))
    return head


class Oracle:
    """The same head from transformers' own decoder layer, over the whole text each time and without a cache."""

    def __init__(self, target: str, head: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
        config, weights = self.model.config, load_file(head / WEIGHTS)
        self.weights = {name: tensor.float() for name, tensor in weights.items()}
        self.token_ids = weights["token_ids"]
        self.layer, self.norm = LlamaDecoderLayer(config, 0), LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        own = {name.removeprefix("layer."): tensor for name, tensor in self.weights.items() if name.startswith("layer.")}
        kv = config.num_key_value_heads * config.head_dim
        q, k, v = own.pop("self_attn.qkv_proj.weight").split([config.num_attention_heads * config.head_dim, kv, kv])
        gate, up = own.pop("mlp.gate_up_proj.weight").chunk(2)
        own |= {f"self_attn.{name}_proj.weight": each for name, each in (("q", q), ("k", k), ("v", v))}
        self.layer.load_state_dict(own | {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up})
        self.norm.load_state_dict({"weight": self.weights["norm.weight"]})

    @torch.no_grad()
    def outputs(self, text: list[int], given: list[int], first: int = 0) -> list[Tensor]:
        """The head's output [hidden] behind a text, and behind each of the tokens that are `given` after it, as in a draft; its
        context begins at position `first`."""
        body = self.model.model
        features = body(torch.tensor([text[:-1]])).last_hidden_state[0, first:]
        behind, outputs = text[first + 1 :], []
        for token in [*given, -1]:
            positions = torch.arange(first, first + len(behind))[None]
            joined = torch.cat((body.embed_tokens(torch.tensor(behind)), features), dim=1)[None]
            mask = torch.full((len(behind), len(behind)), float("-inf")).triu(1)[None, None]
            x = joined @ self.weights["fc.weight"].T
            x = self.layer(x, attention_mask=mask, position_embeddings=body.rotary_emb(x, positions))
            out = self.norm(x[0] if isinstance(x, tuple) else x).reshape(len(behind), -1)
            outputs.append(out[-1])
            behind, features = [*behind, token], torch.cat((features, out[-1:]))
        return outputs

    def best(self, output: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens of an output."""
        return self.token_ids[(output @ self.weights["lm_head.weight"].T).topk(count).indices].tolist()

    def draft(self, text: list[int], count: int, first: int = 0) -> list[int]:
        """So many tokens behind a text, each the likeliest."""
        drafted: list[int] = []
        for _ in range(count):
            out = self.outputs(text, drafted, first)[-1]
            drafted.append(int(self.token_ids[(out @ self.weights["lm_head.weight"].T).argmax()]))
        return drafted


def three_tokens(model: Any, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The chances of what transformers' model says behind a prompt: three tokens, each of the three likeliest, at a temperature
    of 4."""
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for said, chance in expected.items():
            with torch.no_grad():
                top = model(torch.tensor([[*prompt, *said]])).logits[0, -1].topk(3)
            for token, p in zip(top.indices.tolist(), top.values.div(4.0).softmax(0).tolist(), strict=True):
                longer[*said, token] = chance * p
        expected = longer
    return expected


def check_chances(llm: LLM, prompt: dict[str, list[int]], expected: dict[tuple[int, ...], float], count: int = 1500) -> None:
    """An engine's answers, of which there are `count`, follow the chances of `three_tokens`."""
    params = SamplingParams(temperature=4.0, top_k=3, max_tokens=3, ignore_eos=True)
    said = Counter(tuple(each) for each in tokens(llm.generate([prompt] * count, params, use_tqdm=False)))
    assert said.keys() <= expected.keys()
    chi_square = sum((said[key] - count * p) ** 2 / (count * p) for key, p in expected.items())
    assert chi_square < 60  # 26 degrees of freedom: the chance of more is 0.0002


def put_first(draft: Draft, coming: list[int], chance: random.Random) -> None:
    """So many of a draft's first tokens are right."""
    count = chance.randint(0, len(draft.token_ids))
    draft.token_ids[:count] = coming[:count]


def watch(llm: LLM, plain=(), put=put_first) -> list[tuple[list[int], list[int], int]]:
    """(text, what was drafted behind it, where its context begins) of all that is drafted from now on. What a random head
    drafts is never right, so some of it is replaced by what `plain` says, outputs of plain decoding, before it is on trial;
    `put` does that."""
    proposer, seen, chance = llm.llm_engine.drafter.proposer, [], random.Random(0)
    propose = proposer.propose
    right = {(tuple(o.prompt_token_ids), o.outputs[0].token_ids[0]): o.outputs[0].token_ids for o in plain}

    def watched(output, wanted):
        texts = {seq: list(seq.tokens) for seq in wanted}
        drafts = propose(output, wanted)
        for seq, draft in drafts.items():
            seen.append((texts[seq], list(draft.token_ids), proposer.drafts.contexts[seq.seq_id].first))
            said = right.get((tuple(seq.prompt_token_ids), texts[seq][seq.num_prompt_tokens]))
            if said is not None:
                put(draft, said[seq.num_output_tokens :], chance)
        return drafts

    proposer.propose = watched
    return seen
