"""LoRA adapters that are loaded and unloaded while the server runs, by the routes that vLLM has for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import Field

from ..core.lora.registry import folder_at
from .async_engine import HEALTH_SECONDS, AsyncEngine, EngineDeadError
from .errors import RequestError
from .openai_fields import Bool, Request
from .served_models import ServedModels

Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadLoRAAdapterRequest(Request):
    """Body of ``POST /v1/load_lora_adapter``: a name for the adapter in a folder of this machine."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: Bool = False
    """Take the place of the adapter that has this name."""


class UnloadLoRAAdapterRequest(Request):
    """Body of ``POST /v1/unload_lora_adapter``."""

    lora_name: Name


def add_adapter_routes(
    app: FastAPI, async_engine: AsyncEngine, models: ServedModels, *, responses: dict[int | str, Any]
) -> None:
    """Add the routes; `responses` describe what errors look like."""
    adapters = async_engine.engine.adapters

    @app.post("/v1/load_lora_adapter", responses=responses, response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadLoRAAdapterRequest) -> str:
        """Load an adapter. It is read beside the engine, which stops only to take it."""
        try:
            folder = folder_at(body.lora_path)
            models.check_new(body.lora_name)
            adapter = await asyncio.to_thread(adapters.read, folder)
            await between_steps(async_engine, partial(adapters.add, body.lora_name, folder, adapter, body.load_inplace))
        except ValueError as error:
            raise RequestError(str(error)) from error
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", responses=responses, response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadLoRAAdapterRequest) -> str:
        """Take an adapter's name away. Requests that it computes go on to their end."""
        await between_steps(async_engine, partial(adapters.remove, body.lora_name))
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def refuse_adapter_routes(app: FastAPI) -> None:
    """Say how to get the routes."""
    for what in ("load", "unload"):
        app.add_api_route(f"/v1/{what}_lora_adapter", refuse, methods=["POST"], include_in_schema=False)


async def refuse() -> None:
    raise RequestError("adapters come and go if the server is started with --allow-runtime-lora-updating", status=404)


async def between_steps(async_engine: AsyncEngine, work: Callable[[], None]) -> None:
    """Let the engine's thread do something at its next step border, and wait for that.

    Raises:
        ValueError: what `work` raises of that kind. EngineDeadError: the engine has ended before it came to it.
    """
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(error: ValueError | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def command() -> None:
        error = None
        try:
            work()
        except ValueError as raised:
            error = raised
        loop.call_soon_threadsafe(settle, error)

    async_engine.between_steps(command)
    while not done.done():
        if not async_engine.is_running:
            raise EngineDeadError("the engine has ended")
        await asyncio.wait([done], timeout=HEALTH_SECONDS)
    done.result()
