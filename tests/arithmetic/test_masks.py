"""Hashed masks of dropout: their share of zeros, and that no two elements depend on each other."""

import pytest
import torch
from torch import Tensor

from lora_inject.arithmetic.masks import HASHED

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.cpu("masks are made of seeds there alone"),
]


def mask_of(shape, p, dtype=torch.float32):
    size = torch.Size(shape)
    return HASHED.kept(size, dtype, round(p * 65536), HASHED.draw_seeds(torch.empty(size)))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_everywhere(p):
    rows, columns = 2048, 512
    n = rows * columns
    keep = mask_of((rows, columns), p).double()
    q = 1 - round(p * 65536) / 65536
    deviation = (q * (1 - q)) ** 0.5
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean() - q) < 5 * deviation / n**0.5
    lanes = keep.view(-1, 4)
    assert (lanes.mean(0) - q).abs().max() < 5 * deviation / (n / 4) ** 0.5
    for dim in (0, 1):  # the spread of row and column means is that of independent elements
        count = keep.shape[dim]
        z = (keep.mean(dim) - q) / (deviation / count**0.5)
        assert z.abs().max() < 5.5
        assert 0.85 < z.square().mean() < 1.15
    centred = (keep - q) / deviation
    flat = centred.flatten()
    for lag in (1, 2, 3, 4, 5, 8, columns - 1, columns, columns + 1, 4 * columns):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / n**0.5
    correlation = torch.corrcoef(lanes.t()) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / (n / 4) ** 0.5


def correlations(rows: Tensor) -> Tensor:
    """Of each row with each other one."""
    return torch.corrcoef(rows)[torch.ones(len(rows), len(rows)).triu(1).bool()]


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_two_rows_or_columns_of_a_mask_depend_on_each_other(p, seed):
    # They share keys, so this is where a weak hash would show; 130,000 pairs.
    torch.manual_seed(seed)
    keep = mask_of((512, 2048), p).double()
    for mask in (keep, keep.t()[:512]):  # rows, columns
        found = correlations(mask) * mask.shape[1] ** 0.5
        assert found.abs().max() < 6
        assert 0.98 < found.square().mean() < 1.02
    # Four corners of a rectangle: their keys are not independent, their elements are to be.
    centred = (keep - (1 - p)) / (p * (1 - p)) ** 0.5
    corners = centred[:-1, :-4] * centred[1:, :-4] * centred[:-1, 4:] * centred[1:, 4:]
    assert abs(corners.mean()) < 5 / corners.numel() ** 0.5


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 6), (1, 1)])
def test_a_mask_has_any_shape(shape):
    found = mask_of(shape, 0.1, torch.bfloat16)
    assert found.shape == shape
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
