"""Block hashes against a radix tree (--prefix-cache radix) on the same traces: what is found, and what that costs the host.

No model runs: prompts come one after the other, and count as computed.

  chats      8 chats that begin alike, in turns; a prompt is the whole chat so far
  documents  96 questions, each behind one of 16 documents
  edits      one text 64 times, each time with a few tokens changed somewhere
Memory is ample, or short: a third of the blocks that hashes keep in ample memory.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

from ..attention.block_manager import BlockManager
from ..attention.radix_manager import RadixBlockManager
from ..core.simulated.cache_trace import TRACES, replay
from .report import Parser, finish, one_line_errors, show_table, spread, tracked

CACHES: dict[str, type[BlockManager]] = {"hashes of blocks": BlockManager, "radix tree": RadixBlockManager}


def look_up(cache: str, trace: str, size: int, short: bool, repeats: int) -> dict[str, Any]:
    """The share of a trace's tokens that is "found", microseconds of the "host" for a block of a prompt, and at the end KV
    slots "kept", and bytes of Python's memory in the "index" for each of them."""
    prompts = list(TRACES[trace](random.Random(2)))
    blocks = sum(-(-len(prompt) // size) for prompt in prompts)
    needed, times = blocks + 2, []
    if short:
        replay(by_hash := BlockManager(needed, size), prompts)
        needed = max(len(by_hash.prefix_cache or ()) // 3, -(-max(map(len, prompts)) // size) + 2)
    for _ in range(repeats):
        manager, start = CACHES[cache](needed, size), time.thread_time()
        replay(manager, prompts)
        times.append(1e6 * (time.thread_time() - start) / blocks)
    manager = CACHES[cache](needed, size)
    tracemalloc.start()
    found = replay(manager, prompts) / sum(map(len, prompts))
    kept, held = size * len(manager.prefix_cache or ()), tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    case = {"trace": trace, "memory": "short" if short else "ample", "block_size": size, "cache": cache}
    return case | {"found": found, "host": spread(times), "kept": kept, "index": held / kept}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("radix", __doc__)
    parser.add_flag("--block-sizes", [16, 64], "tokens in a block", metavar="N")
    parser.add_flag("--repeats", 9, "runs that are timed; the median counts")
    args = parser.parse_args(argv)
    cases = [(c, t, n, short) for t in TRACES for n in args.block_sizes for short in (False, True) for c in CACHES]
    with one_line_errors():
        results = [look_up(*case, args.repeats) for case in tracked(cases, "traces")]
    rows = []
    for of in results:
        numbers = f"{of['found']:.1%}", f"{of['host']['median']:.1f}", of["kept"], f"{of['index']:.0f}"
        rows.append([f"{of['trace']}, blocks of {of['block_size']}, memory {of['memory']}", of["cache"], *numbers])
    show_table("Two prefix caches", ["trace", "cache", "found", "µs a block", "slots kept", "index, bytes a slot"], rows)
    finish(args, "radix", results)


if __name__ == "__main__":
    main()
