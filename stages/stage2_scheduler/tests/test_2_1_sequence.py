"""Task 2.1: what a sequence still has to compute, what it has generated, and when it ends."""

from __future__ import annotations

import random

import pytest

from stages.batching.sequence import Sequence, SequenceStatus
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import make_sequence

EOS, ALSO_EOS = 2, 3


def feed(seq: Sequence, tokens: list[int]) -> int:
    """Append tokens until the sequence says that it has ended: how many that took, 0 if it never did."""
    for count, token in enumerate(tokens, 1):
        ended = seq.append_token(token)
        if ended:
            check_equal(ended, True, "what append_token returns at the end")
            return count
        check_equal(ended, False, "what append_token returns before the end")
        check_equal((seq.finish_reason, seq.stop_reason), (None, None), "finish_reason and stop_reason before the end")
    return 0


def test_new_sequence_has_its_whole_prompt_to_compute() -> None:
    """A sequence with a prompt of 5 tokens has 5 left to compute and has generated none.

    Why: the scheduler asks every sequence the same question, how many tokens are left, and for a new one the answer is its
    prompt.
    """
    seq = make_sequence(0, [11, 12, 13, 14, 15])
    check_equal(seq.num_uncomputed_tokens, 5, "num_uncomputed_tokens")
    check_equal(seq.num_output_tokens, 0, "num_output_tokens")
    check_equal(seq.output_token_ids, [], "output_token_ids")


@pytest.mark.parametrize("computed", [1, 4, 5])
def test_chunks_shrink_what_is_left(computed: int) -> None:
    """With `computed` of 5 prompt tokens in the cache, 5 − computed are left, and still none is generated.

    Why: a long prompt is computed in chunks over several steps; what is left decides the size of the next chunk.
    """
    seq = make_sequence(0, 5)
    seq.num_computed_tokens = computed
    check_equal(seq.num_uncomputed_tokens, 5 - computed, "num_uncomputed_tokens")
    check_equal(seq.num_output_tokens, 0, "num_output_tokens")


def test_decoding_has_one_token_to_compute() -> None:
    """After the prompt is computed and a token sampled, exactly this token is left, at every step anew.

    Why: a sampled token has no key and value yet; they are made in the next step. This is all that "decoding" is.
    """
    seq = make_sequence(0, [11, 12, 13])
    seq.num_computed_tokens = 3
    check_equal(seq.num_uncomputed_tokens, 0, "num_uncomputed_tokens before the first token is sampled")
    for count, token in enumerate([21, 22, 23], 1):
        seq.append_token(token)
        check_equal(seq.num_uncomputed_tokens, 1, f"num_uncomputed_tokens after token {count}")
        check_equal(seq.num_output_tokens, count, "num_output_tokens")
        seq.num_computed_tokens += 1


def test_preempted_sequence_computes_prompt_and_output_again() -> None:
    """Once nothing is computed any more, prompt and output together are left; the output itself stays.

    Why: a preempted sequence lost its KV blocks, not its answer. It resumes as if prompt + output were its prompt, and the
    caller never sees a token twice.
    """
    seq = make_sequence(0, [11, 12, 13])
    seq.num_computed_tokens = 3
    feed(seq, [21, 22])
    seq.num_computed_tokens = 0
    check_equal(seq.num_uncomputed_tokens, 5, "num_uncomputed_tokens after a preemption")
    check_equal(seq.num_output_tokens, 2, "num_output_tokens after a preemption")
    check_equal(seq.output_token_ids, [21, 22], "output_token_ids after a preemption")


def test_output_is_what_was_appended() -> None:
    """The output is the appended tokens in order; the prompt stays the prompt, and so does the caller's own list.

    Why: prompt and output stand in one list because the KV cache knows no difference. What callers get back must.
    """
    prompt = [11, 12]
    seq = make_sequence(0, prompt)
    feed(seq, [21, 22, 23])
    check_equal(seq.output_token_ids, [21, 22, 23], "output_token_ids")
    check_equal(seq.prompt_token_ids, [11, 12], "prompt_token_ids")
    check_equal(seq.tokens, [11, 12, 21, 22, 23], "tokens")
    check_equal(prompt, [11, 12], "the list that the caller gave as prompt")


