"""Trains a drafting head on a corpus, in steps that can be interrupted and gone on with."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.heads.eagle import EagleHead
from ...models.llama import LlamaForCausalLM
from .corpus import Text
from .unrolled import UnrolledHead

HELD_OUT = 16
"""Every so-manyth text is not learned from but tested on."""
WARM_UP = 0.05
"""The share of the steps in which the learning rate rises."""
DISCOUNT = 0.8
"""The weight of a depth against the one before."""
FEATURE_WEIGHT = 0.5
"""Of the distance between the head's output and the feature that it stands for, against the loss of the tokens."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train: passes over the text, texts in a step, depths of a draft, the highest learning rate, steps from one
    checkpoint to the next, and what seeds the order."""

    epochs: int = 3
    batch: int = 4
    depth: int = 2
    rate: float = 1.5e-3
    checkpoint_every: int = 50
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts side by side. `ids`: [B, n + 2], zeros behind the end; `features`: [B, n + 1, hidden]; `counts`: [B, n], whether
    the token two behind a position is one that the model wrote."""

    ids: Tensor
    features: Tensor
    counts: Tensor


def make_batch(texts: list[Text]) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True)
    features = torch.nn.utils.rnn.pad_sequence([text.features for text in texts], batch_first=True)
    place = torch.arange(2, ids.shape[1])[None]
    firsts, lengths = (
        torch.tensor(each)[:, None] for each in zip(*((t.prompt_len, len(t.tokens)) for t in texts), strict=True)
    )
    return Batch(ids, features, (place >= firsts) & (place < lengths))


def frequent_tokens(texts: list[Text], count: int) -> Tensor:
    """The tokens that the model writes most often, [count] int64 in ascending order; if it writes fewer, the first others."""
    counted = Counter(token for text in texts for token in text.tokens[text.prompt_len :].tolist())
    chosen = [token for token, _ in counted.most_common(count)]
    others = (token for token in range(10**9) if token not in counted)
    return torch.tensor(sorted(chosen + [next(others) for _ in range(count - len(chosen))]))


def new_head(model: LlamaForCausalLM, token_ids: Tensor) -> EagleHead:
    """A head to begin with: the target's last layer, norm and some rows of its vocabulary, over features that pass through."""
    head, body = EagleHead(model.config, len(token_ids)), model.model
    with torch.no_grad():
        wanted = head.layer.state_dict()
        head.layer.load_state_dict(
            {name: each.float() for name, each in body.layers[-1].state_dict().items() if name in wanted}
        )
        head.norm.weight.copy_(body.norm.weight)
        size = model.config.hidden_size
        head.fc.weight.copy_(torch.cat((torch.eye(size), torch.eye(size)), dim=1))
        head.lm_head.weight.copy_(model.lm_head.weight[token_ids])
        head.token_ids.copy_(token_ids)
    return head


class SoftCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` with probabilities, without the copies in float32 of all that is as large as the logits, which take
    longer than the products of a small model."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """The mean over the rows, of logits [N, V] and probabilities [N, V] of their type."""
        total = logits.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward((logits - total).exp_().sub_(wanted).div_(len(logits)))
        agreed = torch.bmm(logits[:, None], wanted[:, :, None])
        return (total.float() - agreed[:, :, 0].float()).mean()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * scale.to(slope.dtype), None


class Learner:
    """Trains a head.

    Args:
        model: the target, in float32, without kernels.
        texts: a corpus of it.
        plan: how.
        checkpoint: where the state is kept between runs.
    """

    def __init__(self, model: LlamaForCausalLM, head: EagleHead, texts: list[Text], plan: Plan, checkpoint: Path) -> None:
        self.model, self.head, self.plan, self.checkpoint = model, head, plan, checkpoint
        self.tests = texts[::HELD_OUT]
        self.texts = [text for index, text in enumerate(texts) if index % HELD_OUT]
        self.learned = [parameter for name, parameter in head.named_parameters() if not name.startswith("lm_head")]
        for parameter in self.learned:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.learned, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
        features, embedding = torch.cat([text.features for text in texts[:64]]).float(), model.model.embed_tokens.weight
        self._scale = float(features.std() / embedding.std())
        self.num_done = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.num_done = state["num_done"]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.texts) / self.plan.batch)

    @property
    def num_steps(self) -> int:
        return self.plan.epochs * self.steps_per_epoch

    def train(self) -> Iterator[float]:
        """Do the steps that are left; gives the loss of each."""
        while self.num_done < self.num_steps:
            epoch, place = divmod(self.num_done, self.steps_per_epoch)
            order = list(range(len(self.texts)))
            random.Random(self.plan.seed * 1000 + epoch).shuffle(order)
            chosen = order[place * self.plan.batch : (place + 1) * self.plan.batch]
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate * self._schedule(self.num_done / self.num_steps)
            loss = self._loss(make_batch([self.texts[index] for index in chosen]))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
            self.optimizer.step()
            self.num_done += 1
            if self.num_done % self.plan.checkpoint_every == 0 or self.num_done == self.num_steps:
                self._save()
            yield float(loss.detach())

    @staticmethod
    def _schedule(done: float) -> float:
        """The share of the highest rate when this share of the steps is done: up in a line, down in a cosine."""
        return min(done / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * done)) if done else 0.01

    def finish(self) -> EagleHead:
        """The head as it drafts. Nothing can be learned or tested afterwards.

        While it learns, embeddings are as large as features: AdamW moves each weight by about as much, so a weight of a small
        input would hardly change what comes out.
        """
        with torch.no_grad():
            self.head.fc.weight[:, : self.model.config.hidden_size] *= self._scale
        return self.head

    def _save(self) -> None:
        state = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "num_done": self.num_done}
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def _outputs(self, batch: Batch) -> list[Tensor]:
        embedded = F.embedding(batch.ids[:, 1:-1], self.model.model.embed_tokens.weight) * self._scale
        rope = self.model.model.rotary_emb(torch.arange(embedded.shape[1]))
        return UnrolledHead(self.head, self.model.config, rope)(embedded, batch.features[:, :-1].float(), self.plan.depth)

    def _loss(self, batch: Batch) -> Tensor:
        counts = batch.counts.clone()
        counts[:, : self.plan.depth - 1] = False  # the deepest outputs begin there
        weight, loss = self.head.lm_head.weight, torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16):
            truth = batch.features[:, 1:][counts]
            with torch.no_grad():
                wanted = F.linear(truth, weight).softmax(dim=-1)
            for depth, output in enumerate(self._outputs(batch)):
                said = output[counts]
                tokens: Tensor = SoftCrossEntropy.apply(F.linear(said, weight), wanted)  # type: ignore[no-untyped-call]  # torch's
                features = F.smooth_l1_loss(said.float(), truth.float())
                loss = loss + DISCOUNT**depth * (tokens + FEATURE_WEIGHT * features)
        return loss

    @torch.no_grad()
    def accepted(self) -> list[float]:
        """How often the token of each depth is the one that the target holds for the likeliest, where all before it are, on the
        texts that were kept back."""
        right, tried = [0] * self.plan.depth, [0] * self.plan.depth
        for first in range(0, len(self.tests), self.plan.batch):
            batch = make_batch(self.tests[first : first + self.plan.batch])
            truth = F.linear(batch.features[:, 1:].float(), self.model.lm_head.weight).argmax(dim=-1)
            alive = batch.counts
            for depth, output in enumerate(self._outputs(batch)):
                if depth:  # the draft began one position earlier
                    alive = torch.cat((torch.zeros_like(alive[:, :1]), alive[:, :-1]), dim=1) & batch.counts
                hits = alive & (self.head.best(output.flatten(0, 1), 1).view_as(truth) == truth)
                right[depth] += int(hits.sum())
                tried[depth] += int(alive.sum())
                alive = hits
        return [hits / max(1, tries) for hits, tries in zip(right, tried, strict=True)]
