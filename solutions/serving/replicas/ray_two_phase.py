"""Prefill and decode apart under Ray Serve: a pool of engines for each, and an ingress that asks one of either.

What `two_phase_proxy` does between servers, here between replicas, which Serve starts and replaces. Each replica is a
deployment of its own, so that a request can be sent to the one that holds its prompt. KV blocks go through shared memory;
therefore all replicas run on one machine, Ray's head.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request

from ...core.config import EngineConfig
from .ray_replica import HttpCall, Replica
from .replica_settings import ReplicaSettings
from .two_phase import Call, GoneError, Reply, TwoPhase
from .two_phase_proxy import ClosingResponse

ON_THE_HEAD = {"node:__internal_head__": 0.001}
"""A share of what only the head has, by which Ray places an actor there."""


class HandleSender:
    """Brings calls to replicas, by `Send`.

    Args:
        handles: replica → its handle.
    """

    def __init__(self, handles: dict[str, DeploymentHandle[Any]]) -> None:
        self._handles = {name: handle.options(method_name="forward", stream=True) for name, handle in handles.items()}

    async def __call__(self, server: str, call: Call) -> Reply:
        """The answer's head, its body to come. Raises GoneError."""
        path, _, query = call.path.partition("?")
        headers = [
            pair for pair in call.headers if pair[0].lower() != b"content-length"
        ]  # the first phase has a body of its own
        sent = HttpCall(call.method, path, query.encode(), headers, call.body)
        stream = cast("DeploymentResponseGenerator[Any]", self._handles[server].remote(sent, keys=[]))  # stream=True
        try:
            status, head = await anext(stream)
        except RayActorError as error:
            raise GoneError(str(error)) from None
        except BaseException:
            stream.cancel()  # type: ignore[no-untyped-call]  # Ray's
            raise

        async def close() -> None:
            stream.cancel()  # type: ignore[no-untyped-call]  # Ray's

        return Reply(status, head, _pieces(stream), close)


async def _pieces(stream: DeploymentResponseGenerator[Any]) -> AsyncIterator[bytes]:
    try:
        async for piece in stream:
            yield piece
    except RayActorError as error:
        raise GoneError(str(error)) from None


class TwoPhaseIngress:
    """Receives all requests.

    Args:
        prefill, decode: replica → its handle. prefill_seconds, seconds: see `TwoPhase`.
    """

    def __init__(
        self,
        prefill: dict[str, DeploymentHandle[Any]],
        decode: dict[str, DeploymentHandle[Any]],
        prefill_seconds: float,
        seconds: float,
    ) -> None:
        self._two_phase = TwoPhase(list(prefill), list(decode), HandleSender(prefill | decode), prefill_seconds, seconds)

    async def __call__(self, request: Request) -> ClosingResponse:
        """Both phases of a request. When the client leaves, Serve cancels this call, and with it those to the replicas."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
        query = request.url.query
        call = Call(request.method, path + (f"?{query}" if query else ""), request.headers.raw, await request.body())
        return ClosingResponse(await self._two_phase.answer(call))


def two_phase_app(
    settings: ReplicaSettings, config: EngineConfig, names: list[str], options: dict[str, Any]
) -> serve.Application:
    """The ingress, `settings.prefill_replicas` replicas that compute prompts, and `settings.replicas` that write answers.

    Args:
        names: of the model. options: of each replica's deployment.

    Raises:
        ValueError: the engine cannot hand KV blocks over with these settings.
    """
    actor = options["ray_actor_options"]
    options = {**options, "ray_actor_options": {**actor, "resources": ON_THE_HEAD}, "num_replicas": 1}
    run = uuid.uuid4().hex[:12]
    sockets = [str(Path(tempfile.gettempdir(), f"byov-{run}-{index}.sock")) for index in range(settings.prefill_replicas)]

    def deployed(name: str, role: str, addresses: list[str]) -> serve.Application:
        transfer = json.dumps({"kv_connector": "shm", "kv_role": role, "kv_addresses": addresses})
        engine = replace(config, kv_transfer_config=transfer)
        return serve.deployment(name=name, **options)(Replica).bind(engine, names, settings.api_key)

    prefill = {
        f"prefill-{index}": deployed(f"prefill-{index}", "kv_producer", [address]) for index, address in enumerate(sockets)
    }
    decode = {f"decode-{index}": deployed(f"decode-{index}", "kv_consumer", sockets) for index in range(settings.most_replicas)}
    most = options["max_ongoing_requests"] * len(prefill | decode)
    ingress = serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=most)(TwoPhaseIngress)
    return ingress.bind(prefill, decode, settings.prefill_timeout, settings.timeout)
