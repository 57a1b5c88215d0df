"""A head that drafts for a LLaMA model: one decoder layer over what the target computes anyway.

At position p it reads the target's last hidden state f(p) and the embedding of the token behind it, t(p + 1), and says what
t(p + 2) is. Its own output stands for the feature f(p + 1) that is not there yet, so it can go on for some tokens without the
target. Its vocabulary is a part of the target's, the tokens that occur most, so its last product is small.

Sources: Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", ICML 2024, §4.1 (the inputs, one
layer); "EAGLE-3", NeurIPS 2025, §3 (the head's own outputs in the place of features, which nothing forces to be alike).

A folder holds one: `config.json` says for which target, `model.safetensors` has the weights.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...attention.paged_attention import AttentionMetadata
from ...parallelism.linear import Linear, copy_weight
from ...parallelism.tensor_parallel import SINGLE
from ..config.model_config import ModelConfig
from ..layers import RMSNorm
from ..llama import LlamaDecoderLayer, LlamaForCausalLM
from .head import DraftHead

ARCHITECTURE = "EagleHead"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
"""What a head and its target have in common, by the names of `ModelConfig`."""
EVERY = 61
"""Of the embedding's rows each so-manyth is read to tell targets apart."""


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A head that was found, not loaded yet.

    Attributes:
        sizes: of the target, by the names of `SIZES`. fingerprint: of the target, see `fingerprint`.
        num_drafted: tokens of its vocabulary.
    """

    folder: Path
    sizes: dict[str, int]
    fingerprint: int
    num_drafted: int

    def load(self, target: LlamaForCausalLM, dtype: torch.dtype) -> EagleHead:
        """See `FoundHead.load`."""
        return load_head(self, target.config, target.model.embed_tokens.weight, dtype)


class EagleHead(DraftHead):
    """One decoder layer of the target's shape, between a matrix that joins feature and embedding and a small vocabulary.

    Args:
        target: the model for which it drafts.
        num_drafted: tokens that it can draft.

    Attributes:
        token_ids: [num_drafted] int64, which tokens of the target they are.
    """

    token_ids: Tensor

    def __init__(self, target: ModelConfig, num_drafted: int) -> None:
        super().__init__()
        one = replace(target, num_layers=1, attention_bias=False, output_bias=False, mlp_bias=False)
        self.fc = Linear(2 * target.hidden_size, target.hidden_size, bias=False)
        self.layer = LlamaDecoderLayer(one, 0, SINGLE)
        self.norm = RMSNorm(target.hidden_size, target.norm_eps)
        self.lm_head = Linear(target.hidden_size, num_drafted, bias=False)
        self.register_buffer("token_ids", torch.zeros(num_drafted, dtype=torch.int64))

    def forward(self, embedded: Tensor, features: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        return self.run_layers(self.fc(torch.cat((embedded, features), dim=1)), rope, metadata)

    def run_layers(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        return self.norm(self.layer(hidden, rope, metadata))

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.layer.modules(), self.norm]

    def best(self, hidden: Tensor, count: int) -> Tensor:
        return self.token_ids[self.lm_head(hidden).topk(count, dim=1).indices]

    @property
    def parts(self) -> list[tuple[nn.Module, bool]]:
        # embeddings are much smaller than features, so their weights in `fc` are larger and leave the others no steps
        return [(self.fc, False), (self.layer, True), (self.norm, True), (self.lm_head, True)]


def fingerprint(embedding: Tensor) -> int:
    """A checksum of some rows of the target's embedding [V, hidden], rounded to bfloat16, so that it is the same in whatever
    precision the target runs that holds bfloat16's numbers."""
    rows = embedding[::EVERY].to(torch.bfloat16).contiguous().view(torch.int16).cpu()
    return zlib.crc32(rows.numpy().tobytes())


def find_head(folder: Path, target: ModelConfig) -> HeadFiles:
    """Read what a folder says of the head in it, and see that it fits the target as far as sizes go.

    Raises:
        ValueError: there is none, or it is for another model; one line.
    """
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text())
        sizes = {name: int(said["target"][name]) for name in SIZES}
        files = HeadFiles(folder, sizes, int(said["target"]["fingerprint"]), int(said["draft_vocab_size"]))
        is_head = said["architectures"] == [ARCHITECTURE]
    except OSError as error:
        raise ValueError(f"there is no drafting head in {folder}: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not describe a drafting head, as the command that trains one writes it") from None
    if not is_head or not 0 < files.num_drafted <= sizes["vocab_size"]:
        raise ValueError(f"{path} does not describe a drafting head, as the command that trains one writes it")
    for name, size in sizes.items():
        if size != getattr(target, name):
            raise ValueError(
                f"the head in {folder} is for a model with {name} {size}, and the target's is {getattr(target, name)}"
            )
    return files


def load_head(files: HeadFiles, target: ModelConfig, embedding: Tensor, dtype: torch.dtype) -> EagleHead:
    """The head, on the CPU, without kernels (`kernels/attach.py`).

    Args:
        embedding: the target's, [V, hidden].

    Raises:
        ValueError: the file is damaged, does not hold the tensors of such a head, or is for another target; one line.
    """
    path = files.folder / WEIGHTS
    if fingerprint(embedding) != files.fingerprint:
        raise ValueError(f"the head in {files.folder} was trained for another model of the same sizes: the embeddings differ")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    with torch.inference_mode(False), torch.no_grad():
        head = EagleHead(target, files.num_drafted).to(dtype)
        wanted = head.state_dict()
        if tensors.keys() != wanted.keys():
            raise ValueError(
                f"{path}: the tensors are not a head's; {sorted(tensors.keys() ^ wanted.keys())[0]} is one too many or too few"
            )
        for name, tensor in wanted.items():
            try:
                copy_weight(tensor, tensors[name])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from None
    ids = head.token_ids
    if int(ids.min()) < 0 or int(ids.max()) >= target.vocab_size or len(ids.unique()) != len(ids):
        raise ValueError(f"{path}: token_ids must be different tokens of the target's {target.vocab_size}")
    return head.eval()


def save_head(folder: Path, head: nn.Module, target: ModelConfig, embedding: Tensor) -> None:
    """Write a head for the target with this embedding [V, hidden] into a folder, the weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in head.state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    sizes = {name: getattr(target, name) for name in SIZES} | {"fingerprint": fingerprint(embedding)}
    described = {"architectures": [ARCHITECTURE], "draft_vocab_size": len(tensors["token_ids"]), "target": sizes}
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
