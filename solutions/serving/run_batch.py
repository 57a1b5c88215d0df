"""Answer a file of requests without a server: ``python -m solutions.serving.run_batch -i in.jsonl -o out.jsonl``.

Each line is in OpenAI's batch format and goes through the server's own application, without a network: what the API answers
to a client, a batch gets too, errors included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ..core.config import add_engine_flags, config_from_flags
from ..core.platform.machine import settle_heap
from ..core.platform.progress import GenerationProgress
from .app import create_app
from .async_engine import AsyncEngine
from .batches.answering import BatchStoppedError, answer_all
from .batches.batch_files import URLS, AnswerFile, BatchRequest, LineError, read_requests
from .chat_reading import add_format_flags, formats_from_flags

EPILOG = f"""the file of requests has a line of JSON for each:
  {{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
   "body": {{"model": "smollm2-135m", "messages": [{{"role": "user", "content": "Hello!"}}], "max_tokens": 32}}}}
The url is {", ".join(URLS[:-1])} or {URLS[-1]}.
Answers come in the order in which they are ready; custom_id says whose they are. A run that was stopped or killed goes on
where it was: give the same command again.
"""


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags and the engine's."""
    parser = argparse.ArgumentParser(
        prog="run_batch", description="Answer a file of requests in OpenAI's batch format.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="the requests, one a line")
    group.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="where the answers go")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names in the requests (default: --model's)")
    add_format_flags(group)
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    if args.max_num_waiting is not None:
        parser.error("--max-num-waiting is for a server; no request of a batch is refused for the length of the queue")
    return args


async def run(app: FastAPI, requests: Sequence[BatchRequest], answers: AnswerFile, at_once: int) -> None:
    """Answer the requests that have no answer yet, and show how far it is.

    Args:
        at_once: how many requests may be on their way together.

    Raises:
        BatchStoppedError: the engine has failed.
        OSError: an answer cannot be written.
    """
    with GenerationProgress(len(requests), enabled=True) as progress:
        for _ in answers.answered:
            progress.advance(0)

        def put(request: BatchRequest, line: dict[str, Any]) -> None:
            answers.write(request.custom_id, line)
            usage = line["response"]["body"].get("usage") or {}
            progress.advance(usage.get("completion_tokens") or usage.get("output_tokens") or 0)

        await answer_all(app, [one for one in requests if one.custom_id not in answers.answered], at_once, put)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a batch; returns the exit code."""
    args = parse_flags(argv)
    try:
        requests = read_requests(args.input_file)
        answers = AnswerFile(args.output_file, requests)
    except LineError as error:
        place = args.input_file if error.line is None else f"{args.input_file}, line {error.line}"
        print(f"error: {place}: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with answers:
        before = len(answers.answered)
        if before == len(requests):
            print(f"All {before} requests are answered in {args.output_file}")
            return 0
        from ..core.engine import LLMEngine  # after the files are in order: torch takes seconds to import

        try:
            engine = LLMEngine(config_from_flags(args))
            names = args.served_model_name or [args.model]
            app = create_app(AsyncEngine(engine), names, **formats_from_flags(args))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        settle_heap()
        for line in engine.startup_summary():
            print(line, file=sys.stderr)

        async def work() -> None:
            async with app.router.lifespan_context(app):
                await run(app, requests, answers, at_once=2 * args.max_num_seqs)  # so that the engine never waits for us

        try:
            asyncio.run(work())
        except (BatchStoppedError, OSError) as error:
            print(f"error: {error}; give the same command again to go on", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            done = f"{len(answers.answered)} of {len(requests)} requests are answered"
            print(f"stopped: {done}; give the same command again to go on", file=sys.stderr)
            return 130
        finally:
            engine.close()
            gc.unfreeze()  # what `settle_heap` has frozen would look like a leak at the interpreter's end
    print(f"{len(requests) - before} requests answered, {before} were before; the answers are in {args.output_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
