"""Task 0.2: what was computed of earlier tokens is kept."""

from __future__ import annotations

import pytest
import torch

from stages.stage0_warm_up.warm_up import attend


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 1), (9, 16)])
def test_0_2_with_a_cache_it_is_the_attention_of_pytorch(length: int, width: int) -> None:
    """Token by token with your cache, and all at once with `scaled_dot_product_attention` and a causal mask: the same rows.

    Why: the cache must change the cost and nothing else. Every later chapter rests on this equality.
    """
    torch.manual_seed(length)
    query, key, value = torch.randn(3, length, width, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    rows = [attend(query[i], key[i], value[i], keys, values) for i in range(length)]
    torch.testing.assert_close(torch.stack(rows), expected)


def test_0_2_the_cache_grows_by_the_new_token() -> None:
    """After three tokens it holds their three keys and values, in their order, as they were handed in.

    Why: memory for this list is what an engine manages. You will hand it out in blocks in stage 1.
    """
    vectors = torch.randn(3, 2, 4)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for key, value in vectors:
        attend(torch.ones(4), key, value, keys, values)
    assert torch.equal(torch.stack(keys), vectors[:, 0])
    assert torch.equal(torch.stack(values), vectors[:, 1])
