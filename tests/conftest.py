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
