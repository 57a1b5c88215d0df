"""Ranks as Ray actors on two nodes that are both this machine: a test of placement and of failures, not of a network."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM
from solutions.core.ray_executor import Placement, RankActor, plan_placement, use_interface_of
from solutions.core.worker_process import WorkerDiedError
from solutions.tests.tiny_models import make_tiny_llama

SETTINGS = {
    "dtype": "float32", "max_model_len": 128, "block_size": 4, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 16,
}  # fmt: skip
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------ without a cluster


@pytest.mark.parametrize(
    ("room", "size", "amount", "expected"),
    [
        ({"here": 2}, 2, None, ("STRICT_PACK", 1)),
        ({"here": 8, "there": 8}, 2, None, ("STRICT_PACK", 4)),
        ({"here": 8, "there": 8}, 2, 8, ("PACK", 8)),
        ({"here": 8, "there": 8}, 2, 4, ("STRICT_PACK", 4)),
        ({"here": 1, "there": 1}, 2, None, ("PACK", 1)),
        ({"here": 2, "there": 64}, 4, None, ("PACK", 2)),
        ({"here": 3, "there": 3}, 4, None, ("PACK", 1)),
        ({"here": 2}, 1, None, ("STRICT_PACK", 2)),
    ],
)
def test_placement(room: dict[str, float], size: int, amount: int | None, expected: tuple[str, int]) -> None:
    assert plan_placement(room, "here", size, "CPU", amount) == Placement(expected[0], "CPU", expected[1])


@pytest.mark.parametrize(
    ("room", "size", "amount"),
    [({"here": 1}, 2, None), ({"here": 1, "there": 8}, 2, 2), ({"here": 0, "there": 8}, 2, None), ({"there": 8}, 2, 1)],
)
def test_what_does_not_fit_is_refused(room: dict[str, float], size: int, amount: int | None) -> None:
    with pytest.raises(ValueError, match=r"2 ranks with .* each do not fit the Ray cluster"):
        plan_placement(room, "here", size, "CPU", amount)


def test_gpus_are_placed_like_cores() -> None:
    assert plan_placement({"here": 4, "there": 4}, "here", 8, "GPU", 1) == Placement("PACK", "GPU", 1)
    assert plan_placement({"here": 8, "there": 8}, "here", 8, "GPU", 1) == Placement("STRICT_PACK", "GPU", 1)


def test_collectives_listen_where_other_nodes_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name, (entry, *_) = next((n, a) for n, a in psutil.net_if_addrs().items() if a[0].address == "127.0.0.1")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    use_interface_of("203.0.113.1")  # nobody's
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_interface_of(entry.address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    use_interface_of(entry.address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


def test_a_missing_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_llama(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Ray is not installed; .* extra \[ray\]: pip install"):
        LLM(str(tmp_path), tensor_parallel_size=2, distributed_executor_backend="ray", **SETTINGS)


def test_a_rank_that_cannot_start_says_so_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: object) -> None:
        raise OSError("no weights here")

    monkeypatch.setattr("solutions.core.ray_executor.WorkerProc", fail)
    actor = RankActor()
    with pytest.raises(OSError, match="no weights here"):
        actor.start(None, own_interface=False)
    with pytest.raises(OSError, match="no weights here"):
        actor.handle_message(cache=[1, 2, 3])


def test_one_process_has_one_rank() -> None:
    with pytest.raises(ValueError, match="backend uni has one rank, and --tensor-parallel-size is 2; use mp, or ray"):
        EngineConfig(tensor_parallel_size=2, distributed_executor_backend="uni")


# --------------------------------------------------------------------------------------------------- with a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two nodes; this process is a driver on the first, which has one core. The second claims two, so Ray, if not told where
    rank 0 is, would pack both ranks there."""
    pytest.importorskip("ray", reason='needs the extra [ray]: pip install -e ".[ray]"')
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    nodes.add_node(num_cpus=2, **memory)
    os.environ["RAY_ADDRESS"] = nodes.address
    yield nodes
    import ray

    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    nodes.shutdown()


@pytest.fixture(scope="module")
def path(tiny_llama: Path) -> str:
    return str(tiny_llama)


