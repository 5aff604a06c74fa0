"""A Gram matrix of which only one triangle is computed is still the Gram matrix."""

from __future__ import annotations

import pytest
import torch

from diffedit.linalg import gram
from diffedit.linalg.gram import gram_factors
from diffedit.linalg.rows import reduce_batch


@pytest.mark.parametrize(("rows", "width"), [(300, 7), (50, 192), (500, 193), (400, 401), (0, 30)])
def test_strips_are_the_whole_product(rows, width):
    random = torch.Generator().manual_seed(rows + width)
    matrix = torch.randn(rows, width, generator=random, dtype=torch.float64)
    found, plain = gram.gram(matrix), matrix.T @ matrix
    largest = max(1.0, float(plain.abs().max())) if rows else 1.0
    assert found.shape == (width, width)
    assert float((found - plain).abs().max()) <= 1e-13 * largest
    assert float((found - found.T).abs().max()) <= 1e-13 * largest


def test_the_solution_of_several_strips_satisfies_the_normal_equations():
    random = torch.Generator().manual_seed(0)
    keys, residuals, held = (torch.randn(n, 250, generator=random, dtype=torch.float64) for n in (600, 600, 40))
    found = gram_factors(keys, residuals, held, 0.5)
    assert found is not None
    a = keys.T @ keys + held.T @ held + 0.5 * torch.eye(250, dtype=torch.float64)
    change = found.up @ found.down
    assert float((change @ a - residuals.T @ keys).norm()) <= 1e-11 * float((residuals.T @ keys).norm())
    left = (residuals - keys @ change.T).norm() / residuals.norm()
    assert found.residual == pytest.approx(float(left), rel=1e-9)
    drift = (held @ change.T).norm() / residuals.norm()
    assert found.drift == pytest.approx(float(drift), rel=1e-9)


def test_reduced_rows_give_the_same_products_where_nothing_is_dropped_and_where_something_is():
    random = torch.Generator().manual_seed(1)
    keys, residuals = (torch.randn(5, 4, 12, generator=random, dtype=torch.float64) for _ in range(2))
    keys[3, 3], residuals[3, 3] = keys[3, 0], residuals[3, 0]  # one set with a row too many
    for weights in (torch.ones(5, 4, dtype=torch.float64), torch.rand(5, 4, generator=random, dtype=torch.float64)):
        k, r, ranks = reduce_batch(keys, residuals, weights, 1e-6)
        assert ranks == (4, 4, 4, 3, 4)
        for i, (own, asked) in enumerate(zip(k.split(list(ranks)), r.split(list(ranks)), strict=True)):
            weighted = keys[i].T * weights[i]
            torch.testing.assert_close(own.T @ own, weighted @ keys[i], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(own.T @ asked, weighted @ residuals[i], rtol=1e-9, atol=1e-9)
