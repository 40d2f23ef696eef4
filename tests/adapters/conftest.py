"""One thread for each test: tensors here are tiny, and threads would wait for each other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    """Replaces the folder that other tests get each: the thousands of tests here write nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
