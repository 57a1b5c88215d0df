"""Task 3.10 ★: blocks of a prompt go from the engine that has computed them to the one that writes the answer."""

from __future__ import annotations

import random
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.attention.handover import Handover
from stages.attention.tiered_manager import LeavingBlocks
from stages.batching.sampling_params import SamplingParams
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.memory.transfer.block_wire import BadRowError, checksum, send_rows, take
from stages.memory.transfer.outbox import Outbox

SIZE, ROW_BYTES = 4, 8
IDENTITY = b"i" * 32
PATIENCE = 20.0
"""Seconds that a test waits for the other end of a wire."""


class Engine:
    """What a handover sees of an engine: a prefix cache, and blocks that can be read. Block b holds the bytes b, b, b, …

    Attributes:
        read: blocks of each call of ``rows.read``. stored: how many rows each call of `store` has brought.
    """

    def __init__(self, room: int = 100) -> None:
        self.cache, self.read, self.stored, self.now = LeavingBlocks(SIZE), list[list[int]](), list[int](), 0.0
        self.outbox = Outbox(room * ROW_BYTES, ROW_BYTES, 60.0, clock=lambda: self.now)
        store = self.outbox.store
        self.outbox.store = lambda hashes, rows, age=0.0: (self.stored.append(len(rows)), store(hashes, rows))[1]
        manager: Any = SimpleNamespace(prefix_cache=self.cache, block_size=SIZE, rows=SimpleNamespace(read=self._read))
        self.handover, self._next = Handover(manager, self.outbox), 0

    def _read(self, blocks: list[int]) -> Tensor:
        self.read.append(list(blocks))
        return torch.tensor(blocks, dtype=torch.uint8)[:, None].repeat(1, ROW_BYTES)

    def step(self, seq: Sequence, count: int) -> None:
        """A step in which a sequence computes so many tokens: the cache is told of its blocks before, the handover after."""
        first, last = seq.num_computed_tokens // SIZE, (seq.num_computed_tokens + count) // SIZE
        for block_hash in self.cache.block_hashes(seq, last)[first:last]:
            if self.cache.block_of(block_hash) is None:
                self.cache.insert(block_hash, self._next)
                self._next += 1
        seq.num_computed_tokens += count
        self.handover.on_step(SchedulerOutput(scheduled={seq: count}), 0.0)

    def there(self, seq: Sequence) -> list[int]:
        """What the outbox has of a sequence, as the numbers of blocks, from the first on."""
        taken = self.outbox.take(self.cache.block_hashes(seq, len(seq.tokens) // SIZE))
        return [int(rows.wait()[0][index][0]) for _, rows, index in taken]


def prompt(length: int, seq_id: int = 0, cached: int = 0, **params: Any) -> Sequence:
    """A sequence of which the first `cached` tokens were found in the prefix cache."""
    seq = Sequence(seq_id, list(range(length)), SamplingParams(max_tokens=9, **params))
    seq.num_computed_tokens = seq.num_cached_tokens = cached
    return seq


# ------------------------------------------------------------------------------------------------- what goes


@pytest.mark.parametrize(("length", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (16, 3), (17, 4)])
def test_a_prompt_without_its_last_token_goes(length: int, blocks: int) -> None:
    """Prompts of 1 to 17 tokens in blocks of 4, computed in one step.

    Why: who goes on computes the last token anew, for its logits. The block that it lies in would be written twice.
    """
    engine, seq = Engine(), prompt(length)
    engine.step(seq, length)
    check_equal(engine.there(seq), list(range(blocks)), "blocks in the outbox")
    check_equal(engine.read, [list(range(blocks))] if blocks else [], "blocks that were read, by call")


@pytest.mark.parametrize(
    ("chunks", "blocks"),
    [((6, 5, 8), [[0], [1], [2, 3]]), ((8, 4, 7), [[0, 1], [2], [3]]), ((4, 1, 3, 11), [[0], [1], [2, 3]])],
)
def test_each_chunk_brings_what_it_has_filled(chunks: tuple[int, ...], blocks: list[list[int]]) -> None:
    """A prompt of 19 tokens in chunks that end in a block or with one, and then six tokens that are written.

    Why: sent at the end, all blocks travel while nobody computes. Sent with every step, the first ones travel a hundred times.
    """
    engine, seq = Engine(), prompt(19)
    for count in chunks:
        engine.step(seq, count)
    for token in (7, 7, 7, 7, 7, 7):
        seq.append_token(token)
        engine.step(seq, 1)
    check_equal(engine.read, blocks, "blocks that were read, by call")
    check_equal(engine.stored, [len(each) for each in blocks], "rows that were stored, by call")
    check_equal(engine.there(seq), [0, 1, 2, 3], "blocks in the outbox")
    engine.outbox.release(engine.cache.block_hashes(seq, 4))
    check_equal(engine.there(seq), [], "blocks when the one request has fetched them")


def test_what_was_found_goes_with_the_first_step() -> None:
    """A second prompt of which two blocks were in the prefix cache: they go with what its first step computes.

    Why: the other engine has not got them. A long system prompt is found here every time, and would never arrive there.
    """
    engine, first = Engine(), prompt(9)
    engine.step(first, 9)
    engine.outbox.release(engine.cache.block_hashes(first, 2))
    check_equal(engine.there(first), [], "blocks in the outbox when they have been fetched")
    second = prompt(17, seq_id=1, cached=8)
    engine.step(second, 5)
    check_equal(engine.there(second), [0, 1, 2], "blocks in the outbox behind its first step")
    engine.step(second, 4)
    check_equal(engine.there(second), [0, 1, 2, 3], "blocks in the outbox behind its second step")
    check_equal(engine.read, [[0, 1], [0, 1, 2], [3]], "blocks that were read, by call")


def test_a_long_beginning_that_was_found_goes_too() -> None:
    """A prompt of 410 tokens, of which 400 were in the prefix cache: all of its blocks go with its first step.

    Why: a system prompt is long, and it is the very part that is always found.
    """
    engine, first = Engine(room=300), prompt(410)
    engine.step(first, 410)
    engine.outbox.release(engine.cache.block_hashes(first, 102))
    second = prompt(410, seq_id=1)
    second.num_computed_tokens, second.num_cached_tokens = 400, len(range(400))
    engine.step(second, 10)
    check_equal(engine.there(second), list(range(102)), "blocks in the outbox")


def test_a_block_that_is_there_is_lent_twice() -> None:
    """Three equal prompts: the blocks are stored once, and are there until all three have been fetched.

    Why: stored again they cost their bytes again; lent once, the second request finds that the first has taken them away.
    """
    engine = Engine()
    for number in range(3):
        seq = prompt(13, number, cached=12 if number else 0)
        engine.step(seq, 1 if number else 13)
    hashes = engine.cache.block_hashes(seq, 3)
    check_equal(engine.stored, [3], "rows that were stored, by call")
    for number in (1, 2):
        engine.outbox.release(hashes)
        check_equal(engine.there(seq), [0, 1, 2], f"blocks when {number} of the three requests have fetched them")
    engine.outbox.release(hashes)
    check_equal(engine.there(seq), [], "blocks when all have")


def test_what_is_there_is_lent_whatever_the_cache_knows() -> None:
    """The prefix cache has forgotten the second of three blocks in the outbox when an equal prompt has been computed.

    Why: the row is there, and good. Without a lease it goes with the first request, and the second one is sent a part.
    """
    engine, first, second = Engine(), prompt(13), prompt(13, seq_id=1)
    engine.step(first, 13)
    engine.cache.forget(1)
    second.num_computed_tokens = 13
    engine.handover.on_step(SchedulerOutput(scheduled={second: 13}), 0.0)
    check_equal((engine.read, engine.outbox.stats.num_skipped), ([[0, 1, 2]], 0), "blocks that were read, and num_skipped")
    engine.outbox.release(engine.cache.block_hashes(first, 3))
    check_equal(engine.there(second), [0, 1, 2], "blocks when the first request has fetched them")


def test_a_full_outbox_takes_the_first_ones() -> None:
    """There is room for two blocks of four; the next request finds none at all.

    Why: a consumer takes a prefix. The last blocks of a prompt are worth nothing without its first.
    """
    engine, seq = Engine(room=2), prompt(17)
    engine.step(seq, 17)
    check_equal(engine.there(seq), [0, 1], "blocks in the outbox")
    check_equal(engine.outbox.stats.num_skipped, 2, "num_skipped")
    other = Sequence(1, [50, 51, 52, 53, 54], SamplingParams())
    engine.step(other, 5)
    check_equal((engine.read, engine.stored), ([[0, 1]], [2]), "calls of read and store")
    check_equal(engine.outbox.stats.num_skipped, 3, "num_skipped")


def test_a_block_that_was_reused_ends_it() -> None:
    """The prefix cache has forgotten the second of three blocks when the step has run.

    Why: what is in that block now is somebody else's. Behind it nothing is of use.
    """
    engine, seq = Engine(), prompt(13)
    engine.cache.insert(engine.cache.block_hashes(seq, 3)[0], 0)
    engine.cache.insert(engine.cache.block_hashes(seq, 3)[2], 2)
    seq.num_computed_tokens = 13
    engine.handover.on_step(SchedulerOutput(scheduled={seq: 13}), 0.0)
    check_equal(engine.read, [[0]], "blocks that were read, by call")


def test_who_reads_its_prompt_hands_nothing_over() -> None:
    """A request for the log-probabilities of its prompt.

    Why: the other engine has to compute all of such a prompt, and would fetch blocks to throw them away.
    """
    engine, seq = Engine(), prompt(13, prompt_logprobs=1)
    engine.step(seq, 13)
    check_equal((engine.there(seq), engine.read), ([], []), "blocks in the outbox, and those that were read")


# -------------------------------------------------------------------------------------------------- the outbox


def test_a_lease_lasts_from_when_the_block_was_last_wanted() -> None:
    """Leases of 10 seconds: two blocks are stored at 0 and one is wanted again at 9. At 10 the other one goes; at 18 the first
    is there, at 19 it is gone with both leases.

    Why: who asks just before the end would find nothing. And who never comes may not keep it for ever, nor others behind it.
    """
    now = 0.0
    outbox = Outbox(100, ROW_BYTES, 10.0, clock=lambda: now)
    outbox.store([b"a", b"b"], torch.zeros(2, ROW_BYTES, dtype=torch.uint8))
    now = 9.0
    check_equal(outbox.lease(b"a"), True, "whether it is here at 9 s")
    for now, here in ((9.0, (1, 1)), (10.0, (1, 0)), (18.0, (1, 0)), (19.0, (0, 0))):  # the outbox's clock
        outbox.expire()
        check_equal((len(outbox.take([b"a"])), len(outbox.take([b"b"]))), here, f"blocks a and b at {now:g} s")
    check_equal(outbox.stats.num_expired, 2, "blocks that nobody has come for")


class Model:
    """An outbox in a dictionary: hash → [leases, until]."""

    def __init__(self) -> None:
        self.kept: dict[bytes, list[float]] = {}
        self.expired = self.sent = 0

    def prefix(self, hashes: list[bytes]) -> list[bytes]:
        gone = next((at for at, each in enumerate(hashes) if each not in self.kept), len(hashes))
        return hashes[:gone]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_leases_are_those_of_a_dictionary(data: st.DataObject) -> None:
    """Any order of storing, lending, fetching and waiting, of six blocks with leases of 10 seconds.

    Why: a lease too many is memory that never comes back; one too few, and a request computes what was there.
    """
    now, model = [0.0], Model()
    outbox = Outbox(1000, ROW_BYTES, 10.0, clock=lambda: now[0])
    names = [bytes([65 + number]) for number in range(6)]
    check_equal(outbox.take(names), [], "what is taken when nothing is there")
    for _ in range(data.draw(st.integers(1, 25))):
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        what = data.draw(st.sampled_from(["store", "lease", "release", "expire", "wait"]))
        if what == "store":
            fresh = [name for name in chosen if name not in model.kept]
            if fresh:
                outbox.store(fresh, torch.tensor([[name[0]] * ROW_BYTES for name in fresh], dtype=torch.uint8))
                model.kept.update({name: [1, now[0] + 10] for name in fresh})
        elif what == "lease":
            check_equal(outbox.lease(chosen[0]), chosen[0] in model.kept, f"whether {chosen[0]} is here")
            if chosen[0] in model.kept:
                model.kept[chosen[0]] = [model.kept[chosen[0]][0] + 1, now[0] + 10]
        elif what == "release":
            outbox.release(chosen)
            model.sent += len(chosen)
            for name in chosen:
                if name in model.kept:
                    model.kept[name][0] -= 1
                    if not model.kept[name][0]:
                        del model.kept[name]
        elif what == "expire":
            outbox.expire()
            late = [name for name, (_, until) in model.kept.items() if until <= now[0]]
            model.expired += len(late)
            for name in late:
                del model.kept[name]
        else:
            now[0] += data.draw(st.sampled_from([1.0, 5.0, 10.0]))
        order = data.draw(st.permutations(names))
        taken = outbox.take(order)
        check_equal([name for name, _, _ in taken], model.prefix(order), f"what is taken of {order}")
        for name, rows, index in taken:
            check_equal(rows.wait()[0][index].tolist(), [name[0]] * ROW_BYTES, f"the row of {name}")
    stats = outbox.stats
    found = stats.num_sent, stats.sent_bytes, stats.num_expired
    check_equal(found, (model.sent, model.sent * ROW_BYTES, model.expired), "num_sent, sent_bytes, num_expired")


def test_memory_comes_back_when_nobody_holds_it() -> None:
    """Two blocks of one step, of which one is being sent when both have been fetched: then they are gone, and their bytes are
    in use until it has been sent.

    Why: memory that is counted as free while a socket reads it is memory that the engine takes twice.
    """
    outbox = Outbox(4 * ROW_BYTES, ROW_BYTES, 10.0, clock=lambda: 0.0)
    outbox.store([b"a", b"b"], torch.zeros(2, ROW_BYTES, dtype=torch.uint8))
    held = outbox.take([b"a"])
    outbox.release([b"a", b"b"])
    check_equal((len(outbox), outbox.most_rows), (0, 2), "blocks, and rows that there is room for, while one is held")
    del held
    check_equal(outbox.most_rows, 4, "rows that there is room for")


# ---------------------------------------------------------------------------------------------------- the wire


def drawn(count: int, seed: int = 0) -> list[tuple[bytes, Tensor]]:
    """Blocks with random hashes and rows."""
    rng = random.Random(seed)
    return [(rng.randbytes(32), torch.tensor(list(rng.randbytes(ROW_BYTES)), dtype=torch.uint8)) for _ in range(count)]


class Wire:
    """A consumer that takes blocks, and a producer in a thread that sends them, or something else.

    Attributes:
        counts: what the producer has read.
    """

    def __init__(self, shared: bool = False, row_bytes: int = ROW_BYTES) -> None:
        self.shared, self._row_bytes, self._rows, self.counts = shared, row_bytes, list[tuple[bytes, Tensor]](), list[int]()

    @property
    def kept(self) -> list[tuple[bytes, list[int]]]:
        """What the consumer was given, as it is by now."""
        return [(block_hash, row.tolist()) for block_hash, row in self._rows]

    def run(
        self, hashes: list[bytes], send: Callable[[socket.socket], object], is_wanted: Callable[[], bool] = lambda: True,
        dies: bool = False,
    ) -> None:  # fmt: skip
        """Take these, of a producer that reads how many are wanted, does what `send` says, and reads how many have come, unless
        it dies before."""
        here, there = socket.socketpair()
        here.settimeout(PATIENCE)
        there.settimeout(PATIENCE)
        thread = threading.Thread(target=self._produce, args=(there, send, dies), daemon=True)
        thread.start()
        try:
            with here:
                take(here, IDENTITY, hashes, self._row_bytes, False, self.shared, self._keep, is_wanted)
        finally:
            thread.join(PATIENCE)

    def _keep(self, block_hash: bytes, row: Tensor) -> None:
        self._rows.append((block_hash, row))

    def _read(self, sock: socket.socket) -> None:
        data = b""
        while len(data) < 8 and (more := sock.recv(8 - len(data))):
            data += more
        if data:
            self.counts.append(int.from_bytes(data, "little"))

    def _produce(self, sock: socket.socket, send: Callable[[socket.socket], object], dies: bool) -> None:
        with sock, suppress(OSError):
            self._read(sock)
            send(sock)
            if not dies:
                self._read(sock)


@pytest.mark.parametrize("shared", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("count", [1, 5])
def test_blocks_arrive_in_their_order(count: int, shared: bool) -> None:
    """From the real producer: each block is kept with its row, and both ends agree how many have come.

    Why: the producer ends leases by what it is told has arrived. Told nothing, it keeps all of it until the leases end.
    """
    blocks, told = drawn(count), list[int]()
    wire = Wire(shared)
    wire.run([name for name, _ in blocks], lambda sock: told.append(send_rows(sock, IDENTITY, blocks, shared)))
    check_equal(wire.kept, [(name, row.tolist()) for name, row in blocks], "what was kept")
    check_equal((wire.counts, told), ([count], [count]), "blocks that were wanted, and those that the producer knows have come")


def packed(blocks: list[tuple[bytes, Tensor]]) -> list[bytes]:
    """What stands for each block in the stream: checksum and row."""
    return [checksum(IDENTITY, name, row.numpy().data) + bytes(row.tolist()) for name, row in blocks]


@pytest.mark.parametrize("wrong", ["a bit of the row", "another block", "another engine's", "the checksum"])
def test_a_wrong_row_is_refused_and_those_before_it_are_kept(wrong: str) -> None:
    """The third of four blocks is not what it should be.

    Why: a wrong key in one block changes an answer that looks right. What has come before it is good.
    """
    blocks = drawn(4, seed=1)
    parts = packed(blocks)
    if wrong == "a bit of the row":
        parts[2] = parts[2][:-1] + bytes([parts[2][-1] ^ 1])
    elif wrong == "another block":
        parts[2] = parts[3]
    elif wrong == "another engine's":
        parts[2] = checksum(b"o" * 32, blocks[2][0], blocks[2][1].numpy().data) + parts[2][32:]
    else:
        parts[2] = bytes([parts[2][0] ^ 1]) + parts[2][1:]
    wire = Wire()
    with pytest.raises(BadRowError):
        wire.run([name for name, _ in blocks], lambda sock: sock.sendall(b"".join(parts)))
    check_equal(wire.kept, [(name, row.tolist()) for name, row in blocks[:2]], "what was kept")
    check_equal(wire.counts, [4], "what the consumer has said: how many it wants, and nothing at the end")


def test_a_wrong_row_in_shared_memory_is_refused() -> None:
    """Rows of the right number lie there, and the second is damaged.

    Why: memory of another process is as little to be trusted as a wire: it may write on while this one reads.
    """
    blocks = drawn(3, seed=2)

    def send(sock: socket.socket) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(b"".join(part[32:] if at != 1 else bytes(ROW_BYTES) for at, part in enumerate(packed(blocks))))
            socket.send_fds(sock, [b"m"], [file.fileno()])
        sock.sendall(b"".join(part[:32] for part in packed(blocks)))

    wire = Wire(shared=True)
    with pytest.raises(BadRowError):
        wire.run([name for name, _ in blocks], send)
    check_equal(wire.kept, [(blocks[0][0], blocks[0][1].tolist())], "what was kept")


@pytest.mark.parametrize("cut", [0, 20, 32, 35, 40, 70])
def test_a_producer_that_dies_costs_only_the_rest(cut: int) -> None:
    """It sends so many bytes of three blocks of 40 and closes the connection: a ConnectionError, and whole blocks are kept.

    Why: a producer may be killed at any byte. What has come is good, and the rest is computed.
    """
    blocks = drawn(3, seed=3)
    wire = Wire()
    with pytest.raises(ConnectionError):
        wire.run([name for name, _ in blocks], lambda sock: sock.sendall(b"".join(packed(blocks))[:cut]), dies=True)
    check_equal(wire.kept, [(name, row.tolist()) for name, row in blocks[: cut // 40]], "what was kept")


@pytest.mark.parametrize("shared", [False, True], ids=["tcp", "shared memory"])
def test_nobody_waits_for_what_is_not_wanted_any_more(shared: bool) -> None:
    """The client leaves when the first of three blocks has come, which the producer goes on to send: a ConnectionError.

    Why: a thread that brings blocks for nobody keeps a place from a request that waits for its own.
    """
    blocks, wire = drawn(3, seed=4), Wire(shared)
    with pytest.raises(ConnectionError):
        wire.run([name for name, _ in blocks], lambda sock: send_rows(sock, IDENTITY, blocks, shared), lambda: not wire.kept)
    check_equal(wire.kept, [(blocks[0][0], blocks[0][1].tolist())], "what was kept")


def test_nobody_waits_for_the_rest_of_a_row() -> None:
    """A row of 512 KiB; the client leaves when half of it is on its way, and the rest comes as well: a ConnectionError.

    Why: a row of a large model is many megabytes, and a slow producer takes its time with each.
    """
    row, gone = torch.zeros(1 << 19, dtype=torch.uint8), threading.Event()

    def send(sock: socket.socket) -> None:
        sock.sendall(checksum(IDENTITY, b"n" * 32, row.numpy().data) + bytes(len(row) // 2))
        gone.set()
        sock.sendall(bytes(len(row) // 2))

    wire = Wire(row_bytes=len(row))
    with pytest.raises(ConnectionError):
        wire.run([b"n" * 32], send, lambda: not gone.is_set())
    check_equal(len(wire.kept), 0, "blocks that were kept")
