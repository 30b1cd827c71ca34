"""What all tests share."""

import itertools
import os

import pytest
import torch

LONG = ["test_site.py", "test_resuming", "test_any_number_of_processes_agrees", "test_demo", "test_script_and_package",
        "test_oracle.py", "learn[bf16", "test_kernels_in_the", "test_two_processes_and",
        "test_exports_depend", "test_interrupted", "test_export.py", "test_train.py"]


def pytest_collection_modifyitems(items):
    """Long tests first in the share that each worker begins with, so that what is left at the end is short.

    Workers get contiguous shares of equal size and steal later. The first gets all tests of the site, built once.
    """
    place = {item: next((n for n, part in enumerate(LONG) if part in item.nodeid), len(LONG)) for item in items}
    items.sort(key=place.get)
    long = [item for item in items if 0 < place[item] < len(LONG)]
    others = iter([item for item in items if place[item] == len(LONG)])
    helpers = max(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - 1, 1)
    shares = [[item for item in items if place[item] == 0], *(long[n::helpers] for n in range(helpers))]
    ordered, left = [], len(items)
    for n, share in enumerate(shares):
        size = left // (len(shares) - n)
        left -= size
        ordered += [*share, *itertools.islice(others, max(0, size - len(share)))]
    items[:] = [*ordered, *others]


@pytest.fixture(autouse=True)
def one_thread():
    "Torch on one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several test runs may share two cores
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler():
    "Nothing compiled before, nothing left behind."
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
