"""The radix tree: it finds the longest prefix of any length, by brute force; and no sequence ever reads what is not its own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence
from solutions.core.engine import LLM
from solutions.memory.radix_cache import RadixCache
from solutions.tests.simulation import Simulation
from solutions.tests.slow_cases import slow_after
from solutions.tests.test_state_machine import SETTINGS, EngineMachine
from solutions.tests.tiny_models import make_tiny_llama, make_tiny_mistral
from solutions.tests.twins import run_twins

SIZE = 4


class RadixMachine(EngineMachine):
    """`EngineMachine` over a `RadixBlockManager`."""

    @initialize(chosen=SETTINGS)
    def start(self, chosen):
        chosen = {name: value for name, value in chosen.items() if name not in ("sliding_window", "enable_prefix_caching")}
        self.sim = Simulation(**chosen, radix=True)
        self.capacity = chosen["num_blocks"] * chosen["block_size"]


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
class TestManyRadixMachines(RadixMachine.TestCase):
    settings = settings(TestRadixMachine.settings, max_examples=400)


@pytest.mark.parametrize("how", [{}, {"drafts": True}, {"ahead": True}], ids=str)
@pytest.mark.parametrize("first", slow_after(1, range(0, 600, 100)))
def test_twins_say_what_they_say_alone(first: int, how: dict[str, bool]) -> None:
    for seed in range(first, first + 100):
        try:
            run_twins(random.Random(seed), radix=True, **how)
        except AssertionError as error:
            raise AssertionError(f"random.Random({seed}): {error}") from error


def text(tokens: list[int], salt: str | None = None) -> Sequence:
    return Sequence(0, tokens, SamplingParams(), cache_salt=salt)


def longest(known: dict[int, tuple[str | None, list[int]]], wanted: list[int], salt: str | None) -> int:
    """Tokens that a text shares with one that is known, but for its own last one."""
    best = 0
    for other_salt, tokens in known.values():
        shared = 0
        while other_salt == salt and shared < min(len(tokens), len(wanted) - 1) and tokens[shared] == wanted[shared]:
            shared += 1
        best = max(best, shared)
    return best


@pytest.mark.parametrize("seed", slow_after(3, range(12)))
def test_the_longest_prefix_is_found(seed: int) -> None:
    """Texts of few tokens, so that they share much, come and go from the end, as a cache's blocks do; the oracle compares with
    every text that is left. A prefix is found whole blocks first, then as much of the next block as any has."""
    rng, cache, known, blocks = random.Random(seed), RadixCache(SIZE), dict[int, tuple[str | None, list[int]]](), 0
    held: dict[int, list[int]] = {}
    for number in range(200):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 22))]
        salt = rng.choice([None, None, "a"])
        seq = text(tokens, salt)
        hits = cache.match(seq)
        block, shared = cache.match_part(seq, len(hits))
        assert len(hits) * SIZE + shared == longest(known, tokens, salt)
        assert not shared or block in {each for table in held.values() for each in table}
        table = []
        for key in list(cache.block_hashes(seq, len(tokens) // SIZE)):
            table.append(blocks)
            cache.insert(key, blocks)
            blocks += 1
        if len(tokens) % SIZE:
            table.append(blocks)
            cache.insert_end(seq, len(tokens), blocks)
            blocks += 1
        known[number], held[number] = (salt, tokens), table
        cache.check_invariants()
        while len(known) > 12:  # the oldest text leaves, and with it all that only it holds
            gone = rng.choice(list(known)[:6])
            del known[gone]
            for each in reversed(held.pop(gone)):
                cache.forget(each)
            # what it shared with later texts was entered in its blocks; they enter theirs, as their sequences would anew
            for other, (other_salt, other_tokens) in known.items():
                again = text(other_tokens, other_salt)
                for key, each in zip(cache.block_hashes(again, len(other_tokens) // SIZE), held[other], strict=False):
                    cache.insert(key, each)
                if len(other_tokens) % SIZE:
                    cache.insert_end(again, len(other_tokens), held[other][-1])
            cache.check_invariants()
    for table in held.values():
        for each in table:  # from the beginning, too
            cache.forget(each)
            cache.check_invariants()
    assert not cache._nodes, "nothing is left of texts whose blocks are gone"


def test_a_spray_of_salts_is_forgotten() -> None:
    """Each request brings a salt of its own, as clients may; the tree is no larger than what its blocks hold."""
    sim = Simulation(num_blocks=8, block_size=SIZE, radix=True)
    for number in range(200):
        sim.add([1] * 6, max_tokens=2, salt=f"client {number}")
        sim.run()
        assert len(sim.manager.prefix_cache._top.children) <= 8
    sim.manager.prefix_cache.clear()
    sim.manager.prefix_cache.check_invariants()


def test_a_prompt_shares_all_tokens_up_to_the_first_that_differs() -> None:
    """Of 11 tokens alike, with blocks of 4: the hash cache shares 8, the tree 11."""
    for radix, cached in ((False, 8), (True, 11)):
        sim = Simulation(num_blocks=16, block_size=SIZE, radix=radix)
        sim.add([*range(11), 50, 51], max_tokens=1)
        sim.run()
        (second,) = sim.add([*range(11), 60, 61, 62], max_tokens=1)
        decision = sim.step()
        assert second.num_cached_tokens == cached
        assert len(decision.copies) == (1 if radix else 0)
        sim.run()
        assert sim.manager.prefix_cache.num_hits == cached


@pytest.mark.parametrize("turn", range(1, 2 * SIZE + 1))
def test_a_chat_goes_on_where_it_ended(turn: int) -> None:
    """Whatever the length of a turn, the next one computes what is new, and the last token that was written."""
    sim = Simulation(num_blocks=32, block_size=SIZE, radix=True, next_token=lambda seq: 90 + len(seq.tokens) % 3)
    (first,) = sim.add(list(range(turn)), max_tokens=3)
    sim.run()
    (second,) = sim.add([*first.tokens, 70, 71], max_tokens=1)
    sim.step()
    assert second.num_cached_tokens == len(first.tokens) - 1
    sim.run()


def test_a_block_that_a_child_goes_on_writing_is_not_entered_as_its_parents() -> None:
    """Parent and child share the block of the prompt's end; the parent is aborted, and the child writes into it."""
    sim = Simulation(num_blocks=16, block_size=SIZE, radix=True, next_token=lambda seq: 50 + seq.seq_id)
    parent, child = sim.add([1, 2, 3, 4, 5, 6], max_tokens=8, n=2)
    for _ in range(3):
        sim.step()
    sim.scheduler.abort(parent)
    sim.step()
    sim.add([1, 2, 3, 4, 5, 6, 50, 50], max_tokens=1)
    sim.run()
    assert child.finished