class UncopiedTokens(list[int]):
    """A list of tokens, counting those that somebody copies or walks over."""

    walked = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.walked += len(found) if isinstance(place, slice) else 0
        return found

    def __iter__(self):
        self.walked += len(self)
        return super().__iter__()


def test_counting_copies_nothing() -> None:
    """num_output_tokens and num_uncomputed_tokens of 1,000 tokens are told without looking at one of them.

    Why: both are asked at each step, for each sequence. Copying the output to count it makes a long answer slower and slower.
    """
    seq = make_sequence(0, 3)
    seq.tokens = tokens = UncopiedTokens(range(1000))
    seq.num_computed_tokens = 999
    check_equal((seq.num_output_tokens, seq.num_uncomputed_tokens), (997, 1), "num_output_tokens, num_uncomputed_tokens")
    check_equal(tokens.walked, 0, "tokens that were copied or walked over")


def test_the_list_of_tokens_stays_the_same_one() -> None:
    """append_token appends to the list that is there: whoever holds `tokens` sees the new one.

    Why: the detokenizer is given the list once and reads it as it grows. From a new list nothing would ever reach it.
    """
    seq = make_sequence(0, [11, 12])
    held = seq.tokens
    feed(seq, [21, 22])
    check_equal(held, [11, 12, 21, 22], "the list that somebody took before the first token")


