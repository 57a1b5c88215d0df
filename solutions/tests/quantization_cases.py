"""Matrices and inputs on which rounding is tried out, and the slow algorithm that GPTQ has to agree with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from solutions.quantization.calibration import LayerInputs
from solutions.quantization.matrices import Fold


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    """Inputs [count, size] that go together, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) / size**0.5
    loud = torch.exp(1.2 * torch.randn(size, generator=generator))
    return (torch.randn(count, size, generator=generator) @ mix + 0.3 * torch.randn(count, 1, generator=generator)) * loud


def random_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def optimal_brain_quantization(weight, hessian, bits, size, damping) -> np.ndarray:
    """A column at a time, in order: round it, move the columns behind it by the rule of the optimal brain surgeon, and take it
    out of the inverse Hessian by elimination. Scales are made of a group's weights as they are when it begins."""
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse, result = np.linalg.inv(hessian), np.zeros_like(weight)
    for j in range(weight.shape[1]):
        if j % size == 0:
            group = weight[:, j : j + size]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            scale = (high - low) / (2**bits - 1)
            zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
        result[:, j] = (np.clip(np.round(weight[:, j] / scale + zero), 0, 2**bits - 1) - zero) * scale
        error = (weight[:, j] - result[:, j]) / inverse[j, j]
        weight -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def fold_randomly(layer: LayerInputs, seed: int) -> list[Fold]:
    """Divide the inputs of every fold of a layer by random factors from 0.5 to 1.5; returns the folds."""
    folds = list(layer.folds())
    for fold in folds:
        scale = torch.rand(layer.weight(fold.matrices[0]).shape[1], generator=torch.Generator().manual_seed(seed)) + 0.5
        with torch.inference_mode():
            layer.fold(fold, scale)
    return folds
