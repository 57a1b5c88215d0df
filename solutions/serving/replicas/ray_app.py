"""Several engines behind one OpenAI endpoint, as a Ray Serve application.

    python -m solutions.serving.replicas.ray_app --port 8000 model=smollm2-135m replicas=2
    serve run solutions.serving.replicas.ray_app:app model=smollm2-135m replicas=2
    python -m solutions.serving.replicas.ray_app --port 8000 model=smollm2-135m replicas=1 prefill_replicas=1

An ingress reads each request, computes the keys of its prompt, and hands it to a replica. A replica is a whole `api_server`
without the socket: the same application answers, with the same checks and the same errors. `prefix_router` chooses the replica,
through Serve's interface for request routers. Serve replaces a replica that dies; requests that it had not begun to answer go
to another one. There is only one ingress, because there is only one memory of prefixes. With `prefill_replicas` the ingress is
that of `ray_two_phase`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import torch
from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request

from ...core.platform.machine import available_cores
from ...core.ray_executor import NO_RAY, actor_environment, connect
from ...models.loader import resolve_model
from ..api_server import MAX_NUM_WAITING, bind
from ..guards import error_response
from .prefix_router import Policy, PrefixAffinity, RoundRobin, request_keys
from .ray_replica import HttpCall, Replica
from .replica_settings import parse_settings

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

    from .ray_two_phase import two_phase_app
except ImportError:
    sys.exit(f"error: {NO_RAY}")  # nothing in this file works without it

ATTEMPTS = 3
"""How many replicas a request may go to, if one after another dies before it has begun to answer."""
REPLICA_GONE = "the replica that answered this request has died"


# --------------------------------------------------------------------------------------------------------- routing


class PolicyRouter(RequestRouter):
    """Serve's request router with one of our policies. Requests bring the keys of their prompt as the argument `keys`."""

    def initialize_state(self, router: str, max_imbalance: int) -> None:  # type: ignore[override]  # ours has these settings
        """Called by Serve with the settings of the deployment."""
        self._policy: Policy = RoundRobin() if router == "round_robin" else PrefixAffinity(max_imbalance)
        self._loads: dict[str, int] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The policy's choice, and the others behind it for the case that it takes no more requests."""
        keys: list[bytes] = []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where nobody takes requests, wait before asking again
            keys = pending_request.kwargs.get("keys", [])
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = self._policy.choose(keys, {name: self._loads.get(name, 0) for name in replicas})
        return [[replicas.pop(chosen)], list(replicas.values())]

    # Serve counts, too, but forgets a count that has not changed for some seconds

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._loads[replica_id.unique_id] = self._loads.get(replica_id.unique_id, 0) + 1

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._loads[replica_id.unique_id] = num_ongoing_requests

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        super().decrement_queue_len_cache(replica_id)
        self._loads[replica_id.unique_id] = max(0, self._loads.get(replica_id.unique_id, 0) - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._retain_current()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._retain_current()

    def _retain_current(self) -> None:
        names = {replica_id.unique_id for replica_id in self.curr_replicas}
        self._loads = {name: load for name, load in self._loads.items() if name in names}
        self._policy.retain(names)


# --------------------------------------------------------------------------------------------------------- ingress


class Ingress:
    """Receives all requests."""

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas.options(method_name="forward", stream=True)

    async def __call__(self, request: Request) -> Response:
        """Pass a request to a replica and its answer to the client. When the client leaves, Serve cancels both calls."""
        body = await request.body()
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
        call = HttpCall(request.method, path, request.scope["query_string"], request.headers.raw, body)
        try:
            keys = request_keys(json.loads(body)) if body else []
        except (ValueError, RecursionError):
            keys = []  # the replica says what is wrong
        for _ in range(ATTEMPTS):
            stream = cast("DeploymentResponseGenerator[Any]", self._replicas.remote(call, keys=keys))  # stream=True
            try:
                status, headers = await anext(stream)
            except RayActorError:
                continue
            is_events = any(value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type")
            response = StreamingResponse(_rest(stream, is_events), status)
            response.raw_headers = headers
            return response
        return error_response(REPLICA_GONE, 503)


async def _rest(stream: DeploymentResponseGenerator[Any], is_events: bool) -> AsyncIterator[bytes]:
    try:
        async for piece in stream:
            yield piece
    except RayActorError:
        if not is_events:
            raise
        error = error_response(REPLICA_GONE, 503).body
        yield b"data: " + bytes(error) + b"\n\ndata: [DONE]\n\n"


# ----------------------------------------------------------------------------------------------------- application


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for ``serve run solutions.serving.replicas.ray_app:app name=value …`` or a Serve config file.

    Args:
        args: see `parse_settings`.

    Raises:
        ValueError: a setting is wrong, or the model cannot be had.
    """
    settings, config = parse_settings(args)
    resolve_model(config.model, config.load_format, config.quantization)  # now, rather than in a replica's log
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    share = available_cores() / (settings.most_replicas + settings.prefill_replicas)
    cores = settings.cores_per_replica or max(1, int(share))
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": settings.cores_per_replica or min(cores, share),
            "num_gpus": config.tensor_parallel_size if on_gpu else 0,
            "runtime_env": {"env_vars": actor_environment(cores)},
        },
        "max_ongoing_requests": config.max_num_seqs + (config.max_num_waiting or MAX_NUM_WAITING),
        "health_check_period_s": 1.0,
        "max_constructor_retry_count": 1,  # an engine that does not start will not start the next time
    }
    names = settings.served_model_name or [config.model]
    if settings.prefill_replicas:
        return two_phase_app(settings, config, names, options)
    options["request_router_config"] = RequestRouterConfig(
        request_router_class=PolicyRouter,  # type: ignore[arg-type]  # a class is right
        request_router_kwargs={"router": settings.router, "max_imbalance": settings.max_imbalance},
    )
    if settings.min_replicas or settings.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": settings.min_replicas or 1,
            "max_replicas": settings.most_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = settings.most_replicas
    replica = serve.deployment(**options)(Replica).bind(config, names, settings.api_key)
    most = options["max_ongoing_requests"] * settings.most_replicas
    return serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=most)(Ingress).bind(replica)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ray_app", description="Serve a model by several engines behind one OpenAI API.")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: 8000)")
    parser.add_argument(
        "settings", nargs="*", metavar="NAME=VALUE",
        help="the engine's flags with underscores, and replicas, min_replicas, max_replicas, target_ongoing_requests, router "
        "(prefix or round_robin), max_imbalance, prefill_replicas (so many more, which compute prompts for the others), "
        "prefill_timeout, timeout, cores_per_replica, served_model_name, api_key",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if wrong := [setting for setting in args.settings if "=" not in setting]:
            raise ValueError(f"{wrong[0]!r} is no setting; write NAME=VALUE")
        application = app(dict(setting.split("=", 1) for setting in args.settings))
        with bind(args.host, args.port) as free:
            port = free.getsockname()[1]
        connect()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": args.host, "port": port})
        serve.run(application)
        print(f"Serving at http://{'localhost' if args.host == '0.0.0.0' else args.host}:{port}/v1", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        serve.delete("default")
    except RuntimeError as error:
        print(f"error: the replicas did not start; their log is above ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    from .ray_app import main as importable_main  # Ray hands classes to other processes by the module's name

    sys.exit(importable_main())
