"""Tables of rows from files, folders and the hub, through the `datasets` library."""

from lora_lab.data.content import content_hash

__all__ = ["content_hash"]
