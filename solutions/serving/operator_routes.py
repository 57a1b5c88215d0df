"""The routes for load balancers, Prometheus and operators."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.responses import Response

from .async_engine import AsyncEngine
from .metrics import CONTENT_TYPE, EngineMetrics
from .openai_answers import LoadResponse, VersionResponse


def package_version() -> str:
    """The installed version of this project."""
    try:
        return version("build-your-own-vllm")
    except PackageNotFoundError:  # run from a folder that is only on the path
        return "unknown"


def add_operator_routes(app: FastAPI, async_engine: AsyncEngine, metrics: EngineMetrics) -> None:
    """Add the routes for load balancers, Prometheus and operators."""

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """Whether the engine lives."""
        return Response(status_code=200 if async_engine.is_running else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are welcome: the engine lives and the server does not shut down."""
        return Response(status_code=200 if async_engine.is_running and not async_engine.is_draining else 503)

    @app.get("/load")
    async def load() -> LoadResponse:
        """How many requests are being answered."""
        return LoadResponse(server_load=async_engine.num_requests)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def show_version() -> VersionResponse:
        return VersionResponse(version=package_version())
