"""One process of `make fuzz`: runs the cases of one module, a line of JSON for each seed that comes in."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback


def main() -> None:
    """Import the module named on the command line, say so, then answer seeds until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a case prints is no answer
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where does it hang?
    module = importlib.import_module(sys.argv[1])
    print(json.dumps({"limit": getattr(module, "LIMIT", None)}), file=answers, flush=True)
    for line in sys.stdin:
        start, error = time.monotonic(), None
        try:
            module.run(random.Random(int(line)))
        except BaseException:  # also one that would end the process: a case has no right to
            error = traceback.format_exc()
        print(json.dumps({"error": error, "seconds": time.monotonic() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
