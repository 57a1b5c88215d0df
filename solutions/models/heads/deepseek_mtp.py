"""DeepSeek-V3's module for multi-token prediction (MTP) as a head that drafts (DeepSeek-V3, 2024, section 2.2 and figure 3).

A checkpoint has it behind its last layer: two norms, of the token's embedding and of the feature; a matrix that joins both; a
whole decoder layer, latents and experts included; a norm before the model's own head. It was trained to say one token more than
the model does. To draft several, it reads its own output, as taken before that norm, in the place of the next feature. Where a
checkpoint has several such modules, the first drafts all tokens, as in vLLM.

Embedding and head are the target's own. A checkpoint repeats them, and one whose copies differ is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...attention.paged_attention import AttentionMetadata
from ...parallelism.linear import Layer, Linear
from ...parallelism.tensor_parallel import SINGLE
from ..config.model_config import ModelConfig
from ..deepseek import DeepseekDecoderLayer, DeepseekV3ForCausalLM
from ..layers import RMSNorm
from ..llama import LlamaForCausalLM
from ..loader import WAYS_OUT, ModelSource, defaults
from ..model_files import weight_files
from ..moe import mixture_of, sizes_of
from ..weight_headers import EMBEDDINGS, HEAD, WeightHeaders
from ..weights import load_weights, quantized_layers
from .eagle import EVERY
from .head import DraftHead

REPEATED = {"embed_tokens.weight": EMBEDDINGS[0], "shared_head.head.weight": HEAD}
"""What a module's tensors repeat of the model's."""
OWN = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}
"""A module's layers beside the decoder layer, by their names in a checkpoint."""


class MtpHead(DraftHead):
    """Norms, the matrix that joins embedding and feature, and a decoder layer.

    Args:
        target: the model for which it drafts.

    Attributes:
        logits: the target's head, [N, hidden] -> [N, V].
    """

    logits: Callable[[Tensor], Tensor]

    def __init__(self, target: ModelConfig) -> None:
        super().__init__()
        mixture, size = mixture_of(target), target.hidden_size
        dense = frozenset({0} if target.num_layers in mixture.dense_layers else ())
        one = replace(target, num_layers=1, mixture=replace(mixture, dense_layers=dense))
        self.enorm, self.hnorm = RMSNorm(size, target.norm_eps), RMSNorm(size, target.norm_eps)
        self.eh_proj = Linear(2 * size, size, bias=False)
        self.layer = DeepseekDecoderLayer(one, 0, SINGLE)
        self.norm = RMSNorm(size, target.norm_eps)

    def forward(self, embedded: Tensor, features: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        joined = torch.cat((self.enorm(embedded), self.hnorm(features)), dim=1)
        return self.run_layers(self.eh_proj(joined), rope, metadata)

    def run_layers(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        out: Tensor = self.layer(hidden, rope, metadata)
        return out

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.layer.modules())

    def best(self, hidden: Tensor, count: int) -> Tensor:
        return self.logits(self.norm(hidden)).topk(count, dim=1).indices

    @property
    def parts(self) -> list[tuple[nn.Module, bool]]:
        return [(self, True)]


class MtpCheckpoint(DeepseekV3ForCausalLM):
    """The head as `load_weights` fills it: of a checkpoint's tensors it takes those of one layer, and places them as the
    model's own."""

    def __init__(self, config: ModelConfig) -> None:
        Layer.__init__(self)  # of the model it shares where tensors go, and no layer
        self.config, self.mine = config, SINGLE.experts(len(sizes_of(config)))
        self.prefix = prefix_of(config)
        self.head = MtpHead(config)

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if not name.startswith(self.prefix) or (inner := name.removeprefix(self.prefix)) in REPEATED:
            return None
        if (placed := super().place(f"model.layers.0.{inner}", tensor)) is None:
            return None
        path, _, kind = placed[0].removeprefix("model.layers.0.").rpartition(".")
        return f"head.{OWN.get(path, f'layer.{path}')}.{kind}", placed[1], placed[2]


@dataclass(frozen=True, slots=True)
class FoundMtp:
    """A model's first module, by the headers of its files: those that hold tensors of it."""

    folder: Path
    files: list[Path]

    def load(self, target: LlamaForCausalLM, dtype: torch.dtype) -> MtpHead:
        """See `FoundHead.load`."""
        with defaults(dtype, torch.device("cpu")), torch.inference_mode(False), torch.no_grad():
            checkpoint = MtpCheckpoint(target.config)
            load_weights(checkpoint, self.files, quantized_layers(self.files, target.config), {}, progress=True)
        checkpoint.head.logits = target.compute_logits
        return checkpoint.head.eval()


def prefix_of(config: ModelConfig) -> str:
    """What the names of the first module's tensors begin with: it lies behind the model's last layer."""
    return f"model.layers.{config.num_layers}."


def find_mtp(source: ModelSource) -> FoundMtp:
    """The module in a model's own files.

    Raises:
        ValueError: the model is of another family, or its files hold no module, or one with an embedding or head of its own;
            one line.
    """
    config, path = source.config, source.path
    if config.architecture != "DeepseekV3ForCausalLM":
        raise ValueError(f"only DeepSeek-V3 and its kin have such modules, and {source.name} is a {config.architecture}")
    if path is None:
        raise ValueError("--load-format dummy makes no such module; use ngram")
    weights, prefix = WeightHeaders.open(weight_files(path, WAYS_OUT)), prefix_of(config)
    if f"{prefix}eh_proj.weight" not in weights.shapes:
        raise ValueError(
            f"{source.name} was saved without its module for more tokens ({prefix}eh_proj.weight and others), as GGUF files "
            "and what transformers saves are; use ngram"
        )
    for name, original in REPEATED.items():
        copy = prefix + name
        if copy in weights.shapes and original in weights.shapes:
            same = weights.shapes[copy] == weights.shapes[original]
            if not same or not torch.equal(weights.read(copy)[::EVERY], weights.read(original)[::EVERY]):
                raise ValueError(f"{copy} of {source.name} is another than {original}, and drafts here use the model's own")
    return FoundMtp(path, sorted({file for name, (file, _) in weights.homes.items() if name.startswith(prefix)}))
