"""Ranks as actors of a Ray cluster, on one or more nodes.

Ray places the ranks, starts their processes, tells them what to do, and says when one has died. It carries no tensors of the
model: those go through torch.distributed, as between processes of one machine. Rank 0 stays in the engine's process, where the
sequences are. Actors are tied to that process: when it ends, whatever way, Ray ends them.

What Ray does not notice is a rank that hangs, or a node that vanished without closing its connections: the collective that
waits for it fails after `TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from ..batching.step_arrays import StepArrays
from ..models.loader import ModelSource
from ..parallelism.distributed import leave, open_rendezvous
from .config import EngineConfig
from .executor import LockstepExecutor, end_ranks
from .platform.machine import pick_threads
from .worker_process import Setup, WorkerDiedError, WorkerHandle, WorkerProc

PLACEMENT_SECONDS = 60.0
"""How long the cluster may take to find room for the ranks."""
NO_RAY = "Ray is not installed; it comes with the extra [ray]: pip install -e '.[ray]'"
PASSED_ON = ("BYOV_CACHE", "STAGES", "TRITON_INTERPRET")
"""Variables of the engine's environment that hold for all ranks."""


def import_ray() -> Any:
    """The package.

    Raises:
        ValueError: it is not installed; the message says how to.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(NO_RAY) from None
    return ray


def connect() -> bool:
    """Be a driver of the cluster that RAY_ADDRESS names, else of the one that runs on this machine, else of a new one here.

    Returns:
        False if this process was one already.

    Raises:
        ValueError: Ray is not installed. ConnectionError: there is no cluster at that address.
    """
    ray = import_ray()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that it is used
    try:
        ray.init(include_dashboard=False, logging_level="warning", log_to_driver=True)
    except ConnectionError as error:
        hint = "if it asks for a token, this process needs RAY_AUTH_MODE=token and ~/.ray/auth_token, too"
        raise ConnectionError(f"{error}; {hint}") from error
    return True


def actor_environment(threads: int | None) -> dict[str, str]:
    """Variables for an actor that runs this package: where it lies, what holds for all, and how many threads it may start."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["PYTHONPATH"] = f"{Path(__file__).resolve().parents[2]}{os.pathsep}${{PYTHONPATH}}"
    return variables if threads is None else {**variables, "OMP_NUM_THREADS": str(threads)}


# ------------------------------------------------------------------------------------------------------ placement


@dataclass(frozen=True, slots=True)
class Placement:
    """How the cluster is asked for room.

    Attributes:
        strategy: of the placement group. resource: "CPU" or "GPU". amount: of it for each rank.
    """

    strategy: str
    resource: str
    amount: int


