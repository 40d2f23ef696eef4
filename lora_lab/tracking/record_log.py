"""Reads the framing of a .wandb file: chunks in blocks, as in LevelDB's logs."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

FILE_HEADER = 7
"""Bytes at the start of a file: W&B's mark and a version."""

BLOCK = 32768
"""Bytes of a block; no chunk crosses the end of one."""

CHUNK_HEADER = struct.Struct("<IHB")
"""Before each chunk: its crc32, its length, and its type (see FULL and the others)."""

FULL, FIRST, LAST = 1, 2, 4
"""Types of chunks: a complete record, or the first, (3) a middle or the last part of one."""


def records(path: Path) -> Iterator[bytes]:
    """The records of a file as bytes. Ends where a crash or a full disk cut the file.

    A record of 40,000 bytes, as one that holds a long table, is a chunk of type 2 up to the end of
    the first block and one of type 4 in the second.
    """
    content, position, record = path.read_bytes(), FILE_HEADER, b""
    while True:
        # A block's end that is too short for a header is padding.
        if (left := BLOCK - position % BLOCK) < CHUNK_HEADER.size:
            position += left
        start = position + CHUNK_HEADER.size
        if start > len(content):
            return
        crc, length, chunk_type = CHUNK_HEADER.unpack_from(content, position)
        chunk = content[start : start + length]
        # The checksum is over the type, then the bytes.
        if len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([chunk_type]))) != crc:
            return
        position = start + length
        record = chunk if chunk_type in (FULL, FIRST) else record + chunk
        if chunk_type in (FULL, LAST):
            yield record
