"""Heads for tiny targets: random ones, that draft mostly wrong tokens, saved as the command that trains one saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from solutions.models.heads.eagle import EagleHead, save_head
from solutions.models.loader import load_model, resolve_model


def target_embedding(target: str) -> Tensor:
    """The embedding [V, hidden] of the model in a folder."""
    model = load_model(resolve_model(target, progress=False), torch.float32, torch.device("cpu"), progress=False)
    return model.model.embed_tokens.weight


def make_random_head(folder: Path, target: str, num_drafted: int = 64, seed: int = 0) -> EagleHead:
    """A head with random weights, rounded to the type in which they are kept, in `folder`: it drafts every fifth token."""
    generator = torch.Generator().manual_seed(seed)
    config = resolve_model(target, progress=False).config
    with torch.no_grad():
        head = EagleHead(config, num_drafted)
        for parameter in head.parameters():
            scale = 0.2 if parameter.ndim > 1 else 0.1
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)).bfloat16())
        head.token_ids.copy_(torch.arange(num_drafted) * (config.vocab_size // num_drafted))
    save_head(folder, head, config, target_embedding(target))
    return head
