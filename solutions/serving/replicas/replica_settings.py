"""Settings of a server with several engines, by name and value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ...core.config import EngineConfig, add_engine_flags, config_from_flags
from ..api_server import MAX_NUM_WAITING


@dataclass(slots=True)
class ReplicaSettings:
    """What there is besides the engine's settings.

    Attributes:
        replicas: a fixed number; or between min_replicas and max_replicas, so that each has target_ongoing_requests or fewer.
        prefill_replicas: so many more, which compute prompts for the `replicas`; see `ray_two_phase`.
        prefill_timeout, timeout: in seconds, see `TwoPhase`.
        router: "prefix" or "round_robin". max_imbalance: see `PrefixAffinity`.
        cores_per_replica: None: an equal share of this machine's.
        served_model_name, api_key: as of the server.
    """

    replicas: int | None
    min_replicas: int | None
    max_replicas: int | None
    target_ongoing_requests: float
    prefill_replicas: int
    prefill_timeout: float
    timeout: float
    router: str
    max_imbalance: int
    cores_per_replica: int | None
    served_model_name: list[str] | None
    api_key: list[str] | None

    @property
    def most_replicas(self) -> int:
        """How many there can be at once."""
        return self.max_replicas or self.replicas or 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("argument --", "").replace("--", "").replace("-", "_"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ray_app", add_help=False, allow_abbrev=False)
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--min-replicas", type=int)
    parser.add_argument("--max-replicas", type=int)
    parser.add_argument("--target-ongoing-requests", type=float, default=16.0)
    parser.add_argument("--prefill-replicas", type=int, default=0)
    parser.add_argument("--prefill-timeout", type=float, default=60.0)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--router", choices=("prefix", "round_robin"), default="prefix")
    parser.add_argument("--max-imbalance", type=int, default=16)
    parser.add_argument("--cores-per-replica", type=int)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--api-key", nargs="+")
    add_engine_flags(parser)
    parser.set_defaults(max_num_waiting=MAX_NUM_WAITING)
    return parser


def parse_settings(args: dict[str, Any]) -> tuple[ReplicaSettings, EngineConfig]:
    """Settings by the names of flags, with underscores: of the engine, and those of `ReplicaSettings`.

    Args:
        args: values are texts, as on a command line, or what YAML makes of them.

    Raises:
        ValueError: a name or a value is wrong; the message names it.
    """
    parser = _parser()
    actions = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for name, value in args.items():
        if name not in actions:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(sorted(actions))}")
        flag = "--" + name.replace("_", "-")
        if isinstance(actions[name], argparse.BooleanOptionalAction):
            if str(value).lower() not in ("true", "false"):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            argv.append(flag if str(value).lower() == "true" else "--no-" + flag[2:])
        elif actions[name].nargs == "+":
            argv += [flag, *map(str, value if isinstance(value, list) else [value])]
        elif value is not None:
            argv.append(f"{flag}={value}")
    flags = parser.parse_args(argv)
    settings = ReplicaSettings(**{name: getattr(flags, name) for name in ReplicaSettings.__slots__})
    config = config_from_flags(flags)
    _check(settings, config)
    return settings, config


def _check(settings: ReplicaSettings, config: EngineConfig) -> None:
    above_zero = ("replicas", "min_replicas", "max_replicas", "target_ongoing_requests", "prefill_timeout", "timeout")
    for name in (*above_zero, "cores_per_replica"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be more than 0, got {value}")
    for name in ("max_imbalance", "prefill_replicas"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(settings, name)}")
    if settings.prefill_replicas and (settings.min_replicas or settings.max_replicas):
        raise ValueError("prefill_replicas go with a fixed number of replicas, whose addresses they know; give replicas")
    if settings.replicas is not None and (settings.min_replicas or settings.max_replicas):
        raise ValueError("replicas is a fixed number; min_replicas and max_replicas let it change: give one or the other")
    if settings.min_replicas and settings.min_replicas > settings.most_replicas:
        raise ValueError(f"min_replicas ({settings.min_replicas}) must be at most max_replicas ({settings.most_replicas})")
    if config.tensor_parallel_size > 1 and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"tensor_parallel_size is {config.tensor_parallel_size}; on CPUs a replica has one rank, so use more "
                         "replicas, or one engine: python -m solutions.serving.api_server")  # fmt: skip
    if config.kv_transfer_config is not None:
        raise ValueError("kv_transfer_config: replicas would share one address; prefill_replicas gives each its own")
    if config.distributed_executor_backend == "ray":
        raise ValueError("distributed_executor_backend: a replica's ranks are processes on its own node, so use mp")
