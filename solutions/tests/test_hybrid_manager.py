"""Blocks in groups of layers: what a window costs, what a prefix needs, and random lives of the whole stack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from solutions.attention.block_manager import NULL_BLOCK
from solutions.attention.hybrid_manager import HybridBlockManager, blocks_of_one, longest_of_one, make_block_manager
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence
from solutions.memory.cache_engine import block_bytes
from solutions.models.config.aliases import ALIASES
from solutions.tests.simulation import Simulation
from solutions.tests.test_state_machine import SETTINGS, EngineMachine


def sequence(tokens: list[int], seq_id: int = 0) -> Sequence:
    return Sequence(seq_id, tokens, SamplingParams(max_tokens=64))


def compute(manager: HybridBlockManager, seq: Sequence, chunk: int) -> int:
    """Let a sequence through all its tokens, chunk by chunk; the most blocks in use at once."""
    peak = 0
    while seq.num_uncomputed_tokens:
        count = min(chunk, seq.num_uncomputed_tokens)
        manager.begin_step()
        manager.free_out_of_window(seq)
        assert manager.append_slots(seq, count, [])
        manager.cache_full_blocks(seq, count)
        peak = max(peak, manager.allocator.num_used)
        seq.num_computed_tokens += count
        manager.check_invariants()
    return peak


@pytest.mark.parametrize(("alias", "groups", "size"), [("gemma-3-270m", 6, 3), ("gemma-2-2b", 2, 13), ("smollm2-135m", 1, 30)])
def test_groups_hold_every_layer_once_and_one_window_each(alias: str, groups: int, size: int) -> None:
    config = ALIASES[alias].config
    assert [len(layers) for layers in config.kv_groups] == [size] * groups
    assert config.num_cached_layers == size
    places = [config.place_of(layer) for layer in range(config.num_layers)]
    assert sorted(places) == [(group, place) for group in range(groups) for place in range(size)]
    for layer, (group, _) in enumerate(places):
        assert config.windows[group] == (config.layer_windows[layer] if config.layer_windows else config.sliding_window)


def test_a_window_costs_a_window() -> None:
    """Gemma 3 at a context of 8,192: blocks of 16 tokens, chunks of 512, keys and values in bfloat16."""
    config, length, chunk = ALIASES["gemma-3-270m"].config, 8192, 512
    most = blocks_of_one(config.windows, length, 16, chunk)
    manager = make_block_manager(config.windows, most, 16, 0, True, chunk)
    seq = sequence([i % 250 for i in range(length)])
    assert manager.can_allocate(seq, keep_watermark=False)
    manager.allocate(seq)
    peak = compute(manager, seq, chunk)
    seq.append_token(1)
    manager.free_out_of_window(seq)
    settled = manager.allocator.num_used
    assert settled == 512 + 5 * (512 // 16)  # all tokens in one group, a window in each of five
    assert settled < peak <= most == 512 + 5 * ((512 + 512) // 16 + 2)
    size = 2 * 3 * 16 * 256 * 2
    assert size == block_bytes(config.num_cached_layers, 16, config.num_kv_heads, config.head_dim, torch.bfloat16)
    print(f"{settled * size / 2**20:.1f} MiB, {peak * size / 2**20:.1f} at most; in one group {6 * 512 * size / 2**20:.1f} MiB")
    assert (settled * size, 6 * 512 * size) == (33030144, 150994944)  # 31.5 and 144 MiB


@pytest.mark.parametrize("windows", [(None,), (7,), (None, 7), (3, None, 3)])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_longest_sequence_that_fits(windows: tuple[int | None, ...], size: int) -> None:
    for blocks in range(0, 60, 7):
        longest = longest_of_one(windows, blocks, size, 5)
        assert longest % size == 0
        assert blocks_of_one(windows, longest, size, 5) <= blocks < blocks_of_one(windows, longest + 1, size, 5)


def test_a_prefix_is_known_as_far_as_every_group_has_what_it_sees() -> None:
    """Blocks of 2 tokens, a window of 4: behind 4 blocks a token sees those at positions 5, 6 and 7, blocks 2 and 3."""
    manager = HybridBlockManager(40, 2, windows=(None, 4), chunk=64)
    first = sequence(list(range(9)))
    assert manager.allocate(first) == 0
    compute(manager, first, 64)
    assert manager.num_cached_blocks(sequence(list(range(9)), 1)) == 4
    full, sliding = (list(group.tables[0]) for group in manager.groups)
    manager.free(first)
    again = sequence(list(range(9)), 2)
    assert manager.allocate(again) == 8
    assert manager.groups[0].tables[2][:4] == full[:4]
    assert manager.groups[1].tables[2][:4] == [NULL_BLOCK, NULL_BLOCK, *sliding[2:4]]
    manager.free(again)
    manager.prefix_cache.forget(sliding[2])
    assert manager.num_cached_blocks(sequence(list(range(9)), 3)) == 2  # behind 2 blocks it sees blocks 0 and 1
    manager.prefix_cache.forget(sliding[0])
    assert manager.num_cached_blocks(sequence(list(range(9)), 4)) == 0
    manager.check_invariants()


def test_blocks_of_one_group_are_never_found_by_another() -> None:
    manager = HybridBlockManager(12, 2, windows=(None, 2, 2), chunk=4)
    first = sequence([1, 2, 3, 4, 5])
    manager.allocate(first)
    compute(manager, first, 4)
    other = sequence([1, 2, 3, 4, 6], 1)
    assert manager.allocate(other) == 4
    for number, group in enumerate(manager.groups):
        others = {block for each in manager.groups[:number] + manager.groups[number + 1 :] for block in each.tables[0]}
        assert not (set(group.tables[1]) - {NULL_BLOCK}) & (others - {NULL_BLOCK})
    manager.check_invariants()


@pytest.mark.parametrize("windows", [(None, 4), (5, None, 5), (3, 3, None, 7)])
@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("chunk", [1, 5, 17])
def test_the_longest_prompt_comes_back_wherever_it_was_stopped(windows: tuple[int | None, ...], size: int, chunk: int) -> None:
    """In a memory for one sequence of 60 tokens; otherwise it would wait for ever."""
    manager = HybridBlockManager(blocks_of_one(windows, 60, size, chunk), size, 300, 0.0, windows=windows, chunk=chunk)
    seq = sequence(list(range(60)))
    manager.allocate(seq)
    while seq.num_uncomputed_tokens:
        manager.begin_step()
        manager.free_out_of_window(seq)
        count = min(chunk, seq.num_uncomputed_tokens)
        assert manager.append_slots(seq, count, [])
        manager.cache_full_blocks(seq, count)
        seq.num_computed_tokens += count
        assert manager.can_swap_out(seq)
        held = [block for block in manager.tables[0] if block != NULL_BLOCK]
        left = [pair[0] for pair in manager.swap_out(seq)]
        assert set(left) <= set(held)
        assert manager.can_swap_in(seq, keep_watermark=False)
        assert len(manager.swap_in(seq)) == len(left)
        assert manager.host_allocator.num_used == 0
        manager.check_invariants()


class HybridMachine(EngineMachine):
    """The same random lives with groups of layers; a sequence of half of the memory's tokens always fits."""

    @initialize(chosen=SETTINGS, windows=st.sampled_from([(None, 3), (5, None, 5), (4, None), (3, 3, None, 7)]))
    def start(self, chosen, windows):
        chosen = chosen | {"sliding_window": None}
        size, length = chosen["block_size"], max(2, chosen["num_blocks"] * chosen["block_size"] // 2)
        least = blocks_of_one(windows, length, size, chosen["max_num_batched_tokens"])
        chosen["num_blocks"] = least + chosen["num_blocks"] // 4
        self.sim = Simulation(**chosen, windows=windows, max_model_len=length)
        self.capacity = length


TestHybridMachine = HybridMachine.TestCase
TestHybridMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
