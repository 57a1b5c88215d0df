"""The OpenAI-compatible HTTP server: ``python -m solutions.serving.api_server --model smollm2-135m --port 8000``."""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from ..core.config import add_engine_flags, config_from_flags, parse_bytes
from ..core.platform.machine import settle_heap
from .app import MAX_BODY_BYTES, create_app
from .async_engine import AsyncEngine
from .batches.batch_store import BatchStore
from .chat_reading import add_format_flags, formats_from_flags
from .connections import TimedConnection
from .guards import API_KEY_VARIABLE, log_as_json, read_api_keys
from .live.recording import TraceRecorder
from .tracing import RequestTracer, otlp_exporter

MAX_NUM_WAITING = 1024
"""Default limit of the queue: refusing early is better than letting everybody wait."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
UNHEALTHY_SECONDS = 3.0
"""For so long a server whose engine has failed answers with 503, so that monitors of ``/health`` see the failure."""


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """The server's flags and the engine's."""
    parser = argparse.ArgumentParser(prog="api_server", description="Serve a model behind the OpenAI API.")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    group.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: 8000)")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names in the API (default: --model's)")
    group.add_argument("--api-key", nargs="+", metavar="KEY", default=[], help="clients must send one of these keys; other "
                       f"users of this machine cannot see keys in the environment variable {API_KEY_VARIABLE}")  # fmt: skip
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file with more keys, one a line")
    group.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES, metavar="N",
                       help="largest request body (default: 4 MiB)")  # fmt: skip
    group.add_argument("--allowed-origins", nargs="+", metavar="URL", default=[],
                       help="web pages that may call this server from a browser (default: only its own)")  # fmt: skip
    group.add_argument("--strict", action="store_true",
                       help="refuse unknown fields (default: ignore them, and name them in X-Ignored-Fields)")  # fmt: skip
    add_format_flags(group)
    group.add_argument("--start-compiler", action=argparse.BooleanOptionalAction, default=True,
                       help="start the process that compiles grammars of structured answers with the server (default: on); "
                            "else the first such answer waits for it, and without any it takes no memory")  # fmt: skip
    group.add_argument("--enable-tokenizer-info-endpoint", action="store_true",
                       help="offer /tokenizer_info, which shows the tokenizer's settings and the chat template")  # fmt: skip
    group.add_argument("--allow-runtime-lora-updating", action="store_true",
                       help="offer /v1/load_lora_adapter and /v1/unload_lora_adapter, to clients that may read any folder of "
                            "this machine as an adapter")  # fmt: skip
    group.add_argument("--files-dir", type=Path, metavar="DIR",
                       help="offer /v1/files and /v1/batches, which are kept in this folder; implies --scheduling-policy "
                            "priority, so that batches run behind all other requests")  # fmt: skip
    group.add_argument("--max-file-bytes", type=parse_bytes, default=100 << 20, metavar="SIZE",
                       help="largest file that may be uploaded (default: 100MiB)")  # fmt: skip
    group.add_argument("--max-waiting-tokens", type=int, metavar="N",
                       help="most prompt tokens that may wait; requests beyond get a 429 (default: no limit)")  # fmt: skip
    group.add_argument(
        "--shutdown-timeout", type=int, default=30, metavar="SECONDS",
        help="running requests get this long after SIGTERM; a second SIGTERM aborts them at once (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--connection-timeout", type=float, default=30, metavar="SECONDS",
        help="a request must arrive within this time, and a client that reads nothing for as long is cut off (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--stall-timeout", type=float, default=300, metavar="SECONDS",
        help="a step that takes longer ends the server with an error (default: 300)",
    )  # fmt: skip
    group.add_argument(
        "--otlp-traces-endpoint", metavar="URL",
        help="send a span of each request to an OpenTelemetry collector, such as http://localhost:4318/v1/traces",
    )  # fmt: skip
    group.add_argument(
        "--live", action=argparse.BooleanOptionalAction,
        help="offer the page and /live; everybody with access to the API then sees which requests run, without their texts, "
             "and can pause the engine (default: on if only this machine can reach the server)",
    )  # fmt: skip
    group.add_argument("--record-trace", type=Path, metavar="FILE", help="write what each step did, one line of JSON for each")
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: write one line for each request (default: text)"
    )
    add_engine_flags(parser)
    parser.set_defaults(max_num_waiting=MAX_NUM_WAITING)
    args = parser.parse_args(argv)
    if args.files_dir is not None:
        if args.scheduling_policy in ("lpm", "fair"):
            policy = args.scheduling_policy
            parser.error(
                f"--files-dir runs batches at low priority, and --scheduling-policy {policy} knows none; leave one out"
            )
        args.scheduling_policy = "priority"
    for name in ("max_body_bytes", "max_file_bytes", "max_waiting_tokens", "connection_timeout", "stall_timeout"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    for name in args.served_model_name or [args.model]:
        if name in {module.partition("=")[0] for module in args.lora_modules}:
            parser.error(f"--lora-modules: {name!r} is a name of the model; give the adapter another one")
    if args.live is None:
        args.live = args.host in LOOPBACK
    return args


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket, so that a port in use is noticed before the model is loaded.

    Raises:
        OSError: the address cannot be had; the message says what to do.
    """
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise OSError(f"--port must be 0 to 65535, got {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
        return sock
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use; choose another with --port or stop what listens there") from error
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; see --host and --port") from error


class Server(uvicorn.Server):
    """A first SIGTERM or SIGINT lets the running answers finish, a second one aborts them."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal. The first one stops new connections (`should_exit`) and drains the engine (`is_draining`); a second
        one, of either kind, ends what still runs (`force_exit`); more change nothing. uvicorn's own version would also raise
        the signal again at its end, before the engine is closed."""
        # Hint: Three ends: a signal that waits, a signal that does not, and an engine that is dead. What does each of
        # them owe to those who still read?
        raise NotImplementedError("Stage 5 · Task 5.9: Server.handle_exit, see stages/stage5_production/GUIDE.md#task-5-9")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM or SIGINT, or until the engine fails; returns the exit code."""
    started = time.perf_counter()
    args = parse_flags(argv)
    try:
        keys = read_api_keys(args.api_key, args.api_key_file)
        exporter = None if args.otlp_traces_endpoint is None else otlp_exporter(args.otlp_traces_endpoint)
        sock = bind(args.host, args.port)
        batches = None if args.files_dir is None else BatchStore(args.files_dir, args.max_file_bytes)
        trace = None if args.record_trace is None else args.record_trace.open("w", encoding="utf-8")
        from ..core.engine import LLMEngine  # after the port is ours: torch takes seconds to import

        imported = time.perf_counter()
        engine = LLMEngine(config_from_flags(args))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settle_heap()
    if args.start_compiler:
        engine.input.start_compiling()
    if args.log_format == "json":
        log_as_json()
    for line in engine.startup_summary():
        print(line)
    names = args.served_model_name or [args.model]
    host, port = sock.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    seconds = time.perf_counter() - started
    print(f"Serving {', '.join(names)} at http://{host}:{port}/v1, ", end="")
    print(f"{seconds:.1f} s after the start ({imported - started:.1f} s of it imports)", flush=True)
    async_engine = AsyncEngine(engine, args.max_waiting_tokens, args.stall_timeout)
    tracer = None if exporter is None else RequestTracer(exporter, names[0])
    recorder = None if trace is None else TraceRecorder(trace, engine, names[0])
    if recorder is not None:
        engine.observers.append(recorder)
    app = create_app(
        async_engine, names, keys, max_body_bytes=args.max_body_bytes, allowed_origins=args.allowed_origins, tracer=tracer,
        live=args.live, strict=args.strict, tokenizer_info=args.enable_tokenizer_info_endpoint,
        lora_updates=args.allow_runtime_lora_updating, batches=batches, **formats_from_flags(args),
    )  # fmt: skip
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=args.shutdown_timeout,
        http=partial(TimedConnection, seconds=args.connection_timeout),  # type: ignore[arg-type]  # it is called, no more
    )  # fmt: skip
    server = Server(config, async_engine)
    deaths: list[None] = []

    def end() -> None:
        deaths.append(None)
        asyncio.get_running_loop().call_later(UNHEALTHY_SECONDS, setattr, server, "should_exit", True)

    async_engine.on_death = end
    server.run(sockets=[sock])
    engine.close()
    if tracer is not None:
        tracer.shutdown()
    if recorder is not None:
        recorder.close()
    gc.unfreeze()  # what `settle_heap` has frozen would look like a leak at the interpreter's end
    return 1 if deaths else 0


if __name__ == "__main__":
    sys.exit(main())