@pytest.mark.parametrize("token", [EOS, ALSO_EOS])
def test_end_of_sequence_token_ends_it(token: int) -> None:
    """Any of the model's end-of-sequence tokens ends the sequence: finish_reason "stop", stop_reason None.

    Why: this is how a model says that it is done. Chat models have several such tokens, so checking one is not enough.
    """
    seq = make_sequence(0, 3, eos=(EOS, ALSO_EOS))
    check_equal(feed(seq, [21, token, 22]), 2, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", None), "finish_reason and stop_reason")
    check_equal(seq.output_token_ids, [21, token], "output_token_ids, the last token included")


def test_end_is_reported_and_the_sequence_finished() -> None:
    """`append_token` returns True at the end, and the sequence is FINISHED then; before it, its status stays.

    Why: a sequence ends in one place. The scheduler frees the blocks of who is FINISHED; one that ends without it keeps them.
    """
    seq = make_sequence(0, 3, max_tokens=2)
    seq.status = SequenceStatus.RUNNING
    check_equal((seq.append_token(21), seq.status), (False, SequenceStatus.RUNNING), "the first token: returned, status")
    check_equal((seq.append_token(22), seq.status), (True, SequenceStatus.FINISHED), "the last token: returned, status")


class Search:
    """Finds the stop string "stop" in the token 30, and notes the reasons that it is given."""

    def __init__(self, seq: Sequence) -> None:
        self.tokens, self.reasons = seq.tokens, []

    def find(self, reason: str | None) -> str | None:
        self.reasons.append(reason)
        return "stop" if self.tokens[-1] == 30 else None


@pytest.mark.parametrize(
    ("tokens", "end", "reasons"),
    [([21, 30, 22], ("stop", "stop"), [None, None]), ([21, 22, 30], ("stop", "stop"), [None, None, "length"]),
     ([21, 22, 23], ("length", None), [None, None, "length"]), ([21, EOS], ("stop", None), [None, "stop"]),
     ([21, 7], ("stop", 7), [None, "stop"])],
    ids=["on the way", "in the last token", "none, length", "none, end of sequence", "none, stop token"],
)  # fmt: skip
def test_stop_string_comes_before_every_other_end(
    tokens: list[int], end: tuple[str, int | str | None], reasons: list[str | None]
) -> None:
    """With a `stop_search`, each token is looked at, whatever else ends the sequence with it; what it finds decides.

    Why: an answer that ends at its stop string is whole, also where the limit comes with the same token. The search is told
    of the end, as it then gives out the text that it has held back.
    """
    seq = make_sequence(0, 3, max_tokens=3, eos=(EOS,), stop_token_ids=[7])
    seq.stop_search = search = Search(seq)
    feed(seq, tokens)
    check_equal((seq.finish_reason, seq.stop_reason), end, "finish_reason and stop_reason")
    check_equal(search.reasons, reasons, "the reasons that the search was given")


def test_a_stop_string_is_named_before_a_stop_token() -> None:
    """When the token that completes a stop string is a stop token as well, the stop reason is the string.

    Why: the text ends before the string, so that is what ended it. A client that gets the token's number looks for it in vain.
    """
    seq = make_sequence(0, 3, stop_token_ids=[30])
    seq.stop_search = search = Search(seq)
    check_equal(feed(seq, [21, 30]), 2, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", "stop"), "finish_reason and stop_reason")
    check_equal(search.reasons, [None, "stop"], "the reasons that the search was given")


def test_every_token_is_searched_below_min_tokens_too() -> None:
    """`min_tokens` holds back stop tokens, not the search: it is asked once for each token, and what it finds decides.

    Why: it reads the text, a token at a time. One that it is not told of is missing in the answer. (Whether a string may end
    an answer so early is for the search to know.)
    """
    seq = make_sequence(0, 3, eos=(EOS,), min_tokens=4, max_tokens=9)
    seq.stop_search = search = Search(seq)
    check_equal(feed(seq, [EOS, 21, 30]), 3, "tokens until the end")
    check_equal(search.reasons, [None, None, None], "the reasons that the search was given")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", "stop"), "finish_reason and stop_reason")


def test_the_length_may_have_a_reason_of_its_own() -> None:
    """A sequence with a `max_len_reason` that ends at `max_len` names it; one that ends before does not.

    Why: a form that is complete, or a limit that the server set, ends an answer like a length, and the caller is told which.
    """
    for tokens, end in (([21, 22], ("length", "because")), ([21, EOS], ("stop", None))):
        seq = make_sequence(0, 3, eos=(EOS,))
        seq.max_len, seq.max_len_reason = 5, "because"
        check_equal(feed(seq, tokens), 2, "tokens until the end")
        check_equal((seq.finish_reason, seq.stop_reason), end, "finish_reason and stop_reason")


def test_stop_token_ends_it_and_is_named() -> None:
    """A token of `stop_token_ids` ends the sequence: finish_reason "stop", and stop_reason is this token.

    Why: callers tell by stop_reason which of their stops was hit; None would mean that the model ended by itself.
    """
    seq = make_sequence(0, 3, eos=(EOS,), stop_token_ids=[7, 8])
    check_equal(feed(seq, [21, 8, 7]), 2, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", 8), "finish_reason and stop_reason")


def test_end_of_sequence_is_looked_for_before_stop_tokens() -> None:
    """A token that is both end-of-sequence and in `stop_token_ids` counts as end of sequence: stop_reason None.

    Why: the order is vLLM's, and clients that compare stop_reason rely on it.
    """
    seq = make_sequence(0, 3, eos=(EOS,), stop_token_ids=[EOS])
    check_equal(feed(seq, [EOS]), 1, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", None), "finish_reason and stop_reason")


def test_ignore_eos_goes_on() -> None:
    """With `ignore_eos` an end-of-sequence token is a token like any other; only the length ends the sequence.

    Why: benchmarks need answers of a known length, whatever the model would rather do.
    """
    seq = make_sequence(0, 3, eos=(EOS,), ignore_eos=True, max_tokens=3)
    check_equal(feed(seq, [EOS, EOS, EOS]), 3, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("length", None), "finish_reason and stop_reason")


def test_ignored_eos_may_still_be_a_stop_token() -> None:
    """With `ignore_eos` and the same token in `stop_token_ids`, it ends the sequence as a stop token and is named.

    Why: the caller asked for this stop by name, so the answer has to name it.
    """
    seq = make_sequence(0, 3, eos=(EOS, ALSO_EOS), ignore_eos=True, stop_token_ids=[EOS])
    check_equal(feed(seq, [ALSO_EOS, EOS]), 2, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", EOS), "finish_reason and stop_reason")


@pytest.mark.parametrize(("token", "reason"), [(EOS, None), (7, 7)])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_min_tokens_holds_back_both_stops(token: int, reason: int | None, min_tokens: int) -> None:
    """Neither end of sequence nor a stop token ends the sequence before `min_tokens` tokens are out; the min_tokens-th may.

    Why: off by one here cuts answers one token short, or makes them one too long, for everyone who sets min_tokens.
    """
    seq = make_sequence(0, 3, eos=(EOS,), stop_token_ids=[7], min_tokens=min_tokens)
    check_equal(feed(seq, [token] * 5), max(1, min_tokens), f"tokens until the end with min_tokens={min_tokens}")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", reason), "finish_reason and stop_reason")


def test_context_ends_a_sequence_below_min_tokens() -> None:
    """With room for 2 more tokens in the context the sequence ends after 2, although min_tokens asks for 6.

    Why: behind max_model_len there is no slot in the block table. The length is a limit and not a wish.
    """
    seq = make_sequence(0, 3, max_model_len=5, max_tokens=8, min_tokens=6)
    check_equal(feed(seq, [21] * 9), 2, "tokens until the end")
    check_equal(seq.finish_reason, "length", "finish_reason")


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "generated"), [(1, 100, 1), (4, 100, 4), (4, 7, 4), (4, 6, 3), (None, 8, 5), (50, 4, 1)]
)
def test_length_is_max_tokens_or_the_context(max_tokens: int | None, max_model_len: int, generated: int) -> None:
    """A prompt of 3 ends after `max_tokens` generated tokens, or when prompt and output fill max_model_len.

    Why: max_tokens counts the output, max_model_len counts both. Mixing them up truncates answers to long prompts.
    """
    seq = make_sequence(0, 3, max_tokens=max_tokens, max_model_len=max_model_len)
    check_equal(feed(seq, [21] * 60), generated, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("length", None), "finish_reason and stop_reason")
    check_equal(seq.num_output_tokens, generated, "num_output_tokens")


def test_long_prompt_ends_by_length_too() -> None:
    """A prompt of 298 tokens with max_tokens = 2 ends after two tokens.

    Why: Python keeps one object for each small number only, so code that compares with `is` works until prompts get long.
    """
    seq = make_sequence(0, 298, max_tokens=2)
    check_equal(feed(seq, [21] * 5), 2, "tokens until the end")
    check_equal(seq.finish_reason, "length", "finish_reason")


@pytest.mark.parametrize(("token", "reason"), [(EOS, None), (7, 7)])
def test_a_stop_at_the_last_possible_token_counts_as_stop(token: int, reason: int | None) -> None:
    """When the token that reaches max_tokens is also a stop, finish_reason is "stop" and not "length".

    Why: "length" tells a client that the answer was cut off, and many then ask for more; here the model was done.
    """
    seq = make_sequence(0, 3, eos=(EOS,), stop_token_ids=[7], max_tokens=2)
    check_equal(feed(seq, [21, token]), 2, "tokens until the end")
    check_equal((seq.finish_reason, seq.stop_reason), ("stop", reason), "finish_reason and stop_reason")


@pytest.mark.parametrize("number", range(4))
def test_any_answer_ends_by_the_rules(number: int) -> None:
    """Random tokens with random stops and limits: each answer ends at the token, and for the reason, that the rules give.

    Why: rules of which each is right may still be asked in the wrong order.
    """
    dice = random.Random(210 + number)
    for _ in range(25):
        length, room, most = dice.randrange(1, 300), dice.randrange(1, 25), dice.randrange(1, 25)
        eos, stops, ignored = tuple(dice.sample(range(12), 2)), dice.sample(range(12), dice.randrange(3)), dice.random() < 0.3
        tokens, least = [dice.randrange(12) for _ in range(30)], dice.randrange(most + 1)
        expected: tuple[int, str, int | None] = (min(most, room), "length", None)
        for count, token in enumerate(tokens[: expected[0]], 1):
            if count >= least and ((token in eos and not ignored) or token in stops):
                expected = (count, "stop", None if token in eos and not ignored else token)
                break
        seq = make_sequence(
            0, length, eos=eos, stop_token_ids=stops, ignore_eos=ignored, min_tokens=least, max_tokens=most,
            max_model_len=length + room,
        )  # fmt: skip
        check_equal((feed(seq, tokens), seq.finish_reason, seq.stop_reason), expected, "tokens until the end, and its reasons")
        check_equal(seq.output_token_ids, tokens[: expected[0]], "output_token_ids")
        check_equal(seq.num_uncomputed_tokens, length + expected[0], "num_uncomputed_tokens, as nothing was computed")