def answers(path: Path, **settings: object) -> tuple[list[list[int]], int]:
    """Greedy tokens of a chat of three turns beside two others that begin alike; and how many prompt tokens were found."""
    llm = LLM(str(path), device="cpu", dtype="float32", num_gpu_blocks_override=40, **settings)
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    said, found, text = [], 0, list(range(5, 26))
    for turn in range(3):
        prompts = [text, [*text, 60 + turn], [*text[:-1], 70 + turn, 71]]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        said += [output.outputs[0].token_ids for output in outputs]
        found += sum(output.num_cached_tokens for output in outputs)
        text += [*said[-3], 80 + turn]
    llm.llm_engine.scheduler.check_invariants()
    return said, found


@pytest.mark.parametrize(
    "settings", slow_after(2, [{}, {"kv_cache_dtype": "int8"}, {"tensor_parallel_size": 2}, {"async_scheduling": True},
                               {"speculative_config": '{"method": "ngram"}'}]), ids=str,
)  # fmt: skip
def test_the_engine_says_the_same_and_computes_less(tmp_path: Path, settings: dict[str, object]) -> None:
    make_tiny_llama(tmp_path)
    by_hash, by_tree = (answers(tmp_path, prefix_cache=way, **settings) for way in ("hash", "radix"))
    assert by_tree[0] == by_hash[0]
    assert by_tree[1] > by_hash[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"enable_prefix_caching": False}, "not with --no-enable-prefix-caching"),
     ({"kv_offload": "host"}, "not with --kv-offload, which goes by hashes"), ({}, "which has a sliding window")],
)  # fmt: skip
def test_what_it_cannot_go_with_is_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    make_tiny_mistral(tmp_path)
    with pytest.raises(ValueError, match=f"--prefix-cache radix: .*{message}"):
        LLM(str(tmp_path), device="cpu", prefix_cache="radix", **settings)


@pytest.mark.parametrize("way", ["hash", "radix"])
def test_what_was_looked_up_is_counted_while_nothing_is_cached(tmp_path: Path, way: str) -> None:
    """A counter that falls back to 0 when the cache is empty would look like a restart to whoever draws it."""
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", num_gpu_blocks_override=40, prefix_cache=way)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": list(range(40))}], params, use_tqdm=False)
    llm.llm_engine.block_manager.prefix_cache.clear()
    assert llm.llm_engine.stats().prefix_cache_queries == 43
