"""Mixture of experts (Shazeer et al., 2017; Fedus et al., "Switch Transformers", 2022): many MLPs, few for each token.

How it differs from ``llama.py``: a router, one small product, says how much each of a layer's experts suits a token. The token
goes through the few that suit it best, and their results are summed with weights that the router has given. So a model may have
ten times the weights that a token is multiplied with. A batch is not as cheap as elsewhere, though: its tokens go to different
experts, and each expert that any of them chose has to be read.

Pairs of a token and an expert that it chose are sorted by expert, so that an expert is one product over neighbouring rows. An
expert that nobody chose is not read at all. Passes over a loaded model replace `Experts.multiply` or all of `Experts.forward`.

Several ranks cut every expert, as they cut an MLP, or each has some experts whole: see ``sparse.py``, which also has the layer
and the model around all this.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..parallelism.linear import Linear, WeightLayer, copy_weight
from ..parallelism.tensor_parallel import TensorParallel
from .config.experts import Mixture
from .config.model_config import ModelConfig
from .llama import GatedMLP


def mixture_of(config: ModelConfig) -> Mixture:
    """The experts of a model that has some."""
    assert config.mixture is not None, "this family has experts"
    return config.mixture


def sizes_of(config: ModelConfig) -> list[int]:
    """The widths of a layer's experts; the shared one is the last."""
    mixture = mixture_of(config)
    return [mixture.size] * mixture.count + [mixture.shared_size] * (mixture.shared_size > 0)


class Router(Linear):
    """How much each expert suits a token: [T, hidden] -> [T, E]. A shared expert that is weighed has a column of its own, the
    last."""

    def __init__(self, config: ModelConfig) -> None:
        mixture = mixture_of(config)
        self.count = mixture.count
        columns = mixture.count if mixture.routing else len(sizes_of(config))
        super().__init__(config.hidden_size, columns, mixture.clamped is not None)
        if len(self.weight) > self.count:
            self.shard_ids = ("routed", "shared")

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        copy_weight(param[self.count :] if shard_id == "shared" else param[: self.count], loaded)


class Experts(WeightLayer):
    """This rank's experts of a layer, by their numbers.

    Attributes:
        kind: the class of an expert, for families that differ there.
        activation: what makes a shared expert's weight of its logit.
        load: [E] int64, tokens that each expert was chosen for since the start, those of other ranks too.
    """

    kind: type[GatedMLP] = GatedMLP

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.hidden_size, self.mixture, sizes = config.hidden_size, mixture_of(config), sizes_of(config)
        self.mine = parallel.experts(len(sizes))
        cut = TensorParallel() if parallel.whole_experts else replace(parallel, communicator=None)  # summed once for all
        for number in range(self.mine.start, self.mine.stop):
            expert = replace(config, intermediate_size=sizes[number], mlp_bias=self.mixture.clamped is not None)
            self.add_module(str(number), self.kind(expert, cut))
        self.activation = torch.sigmoid
        self.load: Tensor
        self.register_buffer("load", torch.zeros(len(sizes), dtype=torch.int64), persistent=False)

    @property
    def own(self) -> dict[int, GatedMLP]:
        """This rank's, by number."""
        return {int(name): expert for name, expert in self.named_children() if isinstance(expert, GatedMLP)}

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights.

        A token's scores are the softmax of its logits over all routed experts, in float32 whatever the logits are. It chooses
        the `mixture.chosen` experts with the highest scores, and these are their weights; with `mixture.renormalise` divided by
        their sum. A shared expert (`mixture.shared_size` is not 0) is chosen by every token as well; its weight is the sigmoid
        of its own logit (`activation`), which no softmax sees.

        Args:
            logits: [T, E], the router's; a shared expert's column is the last, number ``mixture.count``.

        Returns:
            Weights [T, k] float32, and numbers of experts [T, k] int64; the shared one is a token's last.
        """
        # Hint: Write down three tokens that choose two of four experts each. Sort the six pairs by expert: which token
        # does each row come from, and where does each row go back to?
        raise NotImplementedError("Stage 4 · Task 4.13: Experts.choose, see stages/stage4_optimization/GUIDE.md#task-4-13")

    def forward(self, x: Tensor, logits: Tensor, add_to: Tensor | None = None) -> Tensor:
        """What this rank's experts say of each token, weighted and summed: [T, hidden], added to `add_to` if that is given.

        Each token makes a pair with each expert that it chose (`choose`). `multiply` is called once, with all pairs sorted by
        expert, so that an expert's rows are neighbours. What it gives goes back to the tokens: each token's rows by their
        weights, summed in float32, and rounded to the type of `x` once. `load` grows by the pairs of each expert, those of
        other ranks' experts too.

        Args:
            x: [T, hidden]; it stays as it is. logits: [T, E].

        Returns:
            `add_to` itself, with the sums added in place; without it a new tensor.
        """
        raise NotImplementedError("Stage 4 · Task 4.13: Experts.forward, see stages/stage4_optimization/GUIDE.md#task-4-13")

    def multiply(self, rows: Tensor, bounds: Tensor) -> Tensor:
        """Each row through its expert; zeros for experts of other ranks.

        Args:
            rows: [T·k, hidden], sorted by expert. bounds: [E + 1], where the rows of each expert begin.
        """
        out, starts = torch.zeros_like(rows), bounds.tolist()
        for number, expert in self.own.items():
            first, last = starts[number], starts[number + 1]
            if first < last:
                out[first:last] = expert(rows[first:last], None)
        return out


def expert_load(model: nn.Module) -> list[int]:
    """Tokens that the experts of each number were chosen for since the start, in all layers together; [] without experts."""
    loads = [layer.load for layer in model.modules() if isinstance(layer, Experts)]
    return torch.stack(loads).sum(dim=0).tolist() if loads else []
