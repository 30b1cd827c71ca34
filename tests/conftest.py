"""What all tests share."""

import pytest
import torch


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
