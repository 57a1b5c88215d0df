"""What the warm-up's four ideas cost on this machine: ``make warm-up``. All that it prints is measured or counted now."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.stage0_warm_up.warm_up import attend, floor_seconds, generate, static_batches

WIDTH, VOCABULARY, PROMPT = 256, 512, 64
LENGTHS = (16, 64, 256)
"""New tokens."""
SIDE, SQUARE = 5120, 1024
"""Of the matrix that stands for a model's weights, larger than most processors' caches, and of one for the rate alone."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Model:
    """One layer of attention with random weights, which is all that the costs need."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, WIDTH)
        self.query, self.key, self.value = torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5

    def naive(self, tokens: Sequence[int]) -> int:
        """The next token, from the whole text; the keys and values of all tokens are computed again."""
        hidden = self.embedding[list(tokens)]
        scores = torch.softmax(hidden @ self.key @ (hidden[-1] @ self.query) / WIDTH**0.5, dim=0)
        return self.choose(scores @ (hidden @ self.value))

    def cached(self) -> Callable[[Sequence[int]], int]:
        """The same with your KV cache: each token's key and value are computed once."""
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def step(tokens: Sequence[int]) -> int:
            mixed = self.embedding[0]
            for token in tokens[len(keys) :]:
                hidden = self.embedding[token]
                mixed = attend(hidden @ self.query, hidden @ self.key, hidden @ self.value, keys, values)
            return self.choose(mixed)

        return step

    def choose(self, mixed: Tensor) -> int:
        return int((self.embedding @ mixed).argmax())


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median of some runs, after one that does not count."""
    work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def loops() -> None:
    """The naive loop and the cache: rows of tokens whose keys are computed, and time."""
    model, prompt = Model(), [token % VOCABULARY for token in range(PROMPT)]
    print(f"1, 2. A loop with and without a KV cache, prompt of {PROMPT} tokens, one layer of width {WIDTH}")
    print(f"{'new tokens':>12}{'naive keys':>12}{'cached keys':>13}{'naive ms':>10}{'cached ms':>11}")
    for count in LENGTHS:
        rows = sum(PROMPT + index for index in range(count))
        naive = seconds(lambda count=count: generate(model.naive, prompt, count), 3)
        cached = seconds(lambda count=count: generate(model.cached(), prompt, count), 3)
        print(f"{count:>12}{rows:>12,}{PROMPT + count - 1:>13,}{1000 * naive:>10.1f}{1000 * cached:>11.1f}")
    print("The keys say what a large model pays. Here a layer is so small that Python's own time counts as well.\n")


def roofline() -> None:
    """This machine's two limits, and a layer of weights at several batch sizes beside them."""
    weights, square = torch.randn(SIDE, SIDE), torch.randn(SQUARE, SQUARE)
    flat = weights.flatten()
    bandwidth = flat.nbytes / seconds(lambda: torch.dot(flat, flat))
    rate = 2 * SQUARE**3 / seconds(lambda: square @ square)
    print(f"3. This machine reads {bandwidth / 1e9:.1f} GB/s and multiplies {rate / 1e9:.0f} GFLOP/s (float32, {threads()})")
    print(f"   Some rows times {weights.nbytes / 1e6:.0f} MB of weights:")
    print(f"{'batch':>12}{'floor ms':>12}{'measured ms':>13}{'ms a row':>10}")
    for batch in BATCHES:
        rows = torch.randn(batch, SIDE)
        floor = floor_seconds(weights.nbytes, 2 * batch * SIDE * SIDE, bandwidth, rate)
        taken = seconds(lambda rows=rows: torch.nn.functional.linear(rows, weights))
        print(f"{batch:>12}{1e3 * floor:>12.1f}{1e3 * taken:>13.1f}{1e3 * taken / batch:>10.2f}")
    print(f"Reading and computing take the same time at a batch of {rate * weights.element_size() / (2 * bandwidth):.0f}.\n")


def batches() -> None:
    """Static batches of random answers: what the seats are worth."""
    rng = random.Random(0)
    lengths = [max(1, int(rng.lognormvariate(4, 1))) for _ in range(256)]
    print(f"4. Static batches: {len(lengths)} answers of {min(lengths)} to {max(lengths)} tokens")
    print(f"{'batch':>12}{'steps':>12}{'seats used':>13}")
    for batch in BATCHES:
        steps, used = static_batches(lengths, batch)
        print(f"{batch:>12}{steps:>12,}{100 * used:>12.0f}%")
    print("The empty seats are what stage 2 gives away.")


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def main() -> int:
    try:
        for part in (loops, roofline, batches):
            part()
    except NotImplementedError as error:
        print(f"\nFrom here on your code is needed. {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
