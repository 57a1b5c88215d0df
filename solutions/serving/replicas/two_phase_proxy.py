"""One OpenAI endpoint in front of servers that compute prompts and servers that write answers.

    python -m solutions.serving.replicas.two_phase_proxy --prefill http://localhost:8001 --decode http://localhost:8002

`two_phase` says who is asked what; here are the connections. Each server is an `api_server` with ``--kv-transfer-config``.
Keys, checks and errors are theirs: a request's headers go to both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request

from ..api_server import bind
from ..app import CLIENT_CLOSED_REQUEST, MAX_BODY_BYTES, unless_left
from ..guards import BodyLimit, add_error_handlers
from .two_phase import Call, GoneError, Reply, TwoPhase

CONNECT_SECONDS = 5.0
OWN_HEADERS = {b"host", b"content-length", b"connection", b"transfer-encoding", b"keep-alive"}
"""Headers of one connection, which go no further."""
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


class HttpSender:
    """Brings calls to servers, by `Send`."""

    def __init__(self) -> None:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # what is late is seen to by `TwoPhase`
        self.client = httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_connections=None), follow_redirects=False)

    async def __call__(self, server: str, call: Call) -> Reply:
        """The answer's head, its body to come. Raises GoneError."""
        headers = [pair for pair in call.headers if pair[0].lower() not in OWN_HEADERS]
        request = self.client.build_request(call.method, server + call.path, headers=headers, content=call.body)
        try:
            response = await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise GoneError(str(error)) from None
        kept = [pair for pair in response.headers.raw if pair[0].lower() not in OWN_HEADERS - {b"content-length"}]
        return Reply(response.status_code, kept, _pieces(response), response.aclose)


async def _pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in response.aiter_raw():
            yield piece
    except httpx.HTTPError as error:
        raise GoneError(str(error)) from None


class ProxyMetrics:
    """What `TwoPhase` counts, for Prometheus."""

    def __init__(self, two_phase: TwoPhase) -> None:
        self._two_phase = two_phase

    def collect(self) -> list[Metric]:
        """All of it at this moment."""
        requests = CounterMetricFamily(
            "byov:proxy_requests", "Requests by phase and what became of them there.", labels=["phase", "outcome"]
        )
        for (phase, outcome), count in sorted(self._two_phase.counts.items()):
            requests.add_metric([phase, outcome], count)
        return [requests]


def create_proxy(
    prefill: Sequence[str], decode: Sequence[str], prefill_seconds: float, seconds: float, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The proxy's application.

    Args:
        prefill, decode: addresses of servers, without ``/v1``. prefill_seconds, seconds: see `TwoPhase`.
        max_body_bytes: larger bodies are refused.
    """
    sender = HttpSender()
    two_phase = TwoPhase(prefill, decode, sender, prefill_seconds, seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with sender.client:
            yield

    app = FastAPI(title="Prefill and decode apart", lifespan=lifespan, openapi_url=None)
    app.state.two_phase = two_phase
    add_error_handlers(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, others={})
    registry = CollectorRegistry()
    registry.register(ProxyMetrics(two_phase))
    running = Gauge("byov:proxy_running", "Answers that a server writes now.", ["server"], registry=registry)

    @app.get("/metrics")
    async def metrics() -> Response:
        for server, load in two_phase.decode.loads.items():
            running.labels(server).set(load)
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.api_route("/{path:path}", methods=METHODS)
    async def forward(path: str, http: Request) -> Response:
        body, query = await http.body(), http.url.query
        call = Call(http.method, f"/{path}" + (f"?{query}" if query else ""), http.headers.raw, body)
        reply = await unless_left(http, two_phase.answer(call))
        if reply is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return ClosingResponse(reply)

    return app


class ClosingResponse(StreamingResponse):
    """An answer that is passed on; when it ends, for whatever reason, the server's work for it ends."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.pieces, reply.status)
        self.raw_headers = reply.headers
        self._reply = reply

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]  # as of StreamingResponse
        """See `StreamingResponse`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._reply.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="two_phase_proxy", description="Servers that compute prompts and servers that write "
                                     "answers, behind one OpenAI endpoint.")  # fmt: skip
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: 8000)")
    parser.add_argument("--prefill", nargs="+", default=[], metavar="URL",
                        help="servers that compute prompts, each with the kv_role kv_producer, such as http://10.0.0.5:8001; "
                             "without any the others do it")  # fmt: skip
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL",
                        help="servers that write answers, each a kv_consumer with the addresses of all producers")  # fmt: skip
    parser.add_argument("--prefill-timeout", type=float, default=60, metavar="SECONDS",
                        help="a prompt that takes longer is computed where its answer is written (default: 60)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="a request that takes longer is refused, or its stream ends with an error (default: "
                             "600)")  # fmt: skip
    parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES, metavar="N",
                        help="largest request body (default: 4 MiB)")  # fmt: skip
    args = parser.parse_args(argv)
    pools = [[url.rstrip("/").removesuffix("/v1") for url in urls] for urls in (args.prefill, args.decode)]
    for url in (*pools[0], *pools[1]):
        if not url.startswith(("http://", "https://")):
            parser.error(f"{url!r} is no address of a server; write for example http://localhost:8001")
    for name in ("prefill_timeout", "timeout", "max_body_bytes"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    try:
        sock = bind(args.host, args.port)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    prefill, decode = pools
    app = create_proxy(prefill, decode, args.prefill_timeout, args.timeout, args.max_body_bytes)
    host, port = sock.getsockname()[:2]
    print(f"Serving at http://{'localhost' if host in ('0.0.0.0', '::') else host}:{port}/v1", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)).run([sock])
    return 0


if __name__ == "__main__":
    sys.exit(main())