def actors() -> list[psutil.Process]:
    """The processes of ranks on both nodes, which this process has started; Ray calls a process by its actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::RankActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def make(path: str, size: int = 2) -> LLM:
    return LLM(path, tensor_parallel_size=size, distributed_executor_backend="ray", **SETTINGS)


def outputs(llm: LLM) -> list[tuple[tuple[int, ...], ...]]:
    try:
        prompts = [{"prompt_token_ids": [5] * 9 + [(7 * i + j) % 250 for j in range(1 + 5 * i)]} for i in range(5)]
        params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True) for _ in prompts]
        params[2] = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True, n=2)
        return [tuple(tuple(c.token_ids) for c in r.outputs) for r in llm.generate(prompts, params, use_tqdm=False)]
    finally:
        llm.llm_engine.close()


def start_generation(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    llm.llm_engine.add_request("a", {"prompt_token_ids": [1, 2]}, params)
    llm.llm_engine.step()
    llm.llm_engine.check_health()


@pytest.mark.slow
def test_ranks_on_two_nodes_say_what_one_rank_says(cluster: object, path: str) -> None:
    expected = outputs(LLM(path, **SETTINGS))
    llm = make(path)
    assert llm.llm_engine.executor.placement == Placement("PACK", "CPU", 1)
    import ray
    from ray.util.placement_group import placement_group_table

    (group,) = placement_group_table().values()
    here = ray.get_runtime_context().get_node_id()
    assert group["bundles_to_node_id"][0] == here != group["bundles_to_node_id"][1]
    (worker,) = actors()
    assert worker.environ()["OMP_NUM_THREADS"] == "1"
    assert outputs(llm) == expected
    until(lambda: actors() == [])
    assert not ray.is_initialized()


@pytest.mark.slow
def test_one_rank_needs_no_actor(cluster: object, path: str) -> None:
    llm = make(path, size=1)
    assert actors() == []
    assert outputs(llm) == outputs(LLM(path, **SETTINGS))


@pytest.mark.slow
def test_more_ranks_than_cores_are_refused(cluster: object, path: str) -> None:
    with pytest.raises(ValueError, match="4 ranks with 1 CPU each do not fit the Ray cluster"):
        make(path, size=4)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_rank_that_is_killed_ends_the_engine(cluster: object, path: str, when: str) -> None:
    llm = make(path)
    engine = llm.llm_engine
    start_generation(llm)
    (worker,) = actors()
    start = time.monotonic()
    if when == "idle":
        worker.kill()

        def is_found() -> bool:
            try:
                engine.check_health()
            except WorkerDiedError as error:
                return "rank 1 has ended" in str(error)
            return False

        until(is_found, 5)
    else:
        worker.suspend()
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {worker.pid}"])
    with pytest.raises(WorkerDiedError, match=r"rank 1 has ended: .*died"):
        engine.step()
    engine.close()
    assert time.monotonic() - start < 10
    if when != "idle":
        killer.wait()


@pytest.mark.slow
def test_a_rank_that_fails_says_why(cluster: object, path: str) -> None:
    llm = make(path)
    start_generation(llm)
    llm.llm_engine.executor._broadcast(nonsense=1)
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"rank 1 has ended: TypeError: .*nonsense"):
        llm.llm_engine.step()
    llm.llm_engine.close()
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_no_rank_outlives_the_engine(cluster: object, path: str) -> None:
    code = (
        "import time; from solutions.core.engine import LLM\n"
        f"llm = LLM({path!r}, tensor_parallel_size=2, distributed_executor_backend='ray', **{SETTINGS!r})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    engine = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert engine.stdout.readline() == "ready\n"
    assert len(actors()) == 1
    engine.send_signal(signal.SIGKILL)
    engine.wait(10)
    until(lambda: actors() == [])


@pytest.mark.slow
def test_a_server_whose_rank_has_died_ends(cluster: object, path: str) -> None:
    flags = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray", "--max-model-len", "128"]
    command = [
        sys.executable,
        "-m",
        "solutions.serving.api_server",
        "--model",
        path,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *flags,
    ]
    server = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    url = next(found[1] for line in server.stdout if (found := re.search(r"(http://\S+)/v1", line)))
    assert httpx.get(f"{url}/health").status_code == 200
    (worker,) = actors()
    worker.kill()
    start = time.monotonic()
    until(lambda: httpx.get(f"{url}/health").status_code == 503, 5)
    assert server.wait(10) == 1
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_a_node_that_dies_ends_the_engine(cluster: object, path: str) -> None:
    """The last test: the node does not come back."""
    llm = make(path)
    start_generation(llm)
    start = time.monotonic()
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)

    def run_on() -> None:
        while True:
            llm.llm_engine.step()

    with pytest.raises(WorkerDiedError, match="rank 1 has ended"):
        run_on()
    llm.llm_engine.close()
    assert time.monotonic() - start < 10
