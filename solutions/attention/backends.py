"""Chooses the attention backend by name, or the fastest one that can run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from .full_attention import FullBackend
from .latent_attention import LatentBackend
from .latent_in_order import LatentInOrder
from .paged_attention import AttentionBackend, NaiveBackend

BACKEND_NAMES = ("torch", "cpu", "triton", "cuda")
"""Backends in files of their own: ``paged_attention_<name>.py`` with a class ``<Name>Backend`` and a function ``problem``."""
OF_KINDS = {"over latents": ("torch", "triton"), "with sinks": ("torch", "cpu", "triton")}
"""Those that compute attention of these kinds; over latents by classes of their own."""


def make_backend(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, block_size: int = 16, cpu_kernels: bool = True,
    batch_invariant: bool = False, kind: str | None = None,
) -> AttentionBackend:  # fmt: skip
    """The backend called `name`; "auto" picks the fastest that can run here.

    Args:
        dtype, head_dim: of the model. block_size: tokens in a KV block. cpu_kernels: whether "auto" may pick the C++ kernels.
        batch_invariant: a query's result may not depend on what else is in the step; only the C++ kernels can do that, and over
            latents PyTorch, a token at a time.
        kind: "over latents" or "with sinks"; None: neither.

    Raises:
        ValueError: no backend has this name, or it cannot run here; the message says why.
    """
    device = torch.device(device)
    if kind is not None and name not in ("auto", *OF_KINDS[kind]):
        able = f"{', '.join(OF_KINDS[kind][:-1])} and {OF_KINDS[kind][-1]}"
        raise ValueError(f"--attention-backend {name}: attention {kind} is computed by {able} alone")
    if name == "naive":
        return NaiveBackend()
    if name == "full":
        return FullBackend()
    preferred = "triton" if device.type == "cuda" else "cpu" if cpu_kernels and kind != "over latents" else "torch"
    for candidate in (preferred, "torch") if name == "auto" else (name,):
        if candidate not in BACKEND_NAMES:
            raise ValueError(f"attention backend must be auto, naive or one of {', '.join(BACKEND_NAMES)}; got {name!r}")
        if kind == "over latents" and candidate == "torch":
            return LatentInOrder() if batch_invariant else LatentBackend()
        family = "paged" if kind != "over latents" else "latent"
        module = importlib.import_module(f".{family}_attention_{candidate}", __package__)
        problem = module.problem(device, dtype, head_dim, block_size)
        if problem is None:
            backend: Callable[..., AttentionBackend] = getattr(
                module, f"{family.capitalize()}{candidate.capitalize()}Backend".removeprefix("Paged")
            )
            if batch_invariant and candidate == "cpu":
                return backend(batch_invariant=True)
            return backend(device) if candidate == "cuda" else backend()
    raise ValueError(f"--attention-backend {name}: {problem}; use torch")


def check_cache(name: str, kv_cache_dtype: str, device: torch.device, kind: str | None) -> None:
    """See that the backend of this name can read a cache of this type; `kind`: as in `make_backend`.

    Raises:
        ValueError: it cannot.
    """
    if kind == "over latents" and kv_cache_dtype == "fp8":
        raise ValueError("--kv-cache-dtype fp8: not with a model that caches latents; use int8 or auto")
    able = {"auto": (name,), "int8": ("torch", "cpu", "triton"), "fp8": ("triton",)}[kv_cache_dtype]
    if name not in able or (kv_cache_dtype == "fp8" and device.type == "cpu"):
        where = "a GPU" if kv_cache_dtype == "fp8" else "attention backend " + ", ".join(able)
        raise ValueError(f"--kv-cache-dtype {kv_cache_dtype} needs {where}, and attention runs on {name} on {device.type}")
