"""How the torch backend cuts its input: every row once, whole tiles, no block over its size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dydila_kernels.torch_backend.blocks import ROW_TILE, image_blocks, router_choices, router_logits


@given(st.integers(0, 5), st.integers(0, 50), st.integers(0, 5000), st.integers(1, 700))
def test_blocks_hold_every_row_once(batch: int, start: int, tokens: int, rows: int) -> None:
    blocks = list(image_blocks(batch, start, start + tokens, rows))
    seen = torch.zeros(batch, start + tokens, dtype=torch.int)
    for images, ranges in blocks:
        lengths = [r.stop - r.start for r in ranges]
        assert max(lengths) * len(seen[images]) <= rows
        if rows >= ROW_TILE:
            assert all(length % ROW_TILE == 0 for length in lengths[:-1])
        # No more blocks than the size demands, but for what rounding down to whole tiles costs.
        assert len(ranges) == -(-tokens // max(lengths))
        for r in ranges:
            seen[images, r] += 1
    assert not seen[:, :start].any() and (seen[:, start:] == 1).all()


@given(st.integers(1, 3), st.integers(1, 700))
def test_router_products_do_not_depend_on_how_rows_are_shared_out(batch: int, tokens: int) -> None:
    """Primes, multiples of small numbers, and one row."""
    torch.manual_seed(tokens)
    z, other = torch.randn(2, batch, tokens, 5, dtype=torch.float64)
    routers = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = z @ routers[0] + other @ routers[1]
    products = (z, routers[0]), (other, routers[1])
    torch.testing.assert_close(router_logits(*products), expected)
    assert torch.equal(router_choices(*products), expected.argmax(-1))
