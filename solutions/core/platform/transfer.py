"""Data on its way between the host and a device, without waiting for the work that is queued there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(data: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host data on `device`, without waiting for the work already queued there."""
    tensor = torch.as_tensor(data, dtype=dtype)
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def put_into(buffer: Tensor, data: Any) -> None:
    """Copy host data to where a device reads it, when the work already queued there is done; does not wait for that."""
    tensor = torch.as_tensor(data)
    buffer.copy_(tensor.pin_memory() if buffer.is_cuda else tensor, non_blocking=True)


class OnTheWay:
    """Tensors that a device computes, on their way to the host. Work that is queued later does not hold them up.

    Args:
        tensors: all on one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)  # to pinned memory
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
