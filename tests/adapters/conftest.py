"""Tensors here are tiny: two threads would spend their time waiting for each other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    """In place of every test's own folder: thousands of them here write nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