def plan_placement(
    room: Mapping[str, float], here: str, size: int, resource: str = "CPU", amount: int | None = None
) -> Placement:
    """Keep all ranks on the engine's node if it has room, else spread them over as few nodes as possible.

    Args:
        room: how much of the resource each node has, by node id. here: the engine's node, where rank 0 is.
        amount: for each rank; None: as much as leaves room for all, on this node if it has one for each.

    Raises:
        ValueError: the ranks do not fit.
    """
    own = int(room.get(here, 0))
    if amount is None:
        amount = next((n for n in range(own // size or own, 0, -1) if _fits(room, size, n)), 1)
    if own < amount or not _fits(room, size, amount):
        raise ValueError(
            f"{size} ranks with {amount} {resource} each do not fit the Ray cluster: this node, which must hold rank 0, has "
            f"{own}, and all {len(room)} nodes have {', '.join(str(int(r)) for r in room.values())}"
        )
    return Placement("STRICT_PACK" if own >= size * amount else "PACK", resource, amount)


def _fits(room: Mapping[str, float], size: int, amount: int) -> bool:
    return sum(int(r) // amount for r in room.values()) >= size


def use_interface_of(address: str) -> None:
    """Have gloo and NCCL listen where other nodes reach this one; by default gloo asks for the host's name, which on many
    systems leads to loopback. Interfaces that the environment names already are left alone."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


# ---------------------------------------------------------------------------------------------------------- ranks


class RankActor:
    """What runs in an actor. Calls take effect one after another, in the order in which they were made."""

    def __init__(self) -> None:
        self._worker_proc: WorkerProc  # from `start` on
        self._failure: BaseException | None = None

    def start(self, setup: Setup, own_interface: bool) -> None:
        """Join the others and load this rank's part."""
        with self._last_words():
            if own_interface:
                use_interface_of(import_ray().util.get_node_ip_address())
            self._worker_proc = WorkerProc(setup)

    def handle_message(self, step: StepArrays | None = None, **message: Any) -> None:
        """See `WorkerProc.handle_message`."""
        with self._last_words():
            if step is not None:  # Ray hands out arrays that nobody may write, and a tensor knows no such thing
                step = StepArrays(*(getattr(step, field.name).copy() for field in fields(step)))
            self._worker_proc.handle_message(step=step, **message)

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """After a failure close the connections, so that nobody waits for this rank, and say the same ever after."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            leave()
            raise

    def gpus(self) -> list[str]:
        """The GPUs that Ray has given this actor; also: whether it lives."""
        ids: list[str] = import_ray().get_runtime_context().get_accelerator_ids().get("GPU", [])
        return ids


class RayWorkerHandle(WorkerHandle):
    """Rank `rank` in a Ray actor. The outcome of the last call says whether it lives: Ray fails the calls of a dead actor."""

    death_seconds = 5.0

    def __init__(self, rank: int, actor: Any) -> None:
        self.rank, self._actor = rank, actor
        self._last = actor.gpus.remote()

    def start(self, setup: Setup, own_interface: bool) -> None:
        """See `RankActor.start`; does not wait for it."""
        self._last = self._actor.start.remote(setup, own_interface)

    def send(self, **message: Any) -> None:
        self._last = self._actor.handle_message.remote(**message)

    def check(self, seconds: float = 0.0) -> None:
        ray = import_ray()
        done, _ = ray.wait([self._last], timeout=seconds)
        if not done:
            return
        try:
            ray.get(self._last)
        except Exception as error:  # Ray's own, or what the rank has raised
            raise WorkerDiedError(f"the worker of rank {self.rank} has ended: {_reason(error)}") from None
        self._last = self._actor.gpus.remote()

    def stop(self, seconds: float) -> None:
        ray = import_ray()
        if ray.is_initialized():
            ray.kill(self._actor)


def _reason(error: Exception) -> str:
    """What Ray says of a failure, on one line: of a traceback the end, of a death the sentence that tells how."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "is dead because" in line or "unavailable" in line]
    return (told or lines[-1:] or [type(error).__name__])[0].partition(" Some common causes")[0]


# ------------------------------------------------------------------------------------------------------- executor


class RayExecutor(LockstepExecutor):
    """Each other rank in an actor of its own, wherever the cluster has room.

    Attributes:
        placement: what was asked for.

    Raises:
        ValueError: Ray is not installed, or the cluster has no room for the ranks.
        ConnectionError: there is no cluster at RAY_ADDRESS.
        WorkerDiedError: a rank failed to start.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        size = config.tensor_parallel_size
        connected = connect()
        ray = import_ray()
        self._others: list[RayWorkerHandle] = []
        groups: list[Any] = []
        self._finalizer = weakref.finalize(self, _end, self._others, groups, connected)
        try:
            here = ray.get_runtime_context().get_node_id()
            nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            self.placement = _place(nodes, here, size, device)
            groups.append(_reserve(self.placement, here, size))
            # one node: by loopback; several: where others reach this one
            several = self.placement.strategy == "PACK"
            address = nodes[here]["NodeManagerAddress"] if several else "127.0.0.1"
            if several:
                use_interface_of(address)
            store = open_rendezvous(address)
            if device.type == "cuda":
                device = torch.device("cuda", _gpu_of_rank_0(_actor(self.placement, groups[0], 0)))
            self._others += [RayWorkerHandle(rank, _actor(self.placement, groups[0], rank)) for rank in range(1, size)]
            for other in self._others:
                there = torch.device("cuda", 0) if device.type == "cuda" else device  # an actor sees its own GPUs alone
                setup = Setup(config, source, there, dtype, other.rank, size, f"{address}:{store.port}")
                other.start(setup, several)
        except BaseException:
            self._finalizer()
            raise
        threads = self.placement.amount if device.type == "cpu" else None
        self._init_worker(Setup(config, source, device, dtype, 0, size, f"{address}:{store.port}"), store, threads)

    def _broadcast_step(self, step: StepArrays) -> None:
        self._broadcast(step=step)


def _place(nodes: Mapping[str, Mapping[str, Any]], here: str, size: int, device: torch.device) -> Placement:
    resource = "GPU" if device.type == "cuda" else "CPU"
    room = {name: node["Resources"].get(resource, 0.0) for name, node in nodes.items()}
    amount = 1 if resource == "GPU" else pick_threads() if os.environ.get("OMP_NUM_THREADS") else None
    return plan_placement(room, here, size, resource, amount)


def _reserve(placement: Placement, here: str, size: int) -> Any:
    """A placement group with a bundle for each rank, that of rank 0 on this node.

    Raises:
        ValueError: others use the room.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    bundles = [{placement.resource: placement.amount} for _ in range(size)]
    selectors: list[dict[str, str]] = [{"ray.io/node-id": here}] + [{} for _ in range(size - 1)]
    group = placement_group(bundles, placement.strategy, bundle_label_selector=selectors)
    if not group.wait(PLACEMENT_SECONDS):
        remove_placement_group(group)
        raise ValueError(
            f"the Ray cluster had no room for {size} times {placement.amount} {placement.resource} in "
            f"{PLACEMENT_SECONDS:.0f} s; `ray status` shows who uses it"
        )
    return group


def _actor(placement: Placement, group: Any, rank: int) -> Any:
    """An actor in the bundle of a rank, with as many threads as the bundle has cores."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    on_cpu = placement.resource == "CPU"
    options = {
        "num_cpus": placement.amount if on_cpu else 0,
        "num_gpus": 0 if on_cpu else placement.amount,
        "max_restarts": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        "runtime_env": {"env_vars": actor_environment(placement.amount if on_cpu else None)},
    }
    return import_ray().remote(RankActor).options(**options).remote()


def _gpu_of_rank_0(actor: Any) -> int:
    """The GPU of rank 0's bundle, as this process counts them; an actor in the bundle is told which it is."""
    (name,) = import_ray().get(actor.gpus.remote())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(name) if visible else int(name)


def _end(others: Sequence[WorkerHandle], groups: Sequence[Any], connected: bool) -> None:
    end_ranks(others)
    ray = import_ray()
    if not ray.is_initialized():
        return
    from ray.util.placement_group import remove_placement_group

    for group in groups:
        remove_placement_group(group)
    if connected:
        ray.shutdown()
