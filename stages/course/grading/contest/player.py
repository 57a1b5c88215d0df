"""The process in which a learner's policy runs: it hears what is waiting and running, and answers with an order.

It has copies of a few numbers of each request and nothing else, so there is no state that it could change. This file is copied
beside the learner's and imports nothing of the course.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Request(NamedTuple):
    """What a policy may know of a request. Nobody knows beforehand how long an answer will be."""

    id: int
    """Ascending in order of arrival."""
    client: str
    priority: int
    """Lower is more urgent."""
    arrival: float
    """Seconds on the simulated clock."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Tokens written so far."""
    num_computed_tokens: int
    """Tokens whose keys and values are in the KV cache."""
    num_cached_tokens: int
    """While it waits: tokens at its beginning that the prefix cache holds at this moment. While it runs: 0."""
    num_preemptions: int


def play(module: str, questions: Any, answers: Any) -> None:
    """Answer until nobody asks any more: a line of JSON each way. A fault of the policy is an answer, too.

    Args:
        module: name of the learner's module, with a class `Policy`. questions, answers: text files.
    """
    policy: Any = None
    for line in questions:
        question = json.loads(line)
        try:
            if question["ask"] == "new":
                policy, answer = importlib.import_module(module).Policy(), None
            else:
                requests = [Request(*each) for each in question["requests"]]
                answer = getattr(policy, question["ask"])(requests, question["now"])
            said = json.dumps({"answer": answer})
        except Exception as error:
            said = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(said, file=answers, flush=True)


if __name__ == "__main__":
    with Path("questions").open(encoding="utf-8") as questions, Path("answers").open("w", encoding="utf-8") as answers:
        play(sys.argv[1], questions, answers)
