"""What every test starts from, and ``--device``, which moves the device-agnostic tests to a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests run that fit any device, those with the fixture of this name: cuda",
    )


def pytest_collection_modifyitems(config, items):
    if torch.device(config.getoption("--device")).type == "cuda":
        for item in items:  # cuDNN says so of every LSTM whose weights are computed when read
            item.add_marker(pytest.mark.filterwarnings("ignore:RNN module weights are not part"))


@pytest.fixture
def device(request):
    """The device of this run; tensors and modules are made there unless a test says otherwise."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        yield device
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"--device {device}: there is no GPU here")
    with torch.device(device), torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        yield device
