"""How many tokens are drafted: on devices and texts whose costs and chances are known, with a clock that a test sets.

The oracle is the same simulated time with a fixed number of drafts: 0, which may not be beaten by more than 3 %, and the best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from solutions.batching.scheduler_output import Draft, SchedulerOutput
from solutions.batching.sequence import Sequence
from solutions.core.speculation.draft_lengths import (
    AGAIN,
    ALLOWANCE,
    AT_FIRST,
    FOR_PROBES,
    MOST_PROBED,
    MOST_SAVED,
    SAVED_FOR_A_MODEL,
    DraftLengths,
)  # fmt: skip
from solutions.core.speculation.settings import SpeculativeConfig
from solutions.core.speculation.step_costs import DOUBTED, ENOUGH, FIRST_CHECK, FRESH, NEAR, StepCosts
from solutions.core.speculative import Proposer
from solutions.tests.simulation import Simulation
from solutions.tests.slow_cases import slow_after
from solutions.tests.twins import greedy

Cost = Callable[[int], float]
Chances = Callable[[int, int], float]
COSTS: dict[str, Cost] = {
    "waits for memory": lambda rows: 10 + 0.02 * rows,
    "first memory, then arithmetic": lambda rows: max(9 + 0.1 * rows, 1.2 * rows),
    "arithmetic": lambda rows: 1 + rows,
    "tiles of 16 rows": lambda rows: 10 * -(-rows // 16),
}
"""Rows of a step → the time that it takes."""
TEXTS: dict[str, Chances] = {
    "repetitive": lambda seq, position: 0.95,
    "ordinary": lambda seq, position: 0.4,
    "random": lambda seq, position: 0.02,
    "half of them repetitive": lambda seq, position: 0.95 if seq % 2 else 0.02,
    "repetitive now and then": lambda seq, position: 0.95 if position // 60 % 2 else 0.02,
}
"""Sequence, its length → the chance that a drafted token is right."""
MOST = 5
MOST_LOST = max(AT_FIRST, MOST_SAVED, SAVED_FOR_A_MODEL + MOST_PROBED)
"""In steps, beside the allowances: all that the accounts can hold."""


class Run:
    """Decoding of some sequences in simulated time.

    Args:
        fixed: tokens that are always drafted; None: as many as pay.
        drafting: time that the proposer takes a token of each sequence; 0: drafts follow from the text and cost nothing.
        noise: how much longer than they should steps take, on average, as a share; one in a hundred takes five times as long.

    Attributes:
        time: what the steps should have taken. drafted: tokens on trial in each step.
    """

    def __init__(
        self, cost: Cost, chances: Chances, num_seqs: int, fixed: int | None = None, drafting: float = 0.0, noise: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.cost, self.chances, self.fixed, self.drafting, self.noise = cost, chances, fixed, drafting, noise
        self.lengths = DraftLengths(foretold=drafting == 0)
        self.positions = [0] * num_seqs
        self.random = random.Random(seed)
        self.time, self.drafted = 0.0, list[int]()

    def step(self) -> None:
        lengths, num_seqs = self.lengths, len(self.positions)
        counts = [self.fixed or 0] * num_seqs
        if self.fixed is None and not lengths.rests():
            counts = lengths.choose(range(num_seqs), [MOST] * num_seqs, [0] * num_seqs)
        overhead = self.drafting * max(counts)
        if max(counts):
            lengths.drafted(overhead, max(counts), [0])
        num_new, looks = num_seqs, lengths.may_look()
        for seq, count in enumerate(counts):
            looked = count or int(looks)
            chance, num_right = self.chances(seq, self.positions[seq]), 0
            while num_right < looked and self.random.random() < chance:
                num_right += 1
            if looked:
                lengths.judge(seq, num_right, looked)
            num_new += num_right if count else 0
            self.positions[seq] += 1 + (num_right if count else 0)
        seconds = self.cost(num_seqs + sum(counts))
        self.time += seconds + overhead
        self.drafted.append(sum(counts))
        measured = seconds * (1 + self.noise * abs(self.random.gauss(0, 1)))
        if self.noise and self.random.random() < 0.01:
            measured *= 5
        lengths.ran(num_seqs, sum(counts), num_new, measured, overhead)

    def rate(self, num_tokens: int) -> float:
        """Tokens by time, once so many are there."""
        while sum(self.positions) < num_tokens:
            self.step()
        return sum(self.positions) / self.time


@pytest.mark.parametrize("drafting", [0.0, 2.0], ids=["n-grams", "a model"])
@pytest.mark.parametrize("num_seqs", slow_after(2, [1, 16, 4, 32]))
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cost", COSTS)
def test_it_never_loses_three_percent_and_wins_most_of_what_can_be_won(cost, text, num_seqs, drafting) -> None:
    def rate(fixed: int | None) -> float:
        return Run(COSTS[cost], TEXTS[text], num_seqs, fixed, drafting).rate(250 * num_seqs)

    adapted, plain = rate(None), rate(0)
    assert adapted >= 0.97 * plain
    best = max(rate(fixed) for fixed in range(MOST + 1))
    assert adapted >= (0.75 if cost == "tiles of 16 rows" else 0.83) * best


def test_on_average_it_is_near_the_best_fixed_number() -> None:
    """Which is known only afterwards. Where sequences differ, no fixed number is as good."""
    ratios = {}
    for cost in COSTS:
        for text in TEXTS:
            best = max(Run(COSTS[cost], TEXTS[text], 4, fixed).rate(1600) for fixed in range(MOST + 1))
            ratios[cost, text] = Run(COSTS[cost], TEXTS[text], 4).rate(1600) / best
    assert math.prod(ratios.values()) ** (1 / len(ratios)) > 0.97
    assert ratios["first memory, then arithmetic", "half of them repetitive"] > 1.1


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_is_bounded_whatever_text_and_machine_do(seed: int) -> None:
    """Steps of any growing cost, and texts that change between hopeless and certain at any moment."""
    rng = random.Random(seed)
    base, slope, tile, jump = rng.uniform(0, 20), rng.uniform(0, 2), rng.choice([1, 8, 16]), rng.uniform(0, 5)
    turns = [rng.choice([0.0, 0.02, 0.5, 0.97]) for _ in range(400)]
    width = rng.randint(1, 80)

    def cost(rows: int) -> float:
        return 0.1 + base + slope * rows + jump * (rows // tile)

    def chances(seq: int, position: int) -> float:
        return turns[(position // width + seq) % len(turns)]

    num_seqs, drafting = rng.choice([1, 2, 5, 16, 40]), rng.choice([0.0, 0.0, 0.3, 5.0])
    run, plain = Run(cost, chances, num_seqs, None, drafting, seed=seed), cost(num_seqs)
    for count in range(1, 401):
        run.step()
        lost = run.time - plain * sum(run.positions) / num_seqs
        # the last two: what one step may cost more than was ever measured, and a plain step's share for it
        assert lost <= (ALLOWANCE + FOR_PROBES) * run.time + MOST_LOST * plain + jump * (1 + 5 * num_seqs // tile) + 1e-6, count
    rate = sum(run.positions) / run.time
    assert rate >= 0.96 * num_seqs / plain


@pytest.mark.parametrize("num_seqs", [1, 16])
def test_noise_costs_little(num_seqs: int) -> None:
    for cost in COSTS.values():
        for text in TEXTS.values():
            noisy = Run(cost, text, num_seqs, noise=0.1, seed=3).rate(400 * num_seqs)
            assert noisy >= 0.96 * num_seqs / cost(num_seqs)


@pytest.mark.parametrize("seed", range(3))
def test_one_conversation_after_the_other_on_a_machine_whose_speed_changes(seed: int) -> None:
    """96 tokens of each, of which hardly any is foreseen or two in five are; the machine is up to a third slower or faster for
    a while. One kind costs no more than 3 %, the other brings nearly what the best fixed number does."""

    def rates(fixed: int | None) -> list[float]:
        rng, drift, chance = random.Random(seed), 0.0, 0.0
        run = Run(lambda rows: math.exp(drift) * (10 + 0.1 * rows), lambda *_: chance, 1, fixed, 1.0, seed=seed)
        used = {0.02: 0.0, 0.4: 0.0}
        for number in range(24):
            chance = 0.4 if number % 2 else 0.02
            run.lengths.forget([0])
            run.lengths.wake()
            run.positions = [0]
            while run.positions[0] < 96:
                drift, before = 0.98 * drift + 0.04 * rng.gauss(0, 1), run.time
                run.drafting = math.exp(drift)
                run.step()
                used[chance] += (run.time - before) * math.exp(-drift)
        return [12 * 96 / seconds for seconds in used.values()]

    hopeless, fair = rates(None)
    assert hopeless >= 0.97 * rates(0)[0]
    assert fair >= 0.95 * max(rates(fixed)[1] for fixed in range(MOST + 1))


def test_it_comes_back_when_the_text_begins_to_repeat_itself() -> None:
    """Sixteen sequences, for which drafts pay if nearly all are right."""
    run = Run(COSTS["waits for memory"], lambda seq, position: 0.97 if position >= 500 else 0.0, 16)
    while min(run.positions) < 500:
        run.step()
    assert sum(run.drafted[-300:]) == 0  # looked at, never tried
    for _ in range(20):
        run.step()
    assert max(run.drafted[-5:]) >= 3 * 16


@pytest.mark.parametrize(("tries", "drafts"), [(20, 1), (2000, 0)])
def test_a_bad_beginning_of_a_model_is_no_verdict(tries: int, drafts: int) -> None:
    """Three of ten are right, and a third of a step is what a draft takes: few tries leave it open whether that pays."""
    lengths = DraftLengths()
    for _ in range(ENOUGH):
        lengths.ran(1, 0, 1, 1.0, 0.0)
    lengths.choose([-1], [1], [0])
    for _ in range(ENOUGH + 1):
        lengths.drafted(0.33, 1, [0])
        lengths.costs.add(1, 1, 1.0)
    for place in range(tries):
        lengths.judge(place, int(place % 10 in (2, 5, 8)), 1)
    lengths.wake()
    lengths.choose([-1], [1], [0])
    assert lengths.mean_length == drafts  # a probe does not count


def test_a_model_is_tried_again_at_a_bounded_cost() -> None:
    run = Run(COSTS["waits for memory"], lambda seq, position: 0.97 if position >= 600 else 0.0, 1, drafting=2.0)
    while run.positions[0] < 600:
        run.step()
    assert 0 < sum(run.drafted[-400:]) < 30
    for _ in range(400):
        run.step()
    assert sum(run.drafted[-20:]) > 40


def test_a_model_whose_first_pass_is_slow_is_used_all_the_same() -> None:
    """Steps of 10 without drafts; 5 for a drafted token, but 27 at first."""
    run = Run(COSTS["waits for memory"], TEXTS["repetitive"], 1, drafting=27.0)
    while not sum(run.drafted):
        run.step()
    run.drafting = 5.0
    for _ in range(100):
        run.step()
    assert sum(run.drafted[-20:]) > 20


def test_one_slow_step_is_not_believed_for_ever() -> None:
    run = Run(COSTS["waits for memory"], TEXTS["repetitive"], 1)
    while not run.drafted or not run.drafted[-1]:
        run.step()
    lengths = run.lengths
    for num_drafted in range(1, MOST + 1):
        lengths.costs.add(1, num_drafted, 200.0)  # twenty times what it should be
    for _ in range(2 * DOUBTED):
        run.step()
    assert sum(run.drafted[-20:]) > 60


def test_what_a_draft_model_has_missed_is_computed_where_it_pays_back() -> None:
    """A step of 10 in which a drafted token costs nothing; 0.5 for each token that was missed."""
    lengths = DraftLengths()
    for _ in range(10):
        lengths.ran(1, 0, 1, 10.0, 0.0)
        lengths.choose([0], [4], [0])
    for _ in range(2):
        lengths.drafted(1.0, 1, [0])
    lengths.drafted(51.0, 1, [100])
    for _ in range(30):
        lengths.judge(0, 4, 4)
        lengths.ran(1, 4, 5, 10.0, 0.0)
        lengths.ran(1, 0, 1, 10.0, 0.0)
    lengths.wake()
    assert sum(lengths.choose([0], [4], [0])) == 4
    assert sum(lengths.choose([0], [4], [100])) == 4  # 50 lost once, over 32 steps
    lengths.drafted(51.0, 4, [100])
    before = lengths.accounts[1]
    lengths.ran(1, 4, 5, 10.0, 51.0)
    assert lengths.accounts[1] >= before
    assert sum(lengths.choose([0], [4], [10_000])) == 0


def test_a_model_whose_drafts_have_won_drafts_as_much_again() -> None:
    """For the same sequences in the next steps, as far as there is room and nothing was missed; then it is decided anew."""
    run = Run(COSTS["waits for memory"], TEXTS["repetitive"], 2, drafting=0.5)
    while run.positions[0] < 200:
        run.step()
    lengths = run.lengths
    lengths.wake()
    assert lengths.choose([0, 1], [5, 5], [0, 0]) == [5, 5]
    for _ in range(100):
        lengths.judge(1, 0, 5)
    assert [lengths.choose([0, 1], [5, 3], [0, 0]) for _ in range(AGAIN)] == [[5, 3]] * AGAIN
    assert lengths.choose([0, 1], [5, 5], [0, 0])[1] < 5
    for others, missed in (([0, 2], [0, 0]), ([0, 1], [0, 1000])):
        for _ in range(100):
            lengths.judge(1, 5, 5)
        lengths.wake()
        assert lengths.choose([0, 1], [5, 5], [0, 0]) == [5, 5]
        for _ in range(100):
            lengths.judge(others[1], 0, 5)
        assert lengths.choose(others, [5, 5], missed)[1] < 5


def test_what_many_have_lost_holds_nobody_up_who_is_alone() -> None:
    """Sixteen sequences whose drafts are dear and wrong, and then one whose drafts are right."""
    lengths, lowest = DraftLengths(), 1.0
    for _ in range(50):
        counts = lengths.choose(range(16), [4] * 16, [0] * 16)
        if max(counts):
            lengths.drafted(100.0, max(counts), [0])
            lengths.judge(0, 0, 1)
        lengths.ran(16, sum(counts), 16, 50.0 + 10 * sum(counts), 100.0 * max(counts))
        lowest = min(lowest, lengths.accounts.get(16, 0.0))
    assert lowest < 0
    drafted = 0
    for _ in range(60):
        (count,) = lengths.choose([99], [4], [0])
        if count:
            lengths.drafted(0.5 * count, count, [0])
            lengths.judge(99, count, count)
        lengths.ran(1, count, 1 + count, 10.0, 0.5 * count)
        drafted += count
    assert drafted > 60


def test_a_batch_that_shrinks_has_no_account_for_each_of_its_sizes() -> None:
    lengths = DraftLengths()
    for num_seqs in range(16, 8, -1):
        for _ in range(20):
            counts = lengths.choose(range(num_seqs), [4] * num_seqs, [0] * num_seqs)
            if max(counts):
                lengths.drafted(5.0, max(counts), [0])
                for seq, count in enumerate(counts):
                    lengths.judge(seq, 0, count)
            lengths.ran(num_seqs, sum(counts), num_seqs, 50.0 + 10 * sum(counts), 5.0 * bool(max(counts)))
    assert list(lengths.accounts) == [16]


def checked_costs() -> StepCosts:
    """A step of two takes 10, and 12 with two tokens on trial; how often one goes without drafts is seen on the way."""
    costs = StepCosts()
    for _ in range(ENOUGH):
        costs.add(2, 0, 10.0)
    for num_steps in (FIRST_CHECK, 2 * FIRST_CHECK, 4 * FIRST_CHECK, FRESH, FRESH):
        for _ in range(num_steps):
            assert costs.plain(2) == pytest.approx(10.0)
            costs.add(2, 2, 12.0)
        assert costs.plain(2) is None
        costs.add(2, 0, 10.0)
    return costs


def test_a_step_without_drafts_is_due_now_and_then() -> None:
    assert checked_costs().plain(2) == pytest.approx(10.0)


def test_a_step_that_was_taken_for_slower_than_it_is_does_not_make_drafts_look_cheap_for_ever() -> None:
    costs = checked_costs()
    for _ in range(20):
        costs.add(4, 0, 30.0)  # the machine was busy
    for _ in range(NEAR):
        costs.add(4, 4, 24.0)
    assert costs.measured(4, 4) == 1.0
    costs.add(4, 0, 26.0)  # behind few: one quick step alone says nothing
    assert costs.measured(4, 4) == 1.0
    assert costs.plain(4) > 26.0
    for _ in range(NEAR + 1):
        costs.add(4, 8, 28.0)
    assert costs.measured(4, 8) == 1.0
    costs.add(4, 0, 20.0)
    assert costs.plain(4) == 20.0
    assert costs.measured(4, 8) == pytest.approx(1.4)
    assert costs.ratios(4, 4)[0].tolist() == [1.0] * 4  # forgotten: as good as it may be
    assert costs.measured(2, 2) == pytest.approx(1.2)


@pytest.mark.parametrize("num_seqs", [1, 4, 16])
def test_a_busy_machine_at_the_start_costs_little(num_seqs: int) -> None:
    """Steps without drafts seem to take nearly twice as long as they do, and drafts do not pay."""
    run = Run(lambda rows: 10 + 0.6 * rows, lambda *_: 0.3, num_seqs, drafting=3.0, seed=1)
    for _ in range(ENOUGH):
        run.lengths.costs.add(num_seqs, 0, 1.8 * run.cost(num_seqs))
    assert run.rate(400 * num_seqs) >= 0.95 * num_seqs / run.cost(num_seqs)


def test_where_the_cost_of_drafts_is_known_steps_with_drafts_tell_how_fast_the_machine_is() -> None:
    costs = checked_costs()
    for _ in range(NEAR):
        costs.add(2, 2, 12.0)
    for _ in range(FRESH - NEAR - 2):
        costs.add(2, 2, 24.0)  # twice as slow now
    assert costs.plain(2) == pytest.approx(20.0, rel=0.05)
    assert costs.measured(2, 2) == pytest.approx(1.2)


class Foreseen(Proposer):
    """Drafts what a greedy model would say."""

    foretells = True

    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        drafts = {}
        for seq, count in wanted.items():
            tokens = seq.tokens.copy()
            for _ in range(count):
                seq.tokens.append(greedy(seq))
            drafts[seq] = Draft(seq.tokens[len(tokens) :])
            seq.tokens = tokens
        return drafts


@pytest.mark.parametrize(("per_row", "drafts"), [(0.0, True), (1.0, False)])
def test_through_the_scheduler(per_row: float, drafts: bool) -> None:
    """Drafts that are always right, on a device that waits and on one that computes: 1 for a step and `per_row` a row."""
    now = [0.0]
    proposer = Foreseen(SpeculativeConfig("ngram", 4))
    simulation = Simulation(256, proposer=proposer, next_token=greedy, clock=lambda: now[0], max_num_batched_tokens=512)
    begin = simulation.begin

    def timed(batch, tokens=None) -> None:
        now[0] += (0.01 if per_row else 1.0) + per_row * len(batch.input_ids)
        begin(batch, tokens)

    simulation.begin = timed
    for number in range(4):
        simulation.add([number] * 5, max_tokens=100)
    simulation.run()
    share = simulation.scheduler.num_accepted_tokens / simulation.scheduler.num_generation_tokens
    assert simulation.scheduler.num_accepted_tokens == simulation.scheduler.num_draft_tokens
    assert (share > 0.6) == drafts
    assert share < 0.4 or drafts  # which cost nothing while they are right, but bring nothing either
    assert simulation.drafter.mean_length > 0 or not drafts


def test_no_drafts_beside_prompts() -> None:
    """A step with a part of a prompt computes all the time, so each token on trial in it costs."""
    now = [0.0]
    proposer = Foreseen(SpeculativeConfig("ngram", 4))
    simulation = Simulation(256, proposer=proposer, next_token=greedy, clock=lambda: now[0], max_num_batched_tokens=16)
    begin = simulation.begin

    def timed(batch, tokens=None) -> None:
        now[0] += 1.0
        begin(batch, tokens)

    simulation.begin = timed
    simulation.add([1, 2, 3], max_tokens=200)
    seen = []
    for number in range(60):
        if number % 10 == 9:
            simulation.add([number] * 40, max_tokens=1)
        decision = simulation.step()
        is_prompt = any(seq.num_output_tokens == 0 for seq in decision.scheduled) or len(decision.scheduled) > 1
        seen.append((is_prompt, bool(decision.drafts)))
    assert (True, True) not in seen
    assert (False, True) in seen


def test_what_does_not_pay_for_many_says_nothing_of_one() -> None:
    """A draft model reads a prompt along where drafts have paid with as many sequences, whatever they cost others."""
    lengths = DraftLengths()
    for _ in range(60):
        lengths.ran(1, 0, 1, 0.01, 0.0)
        lengths.ran(32, 0, 32, 0.05, 0.0)
    lengths.choose(list(range(32)), [0] * 32, [0] * 32)
    for _ in range(200):
        if counts := [n for n in lengths.choose(list(range(32)), [3] * 32, [0] * 32) if n]:
            lengths.drafted(0.5, max(counts), [0])
            lengths.ran(32, sum(counts), 32, 0.6, 0.0)
    assert not lengths.pays(32)
    assert lengths.pays(1)
