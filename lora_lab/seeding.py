"""One generator for each thing that is drawn, so that no draw depends on any other."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of `key` alone, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
