"""Random generators by key: each thing that is drawn has its generator, independent of all others."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the hash of `key`, as ("adapter", site, r): alike on all machines.

    The seed is the first 8 bytes of the SHA-256 of the key's parts joined by slashes. Python's own
    `hash` would differ from process to process.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
