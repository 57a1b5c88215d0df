"""What the headers of a model's weight files show before its memory is taken: whether they can be of the model at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .config.entries import ModelError
from .config.model_config import ModelConfig
from .config.text_part import text_name

HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "gpt_neox.embed_in.weight")
MOST_PACKED = 17
"""Weights for each element of a file, at most: sixteen of two bits to a word, and some slack for what a file leaves out."""


@dataclass(frozen=True, slots=True)
class WeightHeaders:
    """What the headers of a model's safetensors files say.

    Attributes:
        files: their paths. shapes: of all tensors, by name, without those that are no text model's. homes: the file that holds
            each tensor, and its name there.
    """

    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    homes: dict[str, tuple[Path, str]]

    @classmethod
    def open(cls, files: list[Path]) -> WeightHeaders:
        """Read the headers.

        Raises:
            ModelError: a file is damaged.
        """
        shapes, homes = {}, {}
        for file in files:
            try:
                with safe_open(file, framework="pt", device="cpu") as reader:
                    for name in reader.keys():  # noqa: SIM118, the reader is no dict
                        if (text := text_name(name)) is not None:
                            shapes[text], homes[text] = tuple(reader.get_slice(name).get_shape()), (file, name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is damaged or incomplete ({error}); fetch or convert it again") from error
        return cls(files, shapes, homes)

    def check_size(self, config: ModelConfig) -> None:
        """See that the model is not far larger than its files, before memory is taken for it.

        Raises:
            ModelError: ``config.json`` describes another model.
        """
        layer = config.attention_weights + 2 * config.hidden_size * config.mlp_width
        positions = config.max_position_embeddings if config.architecture == "GPT2LMHeadModel" else 0
        described = config.num_layers * layer + (config.vocab_size + positions) * config.hidden_size
        held = sum(prod(shape) for shape in self.shapes.values())
        if described > MOST_PACKED * held or config.num_layers > len(self.shapes):
            raise ModelError(
                f"{self.files[0].parent} describes a model of {config.num_layers} layers and {described:.3g} weights, and its "
                f"files hold {held:.3g}: config.json and weights are of different models"
            )

    def with_ties(self, config: ModelConfig) -> tuple[ModelConfig, dict[str, str]]:
        """Settle whether the head is the embedding, as transformers does: the files decide where they say otherwise.

        Returns:
            The configuration, no longer tied if the files hold a head that differs from the embedding; and other names for
            tensors: a tied model's embedding may be there as its head alone.

        Raises:
            ModelError: a file is damaged.
        """
        if not config.tie_word_embeddings or HEAD not in self.shapes:
            return config, {}
        embedding = next((name for name in EMBEDDINGS if name in self.shapes), None)
        if embedding is None:
            return config, {HEAD: EMBEDDINGS[1] if config.architecture == "GPT2LMHeadModel" else EMBEDDINGS[0]}
        same = self.shapes[HEAD] == self.shapes[embedding] and torch.equal(self.read(HEAD), self.read(embedding))
        return (config if same else replace(config, tie_word_embeddings=False)), {}

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the files, by its name in `shapes`; it is the mapped file itself.

        Raises:
            ModelError: the file is damaged.
        """
        file, stored = self.homes[name]
        try:
            with safe_open(file, framework="pt", device="cpu") as reader:
                tensor: torch.Tensor = reader.get_tensor(stored)
                return tensor
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged or incomplete ({error}); fetch or convert it again") from error
