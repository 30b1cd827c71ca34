"""What all tests share."""

import pytest
import torch

LONG = ["test_site.py", "test_resuming", "test_any_number_of_processes_agrees", "test_demo", "test_script_and_package",
        "test_oracle.py", "learn[bf16", "test_kernels_in_the", "test_two_processes_and",
        "test_exports_depend", "test_interrupted", "test_export.py", "test_train.py"]


def pytest_collection_modifyitems(items):
    "Long tests first: what is left at the end is short, so that the workers finish together."
    items.sort(key=lambda item: next((n for n, part in enumerate(LONG) if part in item.nodeid), len(LONG)))


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
