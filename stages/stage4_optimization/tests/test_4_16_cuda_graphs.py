"""Task 4.16 ★: decode steps that are recorded for some sizes and replayed for all; a stand-in for a card records them."""

from __future__ import annotations

import random
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.attention.paged_attention import AttentionMetadata, NaiveBackend
from stages.batching.step_arrays import FlatArrays, HostArrays
from stages.core.graphs.decode_graphs import MAX_BATCH, PADDING_SLOT, DecodeGraphs, Step, graph_sizes
from stages.course.fixtures.checks import check_equal

BLOCK, LONGEST, BLOCKS = 4, 18, 40
"""Tokens of a block, of a sequence at most, and how many blocks there are."""
GARBAGE = 1 << 20
"""What stands in block tables behind the contexts: there is no such block."""


def batch_of(rows: list[tuple[int, int, int, list[int], int]], adapters: list[int] | None = None) -> HostArrays:
    """A decode step's arrays; a row is (id, position, slot, blocks, context)."""
    width = max(len(blocks) for *_, blocks, _ in rows)
    tables = [blocks + [GARBAGE] * (width - len(blocks)) for *_, blocks, _ in rows]
    ids, positions, slots = (np.array([row[k] for row in rows], np.int64) for k in range(3))
    contexts = np.array([row[4] for row in rows], np.int32)
    starts = np.arange(len(rows) + 1, dtype=np.int32)
    return FlatArrays(slots, np.array(tables, np.int32), starts, contexts, ids, positions, np.array(adapters or [], np.int64))


