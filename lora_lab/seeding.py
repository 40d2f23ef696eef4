"""Random generators by key: what is drawn with one key does not depend on any other draw."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the hash of `key`, as (seed, site, r): the same on all machines.

    The seed is the first 8 bytes of the SHA-256 of the key's parts joined by slashes. (Python's
    built-in `hash` of a text differs from process to process.)
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
