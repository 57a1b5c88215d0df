"""Which KV blocks hold which tokens, as a tree of texts, so that two prompts share all tokens up to the first that differs.

A path from the root is a text, a node one block of it: the tokens that the block holds behind those of its parents. The last
block of a text need not be full. The nodes below a node lie in the order of their tokens, so what a text shares with any of
them in part is found by bisection. Nothing is hashed: a hit has compared the tokens themselves.
Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, §3 (RadixAttention).
There an edge is a run of tokens of any length, and a slot of memory holds one token. Here memory comes in blocks, and so do
edges.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import count, takewhile

from ..batching.sequence import Sequence
from .prefix_cache import PrefixCache

Tokens = tuple[int, ...]


class Node:
    """A block of a text.

    Attributes:
        tokens: what it holds, as many as a block, or fewer at the end of a text.
        block: where that is; None: it was overwritten, and the node stands for the text that others go on from.
        children: by their tokens; order: their keys, sorted.
    """

    __slots__ = ("block", "children", "key", "order", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, key: bytes) -> None:
        self.parent, self.tokens, self.key = parent, tokens, key
        self.block: int | None = None
        self.children: dict[Tokens, Node] = {}
        self.order: list[Tokens] = []


class RadixCache(PrefixCache):
    """A `PrefixCache` that knows tokens in the place of hashes. What it hands out as the hash of a block is its node's number.

    Args:
        block_size: tokens in a full block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self._numbers = count()
        self._top = Node(None, (), b"")
        """Its children are the roots, one for each cache salt; see `salt_tokens`."""
        self._nodes: dict[bytes, Node] = {}

    def block_hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Numbers of the nodes of a sequence's first full blocks, which are made where there are none; see `insert`."""
        keys, size = seq.block_hashes, self.block_size
        node = self._nodes.get(keys[-1]) if keys else None
        if node is None:  # none was made, or the last one went while nobody held its block
            keys.clear()
            node = self._root(seq)
        for index in range(len(keys), num_blocks):
            node = self._child(node, tuple(seq.tokens[index * size : (index + 1) * size]))
            keys.append(node.key)
        return keys

    def match(self, seq: Sequence) -> list[int]:
        """The longest run of full cached blocks that a sequence begins with; see `PrefixCache.match`."""
        return [node.block for node in self._path(seq) if node.block is not None]

    def match_part(self, seq: Sequence, num_blocks: int) -> tuple[int, int]:
        """What the block behind the first `num_blocks`, which `match` has found, shares with one in the cache.

        The node that `match` ended at has the candidates below it. Their tokens are sorted, so those that share most with the
        sequence stand next to the place where its own would be, and further away none shares more. One that was overwritten
        has nothing to copy from.

        Returns:
            The block that shares most, any of those that share as much, and how many tokens. The sequence's last token is not
            among them: it must be computed. (0, 0) if none shares any.
        """
        raise NotImplementedError(
            "Stage 4 · Task 4.11: RadixCache.match_part, see stages/stage4_optimization/GUIDE.md#task-4-11"
        )

    def insert_end(self, seq: Sequence, num_tokens: int, block: int) -> None:
        """Record that `block` holds the last tokens of the first `num_tokens` of a sequence, which do not fill it."""
        num_blocks = num_tokens // self.block_size
        keys = self.block_hashes(seq, num_blocks)
        node = self._nodes[keys[num_blocks - 1]] if num_blocks else self._root(seq)
        end = self._child(node, tuple(seq.tokens[num_blocks * self.block_size : num_tokens]))
        self.insert(end.key, block)
        self._prune(end)

    def insert(self, block_hash: bytes, block: int) -> None:
        """Record what a block holds. The first block of a node stays."""
        super().insert(block_hash, block)
        if self._block_of.get(block_hash) == block:
            self._nodes[block_hash].block = block

    def forget(self, block: int) -> None:
        """Drop a block's entry, if it has one. What goes on from it stays for as long as that is cached."""
        key = self._hash_of.get(block)
        super().forget(block)
        if key is not None:
            self._nodes[key].block = None
            self._prune(self._nodes[key])

    def clear(self) -> None:
        super().clear()
        self._top = Node(None, (), b"")
        self._nodes.clear()

    def check_invariants(self) -> None:
        """As `PrefixCache.check_invariants`; each node is its parent's child, and has a block or children.

        Raises:
            AssertionError: names the node that breaks the rule.
        """
        super().check_invariants()
        assert {key: node.block for key, node in self._nodes.items() if node.block is not None} == self._block_of
        for node in (*self._nodes.values(), self._top):
            assert node is self._top or node.block is not None or node.children, f"node {node.key!r} stands for nothing"
            assert node.order == sorted(node.children), f"the order below node {node.key!r} is not that of its children"
            for tokens, child in node.children.items():
                assert (child.parent, child.tokens) == (node, tokens), f"node {child.key!r} lies below another node"

    def _root(self, seq: Sequence) -> Node:
        return self._child(self._top, salt_tokens(seq))

    def _child(self, node: Node, tokens: Tokens) -> Node:
        child = node.children.get(tokens)
        if child is None:
            child = node.children[tokens] = Node(node, tokens, next(self._numbers).to_bytes(8, "big"))
            insort(node.order, tokens)
            self._nodes[child.key] = child
        return child

    def _path(self, seq: Sequence) -> Iterator[Node]:
        """The nodes of the full cached blocks that a sequence begins with, from the first block on.

        They end where a node is missing or was overwritten, or its block would hold the sequence's last token, which must be
        computed. Nothing is made.
        """
        # Hint: Draw the tree of three texts with blocks of 2, and cross out a block in the middle: what may still be
        # found?
        raise NotImplementedError("Stage 4 · Task 4.11: RadixCache._path, see stages/stage4_optimization/GUIDE.md#task-4-11")

    def _prune(self, node: Node) -> None:
        """Take a node that has neither a block nor children out of the tree, with those above it that are left with neither.

        Its parent's `children` and `order`, and `_nodes`, know it no longer. The node above all, which has no parent, stays.
        """
        raise NotImplementedError("Stage 4 · Task 4.11: RadixCache._prune, see stages/stage4_optimization/GUIDE.md#task-4-11")


def salt_tokens(seq: Sequence) -> Tokens:
    """What stands for a sequence's cache salt in the tree."""
    return (-1,) if seq.cache_salt is None else tuple(seq.cache_salt.encode())


def shared_length(first: Tokens, second: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
