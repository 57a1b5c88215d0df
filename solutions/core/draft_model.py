"""Drafts from a smaller model that runs beside the target, in the engine's own process, or from a head on top of the target.

Its KV cache has the same blocks as the target's: one block table serves both, so whatever becomes of a sequence's blocks,
shared, copied, swapped or found in the prefix cache, holds for both (`speculation/draft_tables.py` says whose, where layers
differ in their window). The draft model first computes what the target's step is
about to compute, a prompt's chunk or a single token, which gives the first drafted token, and then one token after the other.

While nothing is drafted it computes nothing, and blocks that are filled meanwhile hold nothing of it. So it notes which blocks
it has filled: of what the prefix cache finds for a sequence, the others are missing here.

A head, trained for the target (EAGLE) or a part of it (MTP), needs no step of its own to follow: it reads the hidden states of
each step that the target has run (`speculation/head_drafts.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, takewhile
from pathlib import Path

import torch
from torch import Tensor

from ..batching.grouped_batch import make_batch
from ..batching.scheduler_output import BlockPairs, Draft, SchedulerOutput
from ..batching.sequence import Sequence
from ..batching.tree_rows import TreeDraft
from ..models.config.model_config import ModelConfig
from ..models.heads.deepseek_mtp import find_mtp
from ..models.heads.eagle import EagleHead, find_head
from ..models.heads.head import FoundHead
from ..models.kernels.attach import Plan, attach
from ..models.llama import LlamaForCausalLM
from ..models.loader import ModelSource, resolve_model
from .capture import can_replay, replay
from .config import EngineConfig
from .sampling.rejection_sampler import Prefix, draw_one
from .speculation.draft_tables import DraftTables, with_room
from .speculation.head_drafts import MOST_ROWS, HeadDrafts
from .speculation.head_passes import HeadPasses, RecordedPasses
from .speculation.heard_steps import HeardSteps
from .speculation.settings import SpeculativeConfig
from .speculation.tree_drafts import DraftShape
from .speculative import NgramProposer, Proposer
from .startup import Limits, check_settings
from .worker import Worker, use_cpu_kernels


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A model that drafts: what the engine's settings are for it, and where it is."""

    settings: EngineConfig
    source: ModelSource


@dataclass(frozen=True, slots=True)
class FoundDraft:
    """What drafts, found and checked before anything is loaded.

    Attributes:
        model: the one that drafts; None: none does.
        head: the one that does; None: likewise.
    """

    speculation: SpeculativeConfig
    model: DraftModel | None = None
    head: FoundHead | None = None