class Recorded:
    """A model and what records it, as a graph would: inputs and results stay where they were at the recording.

    A token stores its id and position in its slot, and gives the sum of what its context holds. A token without a slot stores
    nothing, and one with a context of 0 reads nothing.

    Attributes:
        order: sizes in the order in which they were recorded. replays: sizes of the steps since. seen: of each size the arrays.
    """

    def __init__(self, sizes: list[int], windows: tuple[int | None, ...] = (None,)) -> None:
        self.order, self.replays, self.seen = list[int](), list[int](), dict[int, Any]()
        self.cache = torch.zeros(2, BLOCKS, BLOCK, 1, 1, dtype=torch.float64)
        model: Any = self.model
        self.graphs = DecodeGraphs(model, NaiveBackend(), [self.cache], sizes, LONGEST, BLOCK, windows, self.record)

    def model(self, ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.seen[len(ids)] = SimpleNamespace(ids=ids, positions=positions, metadata=metadata)
        of, slots = metadata.of(0), self.cache[0].view(-1)
        for token, position, slot in zip(ids.tolist(), positions.tolist(), of.slot_mapping.tolist(), strict=True):
            if slot != PADDING_SLOT:
                slots[slot] = 100 * token + position
        hidden = torch.zeros(len(ids), 1, dtype=torch.float64)
        for row, context in enumerate(of.context_lens.tolist()):
            blocks = of.block_tables[row, : -(-context // BLOCK)].tolist()
            hidden[row] = sum(slots[blocks[p // BLOCK] * BLOCK + p % BLOCK] for p in range(context))
        return hidden

    def record(self, step: Step) -> Step:
        hidden = step()
        self.order.append(len(hidden))

        def replay() -> Tensor:
            self.replays.append(len(hidden))
            return hidden.copy_(step())

        return replay


def test_sizes_are_few_and_reach_to_the_largest_batch() -> None:
    """1, 2, 4, multiples of 8, and the largest batch, which is at most MAX_BATCH.

    Why: a graph takes memory and a second at start. A batch without one runs from Python, at a third of the speed, and the
    largest batch is the one that a busy server runs all day.
    """
    expected = {
        1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 5: [1, 2, 4, 5], 7: [1, 2, 4, 7], 8: [1, 2, 4, 8], 9: [1, 2, 4, 8, 9],
        20: [1, 2, 4, 8, 16, 20], 24: [1, 2, 4, 8, 16, 24],
    }  # fmt: skip
    for count, sizes in expected.items():
        check_equal(graph_sizes(count), sizes, f"sizes for {count} sequences")
    for count in (MAX_BATCH, MAX_BATCH + 1, 10_000):
        check_equal(graph_sizes(count), [1, 2, 4, *range(8, MAX_BATCH + 1, 8)], f"sizes for {count} sequences")
    check_equal(graph_sizes(MAX_BATCH - 1)[-2:], [MAX_BATCH - 8, MAX_BATCH - 1], f"the last sizes for {MAX_BATCH - 1}")


@pytest.mark.parametrize("windows", [(None,), (None, 6, None)], ids=["one group", "three groups"])
def test_every_size_reads_the_first_rows_of_one_memory(windows: tuple[int | None, ...]) -> None:
    """Recorded for 5, 2 and 1, the largest first: each has arrays of its size, all of which begin at the same places.

    Why: a graph reads at addresses. Were its inputs copies, nobody could tell it anything new; were they of another shape, it
    would compute for rows that are not there.
    """
    recorded = Recorded([1, 2, 5], windows)
    check_equal(recorded.order, [5, 2, 1], "sizes in the order of their recording")
    groups, width = ([len(windows)] if len(windows) > 1 else []), -(-LONGEST // BLOCK)
    largest = recorded.graphs._views(5)
    for size in (5, 2, 1):
        step = recorded.graphs._views(size)
        shapes = {each.name: [*getattr(step, each.name).shape] for each in fields(FlatArrays)}
        expected = {
            "slot_mapping": [*groups, size], "block_tables": [*groups, size, width], "query_start_loc": [size + 1],
            "context_lens": [size], "input_ids": [size], "positions": [size], "adapters": [0],
        }  # fmt: skip
        check_equal(shapes, expected, f"shapes of a step of {size}")
        check_equal(step.query_start_loc.tolist(), list(range(size + 1)), f"where the sequences of a step of {size} begin")
        for name in ("slot_mapping", "block_tables", "context_lens", "input_ids", "positions"):
            ours, theirs = getattr(step, name), getattr(largest, name)
            assert ours.data_ptr() == theirs.data_ptr(), f"{name} of a step of {size} lies elsewhere than that of 5"
        seen = recorded.seen[size]
        assert (seen.ids.data_ptr(), len(seen.ids)) == (largest.input_ids.data_ptr(), size), (
            "the recorded ids are not the views"
        )
        check_equal(seen.metadata.max_query_len, 1, "tokens of a sequence at most")


def test_a_batch_runs_in_the_smallest_size_that_has_room() -> None:
    """Recorded for 1, 2 and 5: batches of 1 to 6; a prompt of two tokens; a token of an adapter.

    Why: a graph computes one token for each of its rows, and nothing else. What does not fit it has to run from Python.
    """
    graphs = Recorded([1, 2, 5]).graphs
    row = (7, 3, 3, [0], 4)
    found = [graphs.size_for(batch_of([row] * count)) for count in range(1, 7)]
    check_equal(found, [1, 2, 5, 5, 5, None], "sizes for 1 to 6 sequences")
    check_equal(graphs.size_for(batch_of([row] * 2, adapters=[0, 0])), 2, "the size where nobody has an adapter")
    for adapters in ([0, 1], [1, 0], [2, 2]):
        check_equal(graphs.size_for(batch_of([row] * 2, adapters)), None, f"the size with adapters {adapters}")
    prompt = batch_of([row, row, row])
    prompt.query_start_loc, prompt.context_lens = np.array([0, 1, 3], np.int32), np.array([4, 4], np.int32)
    prompt.block_tables = prompt.block_tables[:2]
    check_equal(graphs.size_for(prompt), None, "the size where a sequence has two tokens")


def test_steps_of_any_sizes_store_and_read_as_if_each_had_its_own() -> None:
    """Six sequences grow, in each step some of them and in any order; sizes are 1, 3 and 6. Now and then one ends, and another
    begins in its blocks.

    Why: what a larger step has left behind is there when a smaller one is filled up. A row of padding that keeps a slot writes
    an old token over what has been stored there since, in blocks that are somebody else's.
    """
    for seed in range(4):
        dice, recorded = random.Random(seed), Recorded([1, 3, 6])
        blocks = dice.sample(range(BLOCKS), BLOCKS)
        tables = {name: [blocks.pop() for _ in range(5)] for name in range(6)}
        lengths, sums = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0)
        stored = torch.zeros(BLOCKS * BLOCK).double()
        recorded.cache.zero_()
        for number in range(60):
            rows, names = [], dice.sample(range(6), dice.randint(1, 6))
            for name in names:
                if lengths[name] == LONGEST or dice.random() < 0.2:
                    lengths[name] = sums[name] = 0
                position, token = lengths[name], dice.randint(1, 9)
                slot = tables[name][position // BLOCK] * BLOCK + position % BLOCK
                rows.append((token, position, slot, tables[name][: position // BLOCK + 1], position + 1))
                lengths[name] += 1
                sums[name] += 100 * token + position
                stored[slot] = 100 * token + position
            batch = batch_of(rows)
            before = [getattr(batch, each.name).copy() for each in fields(FlatArrays)]
            size = recorded.graphs.size_for(batch)
            assert size is not None
            hidden, what = recorded.graphs.run(batch, size), f"step {number} of seed {seed}, {len(rows)} rows in {size}"
            expected = torch.tensor([float(sums[name]) for name in names]).double()
            check_equal(hidden.flatten(), expected, f"hidden states of {what}")
            check_equal(recorded.cache[0].flatten(), stored, f"the cache behind {what}")
            check_equal(recorded.replays[-1], size, f"the size that was replayed for {what}")
            for each, old in zip(fields(FlatArrays), before, strict=True):
                check_equal(getattr(batch, each.name).tolist(), old.tolist(), f"{each.name} of the batch, {what}")
        check_equal(recorded.order, [6, 3, 1], "sizes that were recorded")


def test_padding_has_neither_a_slot_nor_a_context() -> None:
    """A step of five, then one of three, which runs in five as well; then one of one, with groups of layers.

    Why: kernels look at the slot to know whether to store, and at the context to know how much to read. Both are there from the
    last step.
    """
    recorded = Recorded([5], (None, 6))
    rows = [(9, 3, 4 * k + 3, [k], 4) for k in range(5)]

    def two(batch: HostArrays) -> HostArrays:
        batch.slot_mapping = np.stack([batch.slot_mapping, batch.slot_mapping + 40])
        batch.block_tables = np.stack([batch.block_tables, batch.block_tables + 10])
        return batch

    for count in (5, 3, 1, 4):
        recorded.graphs.run(two(batch_of(rows[:count])), 5)
        metadata = recorded.seen[5].metadata
        for group, more in enumerate((0, 40)):
            slots = [4 * k + 3 + more if k < count else PADDING_SLOT for k in range(5)]
            check_equal(metadata.of(group).slot_mapping.tolist(), slots, f"slots of group {group}, {count} of 5 rows")
            tables = metadata.of(group).block_tables[:count, 0].tolist()
            check_equal(tables, [k + more // 4 for k in range(count)], f"first blocks of group {group}, {count} of 5 rows")
            check_equal(
                metadata.of(group).context_lens.tolist(), [4] * count + [0] * (5 - count), f"contexts, {count} of 5 rows"
            )
        check_equal(recorded.seen[5].ids[:count].tolist(), [9] * count, "ids")
        check_equal(recorded.seen[5].positions[:count].tolist(), [3] * count, "positions")


def test_tokens_that_only_the_device_knows_take_their_places() -> None:
    """Ids −1 and −3 stand for the first and the third token of the step before; 8 is itself.

    Why: with a step ahead the host lays out a step before it has the last one's tokens. A graph that reads −1 reads no row of
    the embedding.
    """
    recorded = Recorded([4])
    ids = [-3, 8, -1]
    batch = batch_of([(token, 0, 4 * k, [k], 1) for k, token in enumerate(ids)])
    tokens = torch.tensor([51, 52, 53])
    hidden = recorded.graphs.run(batch, 4, tokens)
    check_equal(hidden.flatten(), torch.tensor([5300.0, 800.0, 5100.0]).double(), "hidden states")
    check_equal(recorded.seen[4].ids[:3].tolist(), [53, 8, 51], "the ids that the graph has read")
    check_equal([tokens.tolist(), batch.input_ids.tolist()], [[51, 52, 53], ids], "tokens and ids that were given")
    hidden = recorded.graphs.run(batch_of([(6, 0, 0, [0], 1)]), 4)
    check_equal(hidden.flatten(), torch.tensor([600.0]).double(), "hidden states of a step without such tokens")


def test_hidden_states_lie_where_the_graph_leaves_them() -> None:
    """Two of four rows come back, of the graph's own memory; the next step overwrites them.

    Why: behind the layers come the head and the sampler, on rows of the batch. Rows of padding would be sampled, and a copy
    would cost a launch in each step.
    """
    recorded = Recorded([4])
    first = recorded.graphs.run(batch_of([(1, 0, 0, [0], 1), (2, 0, 4, [1], 1)]), 4)
    check_equal([*first.shape], [2, 1], "shape of two sequences' hidden states")
    check_equal(first.flatten(), torch.tensor([100.0, 200.0]).double(), "hidden states")
    second = recorded.graphs.run(batch_of([(3, 0, 0, [0], 1)]), 4)
    check_equal(second.data_ptr(), first.data_ptr(), "where the next step's hidden states lie")
