"""A row's bits do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch

from diffedit.linalg.product import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 32, 33, 100])
def test_it_is_the_product(n, dtype):
    random = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(k, 24, generator=random, dtype=dtype) for k in (n, 40))
    found = product(rows, weight)
    torch.testing.assert_close(found, rows @ weight.T)
    assert found.shape == (n, 40) and found.is_contiguous() and found.dtype is dtype


@pytest.mark.parametrize("width", [32, 128, 768, 1024])
def test_each_row_has_the_same_bits_alone_and_in_company(width):
    random = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(k, width, generator=random) for k in (101, width))
    whole, threads = product(rows, weight), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for i in (0, 15, 16, 47, 100):
                assert torch.equal(product(rows[i : i + 1], weight)[0], whole[i])
            assert torch.equal(product(rows[40:60], weight), whole[40:60])
    finally:
        torch.set_num_threads(threads)
