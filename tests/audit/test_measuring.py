"""What is measured of layers as they run: sizes of updates, and ranks of what A makes."""

import pytest
import torch
from torch import nn

from lora_inject import audit, inject

pytestmark = pytest.mark.usefixtures("device")


def inputs(smallest):
    """Eight rows of which each singular value is smaller than the one before."""
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), 8)
    rows, directions = (torch.linalg.qr(torch.randn(n, 8))[0] for n in (8, 16))
    return rows * values @ directions.mT


@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-3, 1e-4, 1e-6])
def test_a_sound_adapter_uses_its_rank_whatever_it_reads(smallest):
    """Directions that an input hardly has are none that A could fill."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 4))
        inject(model, "0", r=8)
        assert "rank-unused" not in audit(model, inputs(smallest)).codes, seed


def test_an_adapter_whose_rows_are_alike_does_not():
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 4))
        inject(model, "0", r=8)
        model[0].lora_A.data[5:] = model[0].lora_A.data[:3]
        (found,) = [f for f in audit(model, inputs(0.1)).findings if f.code == "rank-unused"]
        assert found.detail == "5 of 8"