class DraftModelProposer(Proposer):
    """A model that drafts.

    Args:
        speculation: how many tokens to draft, and when. draft: the model, which was checked. target: the other one. limits: the
            target's.
    """

    def __init__(self, speculation: SpeculativeConfig, draft: DraftModel, target: ModelConfig, limits: Limits) -> None:
        super().__init__(speculation)
        self.model_config: ModelConfig = draft.source.config
        threads = torch.get_num_threads() if limits.device.type == "cpu" else None  # the other ranks keep their cores
        self.worker = Worker(draft.settings, draft.source, limits.device, limits.dtype, threads=threads)
        self._block_size = draft.settings.block_size
        self.tables = DraftTables(self.model_config, target, self._block_size, limits.max_model_len)
        self._limits: Limits
        self._num_computed: dict[int, int] = {}
        """seq_id → tokens of it that have keys and values here."""
        self._filled: set[int] = set()
        self._filled_on_host: set[int] = set()
        """Blocks whose keys and values here are of the tokens that the target's are of."""

    def create_cache(self, limits: Limits, tables: dict[int, list[int]]) -> None:
        self.worker.create_cache(limits.num_blocks, self._block_size, limits.num_host_blocks)
        self.tables.whole, self._limits = tables, limits

    def num_missed(self, seq: Sequence) -> int:
        return max(0, seq.num_computed_tokens - self._num_computed.get(seq.seq_id, seq.num_computed_tokens))

    def update_states(self, output: SchedulerOutput) -> None:
        for seq_id in output.removed:
            self._num_computed.pop(seq_id, None)
        self._follow(output.swap_out, self._filled, self._filled_on_host)
        self._follow(output.swap_in, self._filled_on_host, self._filled)
        for seq, count in output.scheduled.items():  # the target fills these blocks now, those that are copied to among them
            start = seq.num_computed_tokens
            self._filled.difference_update(chain.from_iterable(self.tables.blocks(seq, start, start + count)))
        for seq in output.scheduled:  # what the target rejected, or lost when the sequence was preempted, is worth nothing here
            num_computed = self._num_computed.get(seq.seq_id)
            if num_computed is None:
                found = takewhile(self._filled.issuperset, self.tables.blocks(seq, 0, seq.num_computed_tokens))
                num_computed = sum(1 for _ in found) * self._block_size
            self._num_computed[seq.seq_id] = min(num_computed, seq.num_computed_tokens)
        self.worker.move_blocks(output.swap_out, output.swap_in, output.copies)

    @staticmethod
    def _follow(pairs: BlockPairs, source: set[int], target: set[int]) -> None:
        """Blocks are copied: what is known of the first of each pair is known of the second from now on."""
        filled = [block for origin, block in pairs if origin in source]
        target.difference_update(block for _, block in pairs)
        target.update(filled)

    @torch.inference_mode()
    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        """Compute what the step computes, and what was missed while nothing was drafted; then draft."""
        drafts: dict[Sequence, Draft] = {}
        logits, drafting = self._catch_up(output, wanted)
        probs: dict[Sequence, list[Tensor]] = {seq: [] for seq in drafting}
        lengths = {seq: len(seq.tokens) for seq in drafting}
        while drafting:  # what is drafted stands at the end of the sequence until all is
            self._draw(logits, drafting, probs)
            drafting = [seq for seq in drafting if len(seq.tokens) < lengths[seq] + wanted[seq]]
            if drafting:
                logits = self._run(dict.fromkeys(drafting, 1), drafting)
        for seq, length in lengths.items():
            drafts[seq] = Draft(seq.tokens[length:], torch.stack(probs[seq]) if probs[seq] else None)
            del seq.tokens[length:]
        return drafts

    def _catch_up(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> tuple[Tensor, list[Sequence]]:
        """Compute the tokens that the step computes, and before them those that are missing here, within the token budget, and
        one for each sequence more: one all of whose drafts were right lacks the last of them.

        Returns:
            Logits behind the last token, and the sequences that they belong to: those of `wanted` that are complete now.
        """
        budget, counts = self._limits.max_num_batched_tokens + len(output.scheduled), {}
        for seq, num_tokens in output.scheduled.items():
            start = max(self._num_computed[seq.seq_id], self.tables.first_within_windows(seq))
            end = seq.num_computed_tokens + num_tokens
            count = min(end - start, budget)
            budget -= count
            if count:
                self._num_computed[seq.seq_id], counts[seq] = start, count
        drafting = [seq for seq in wanted if seq in counts and self._num_computed[seq.seq_id] + counts[seq] == len(seq.tokens)]
        return self._run(counts, drafting), drafting

    def _run(self, counts: dict[Sequence, int], sampled: list[Sequence]) -> Tensor:
        """Compute the next tokens of each sequence, so many; logits [N, V] behind the last one of those in `sampled`."""
        decision = SchedulerOutput(counts, sampled, changed_tables={seq.seq_id for seq in counts})
        layout = make_batch(len(self.model_config.windows), False, len(counts), self._limits.max_model_len, self._block_size)
        batch = layout.build(decision, {seq.seq_id: self.tables.flat(seq) for seq in counts}, self._num_computed)
        hidden = self.worker.forward(batch)
        for seq, count in counts.items():
            start = self._num_computed[seq.seq_id]
            self._num_computed[seq.seq_id] = end = start + count
            full = self.tables.blocks(seq, start, end // self._block_size * self._block_size)
            self._filled.update(chain.from_iterable(full))
        if not sampled:
            return hidden[:0]
        return self.worker.model.compute_logits(hidden[torch.from_numpy(batch.logits_indices).to(hidden.device)])

    def _draw(self, logits: Tensor, sequences: list[Sequence], probs: dict[Sequence, list[Tensor]]) -> None:
        """Append a token to each sequence, drawn as the target would: at the same number for a request with a seed, so that
        its own draw is likely the same; for one without, from a distribution that is kept in `probs`."""
        sampler = self.worker.sampler
        places = [Prefix(seq, len(seq.tokens), guided=False) for seq in sequences]  # what the form forbids is rejected later
        tokens = sampler(logits, places).token_ids
        rows = [row for row, seq in enumerate(sequences) if not seq.params.greedy and seq.params.seed is None]
        if rows:
            distributions = sampler.probabilities(logits[rows], [places[row] for row in rows])
            for row, distribution, u in zip(rows, distributions, sampler.uniforms(len(rows)), strict=True):
                probs[sequences[row]].append(distribution)
                tokens[row] = draw_one(distribution, u)
        for seq, token in zip(sequences, tokens, strict=True):
            seq.tokens.append(token)


class HeadProposer(Proposer):
    """A head that drafts what it holds for the likeliest. The target's own draws decide what stays, so whatever a request asks
    for, the tokens are those of plain decoding.

    Args:
        speculation: how many tokens to draft, and when. found: the head, which was checked. worker: the target's, loaded.
        limits: the target's.
    """

    def __init__(self, speculation: SpeculativeConfig, found: FoundHead, worker: Worker, limits: Limits) -> None:
        super().__init__(speculation)
        model, config = worker.model, worker.model_config
        assert isinstance(model, LlamaForCausalLM)  # `find_draft` sees to it
        body = model.model
        head = found.load(model, limits.dtype)
        kernels = use_cpu_kernels(worker.config, limits.device)
        for part, rounds in head.parts:
            attach(part, Plan("cpu" if kernels else None, speculation.quantization if rounds else None))
        paths = speculation.paths
        shape = DraftShape.chain(speculation.num_speculative_tokens) if paths is None else DraftShape.tree(paths)
        rows = min(MOST_ROWS, worker.config.max_num_seqs)
        passes = HeadPasses(head, body, shape.most)
        if kernels and worker.backend.name == "cpu" and not worker.config.enforce_eager:
            if isinstance(head, EagleHead) and can_replay([head.fc, head.lm_head, *head.layers]):
                passes = RecordedPasses(head, body, shape.most, rows * max(len(level.nodes) for level in shape.levels))
            else:
                replay(head, head.run_layers, head.layers, config.hidden_size, limits.dtype)
        self.drafts = HeadDrafts(
            passes, shape, worker.backend, rows, limits.max_model_len, config.num_kv_heads, config.head_dim, limits.dtype
        )
        self.gains = shape.gains
        self.heard = HeardSteps(self.drafts)
        worker.listener = self.heard.listen

    def update_states(self, output: SchedulerOutput) -> None:
        self.heard.note(output.removed)

    def num_missed(self, seq: Sequence) -> int:
        return self.drafts.num_missed(seq.seq_id, self.heard.num_kept(seq.seq_id))

    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        self.heard.hand_over()
        return {seq: self._shaped(seq, token_ids) for seq, token_ids in self.drafts.draft(wanted).items()}

    def _shaped(self, seq: Sequence, token_ids: list[int]) -> Draft:
        """A chain, or a tree where tokens were drafted for one, less those for which there is no room. The form of an answer is
        followed token by token, so there the tree's first chain has to do."""
        shape = self.drafts.shape
        if seq.guide is not None or len(token_ids) <= shape.num_in_chain or shape.beginnings is None:
            return Draft(token_ids[: shape.num_in_chain])
        return TreeDraft(token_ids, tree=shape.beginnings[len(token_ids)])


def check_fits(draft: ModelConfig, target: ModelConfig, max_model_len: int) -> ModelConfig:
    """See that a model can draft for another.

    Returns:
        `draft`, as its cache is laid out beside the target's.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if draft.is_encoder:
        raise ValueError("--speculative-config: the draft model is an encoder, which writes no text")
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"--speculative-config: the draft model has a vocabulary of {draft.vocab_size} tokens and the target one of "
            f"{target.vocab_size}; they must have the same tokenizer"
        )
    if draft.max_context < max_model_len:
        raise ValueError(
            f"--speculative-config: the draft model's context is {draft.max_context}; use --max-model-len {draft.max_context}"
        )
    laid_out = with_room(draft, target, max_model_len)
    if laid_out is None:
        widest = max(window for window in target.windows if window is not None)
        raise ValueError(
            f"--speculative-config: the target frees KV blocks behind its window of {widest} tokens, and the "
            "draft model would read them; use one with the same window, or method ngram"
        )
    return laid_out


def find_draft(config: EngineConfig, target: ModelSource, limits: Limits) -> FoundDraft | None:
    """What ``config.speculative_config`` asks for; None if it asks for nothing. A model that drafts has the engine's settings
    but for model and quantization, and is not cut over ranks.

    Raises:
        ValueError: it is not well written, or the model cannot be had or does not fit the target or the settings.
    """
    if config.speculative_config is None:
        return None
    speculation = SpeculativeConfig.parse(config.speculative_config)
    if speculation.method == "ngram":
        return FoundDraft(speculation)
    if speculation.is_head:
        return FoundDraft(speculation, head=_find_head(config, speculation, target, limits))
    if (flag := config.tier_flag) is not None:
        raise ValueError(f"{flag}: not with a draft model, whose keys and values would not come along; use method ngram")
    assert speculation.model is not None  # `SpeculativeConfig` sees to it
    source = resolve_model(speculation.model, quantization=speculation.quantization)
    source = replace(source, config=check_fits(source.config, target.config, limits.max_model_len))
    settings = replace(
        config, model=speculation.model, quantization=speculation.quantization, tensor_parallel_size=1,
        enable_expert_parallel=False, distributed_executor_backend=None, enable_lora=False, lora_modules=(),
    )  # fmt: skip
    check_settings(settings, source, limits.device, limits.dtype)
    return FoundDraft(speculation, DraftModel(settings, source))


def _find_head(config: EngineConfig, speculation: SpeculativeConfig, target: ModelSource, limits: Limits) -> FoundHead:
    """The head that ``config.speculative_config`` asks for.

    Raises:
        ValueError: there is none, or it does not go together with the target or a setting.
    """
    model, refused = target.config, f"--speculative-config: method {speculation.method}: "
    if speculation.method == "eagle" and (model.architecture != "LlamaForCausalLM" or model.windows != (None,)):
        raise ValueError(f"{refused}only for models of the LLaMA family, and this is a {model.architecture}; use ngram")
    if config.tensor_parallel_size > 1 or config.distributed_executor_backend in ("mp", "ray"):
        raise ValueError(f"{refused}only with one rank in the engine's process; use ngram or draft_model")
    if limits.device.type != "cpu":
        raise ValueError(f"{refused}the head runs on a CPU only, and the model is on {limits.device.type}; use draft_model")
    if speculation.paths is not None and config.attention_backend not in ("auto", "cpu", "torch"):
        raise ValueError(f"{refused}speculative_token_tree: attention backend {config.attention_backend} has no trees; use cpu")
    if speculation.quantization is not None and not use_cpu_kernels(config, limits.device):
        raise ValueError(f"{refused}quantization {speculation.quantization} needs the CPU kernels, which are off or not built")
    try:
        if not speculation.model:
            return find_mtp(target)
        found = find_head(Path(speculation.model), model)
    except ValueError as error:
        raise ValueError(f"{refused}{error}") from None
    if (rank := max((max(path) for path in speculation.paths or []), default=0)) >= found.num_drafted:
        raise ValueError(f"{refused}speculative_token_tree: {rank} is no choice of a head of {found.num_drafted} tokens")
    return found


def make_proposer(draft: FoundDraft | None, limits: Limits, worker: Worker) -> Proposer | None:
    """Load what drafts, if anything does; `worker` is the target's.

    Raises:
        ValueError: a head's weights are not for this target.
    """
    if draft is None:
        return None
    if draft.head is not None:
        return HeadProposer(draft.speculation, draft.head, worker, limits)
    if draft.model is None:
        return NgramProposer(draft.speculation)
    return DraftModelProposer(draft.speculation, draft.model, worker.model_config, limits)
