"""What a head computes in a pass, from tokens and features to the tokens that it holds for the likeliest.

A pass is short: of the default model's head it reads ten megabytes, and to call PyTorch twenty times takes longer. So where all
that a head computes is native kernels, a pass is recorded as a model's layers are (`graphs/replay.py`), from the rows of the
embedding to the best of the logits, and replayed by two calls. All that a draft's passes need to know is worked out before the
first of them, as other threads fall asleep where a kernel is not soon followed by the next, and take long to wake.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...attention.paged_attention import AttentionMetadata
from ...models.heads.eagle import EagleHead
from ...models.heads.head import DraftHead
from ...models.kernels.attach import packed_of
from ...models.kernels.layers_cpu import NativeRows
from ...models.layers import Attention
from ...models.llama import LlamaModel
from ...models.rope import RotaryEmbedding
from ..graphs.replay import MIN_ROWS, Replay
from ..platform import native
from ..sampling.selection_cpu import NativeBest

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a draft, over T tokens, and the m of its outputs behind which tokens are wanted.

    Attributes:
        tokens: [T], where each token stands among those that the pass before has found, [m, most] one behind the other, or
            that the first one was given. features: [T], the same of the feature before it, among m outputs.
        positions: [T], of the features. metadata: of one layer. outputs: [m], which; None: all.
    """

    tokens: Int64s
    features: Int64s
    positions: Int64s
    metadata: AttentionMetadata
    outputs: Int64s | None = None


class HeadPasses:
    """Passes of any head, operation by operation.

    Args:
        head: drafts. body: the target's, for its embedding and its positions. most: likeliest tokens that are wanted.
    """

    def __init__(self, head: DraftHead, body: LlamaModel, most: int) -> None:
        self.head, self.body, self.most = head, body, most
        self._tokens, self._features = torch.empty(0), torch.empty(0)

    def begin(self, tokens: list[int], features: list[Tensor]) -> None:
        """Give the first pass of a draft its T tokens, and their features [n, hidden], T together."""
        self._tokens, self._features = torch.tensor(tokens), torch.cat(features)

    def run(self, step: Pass) -> Int64s:
        """The likeliest tokens behind each of the m outputs, in that order: [m, most]. The next pass may overwrite them."""
        rope = self.body.rotary_emb(torch.from_numpy(step.positions))
        embedded = self.body.embed_tokens(self._tokens[torch.from_numpy(step.tokens)])
        out = self.head(embedded, self._features[torch.from_numpy(step.features)], rope, step.metadata)
        self._features = out if step.outputs is None else out[torch.from_numpy(step.outputs)]
        best = self.head.best(self._features, self.most)
        self._tokens = best.flatten()
        found: Int64s = best.numpy()
        return found


class RecordedPasses(HeadPasses):
    """Passes of a head that is native kernels throughout.

    Args:
        rows: outputs of a pass, at most. The rest: as of `HeadPasses`.
    """

    head: EagleHead

    def __init__(self, head: EagleHead, body: LlamaModel, most: int, rows: int) -> None:
        super().__init__(head, body, most)
        self._best = NativeBest(head.token_ids, most, body.embed_tokens.weight.dtype)
        self._make_room(max(rows, MIN_ROWS))

    def begin(self, tokens: list[int], features: list[Tensor]) -> None:
        if (count := len(tokens)) > len(self._tokens):
            self._make_room(1 << (count - 1).bit_length())
        self._given[:count] = tokens
        torch.cat(features, out=self._features[:count])

    def run(self, step: Pass) -> Int64s:
        indices = torch.from_numpy(step.tokens), torch.from_numpy(step.features), torch.from_numpy(step.positions)
        out = self._pass.run((indices, step.metadata), len(step.tokens))
        count = len(out) if step.outputs is None else len(step.outputs)
        self._outputs[:count] = self._all[:count] if step.outputs is None else step.outputs
        if self._num_recordings != self._pass.num_recordings:  # its outputs lie elsewhere
            self._record(out, count)
        else:
            self._choice.replay(count)
        return self._found[:count]

    def _make_room(self, rows: int) -> None:
        """Take buffers for passes over so many tokens, and begin new recordings."""
        embedding = self.body.embed_tokens.weight
        self._tokens = torch.empty(rows, self.most, dtype=torch.int64)
        self._features = embedding.new_empty(rows, embedding.shape[1])
        self._found, self._given = self._tokens.numpy(), self._tokens.view(-1).numpy()
        self._all, self._outputs = np.arange(rows), np.empty(rows, np.int64)
        self._pass, self._num_recordings = PassReplay(self.head, self.body, self._tokens.view(-1, 1), self._features), 0

    def _record(self, out: Tensor, count: int) -> None:
        """Let the wanted ones of a pass's outputs become the next features, and find the likeliest tokens behind them."""
        features = self._features[:count]
        with native.Recording(len(self._tokens)) as self._choice:
            NativeRows(out)(torch.from_numpy(self._outputs[:count]), features)
            self._best(self.head.lm_head(features), self._tokens[:count])
        self._num_recordings = self._pass.num_recordings


class PassReplay(Replay):
    """A pass up to its outputs, of three indices [T] each, the fields of `Pass`.

    Args:
        tokens: [n, 1]. features: [n, hidden]; what the first two indices point into. The rest: as of `HeadPasses`.
    """

    def __init__(self, head: EagleHead, body: LlamaModel, tokens: Tensor, features: Tensor) -> None:
        attention = next(layer for layer in head.layers if isinstance(layer, Attention))
        super().__init__([torch.empty(0, dtype=torch.int64)] * 3, attention)
        self._head, self._dtype, self._hidden_size = head, features.dtype, features.shape[1]
        self._tokens, self._features, self._embedding = map(NativeRows, (tokens, features, body.embed_tokens.weight))
        rotary = body.rotary_emb
        assert isinstance(rotary, RotaryEmbedding)  # as all that an EAGLE head drafts for have
        self._rope = NativeRows(rotary.cos), NativeRows(rotary.signed_sin)
        product = packed_of(head.fc)
        assert product is not None  # it is native
        product.kind = "joined"  # its result is what the layer adds to

    def compute(self, inputs: Many[Tensor], metadata: AttentionMetadata) -> Tensor:
        (tokens, features, positions), rows, size = inputs, len(inputs[0]), self._hidden_size
        ids = self._tokens(tokens, native.result("ids", rows, 1, torch.int64))
        pairs = native.result("pairs", rows, 2 * size, self._dtype)
        self._embedding(ids[:, 0], pairs[:, :size])
        self._features(features, pairs[:, size:])
        width = self.attention.head_dim
        cos, sin = (
            table(positions, native.result(kind, rows, width, self._dtype)).unsqueeze(1)
            for table, kind in zip(self._rope, ("cos", "sin"), strict=True)
        )
        return self._head.run_layers(self._head.fc(pairs), (cos, sin), metadata)
