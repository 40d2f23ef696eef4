"""Whether the config.yaml of a finished run is the one that its directory is named for.

Only of runs of an earlier version, whose status.json has no checksum of it.
"""

import re
from dataclasses import replace

from lora_lab.config.checks import parse_config
from lora_lab.config.schema import ConfigError
from lora_lab.runs import Run


def checked_config(run: Run) -> Run:
    """The run; with a `known_fault`, by which it is damaged, where its config is another one's.

    The name of a directory ends with the first digits of the config's hash. Nothing is told of one
    that is named otherwise, or whose config this version cannot read.
    """
    name_hash, status = run.path.absolute().name.rpartition("-")[2], run.status
    if status["state"] != "finished" or "files" in status:
        return run
    if not re.fullmatch("[0-9a-f]{10}", name_hash):
        return run
    try:
        identity = parse_config(dict(run.config)).identity()
    except (ConfigError, ImportError):
        return run
    if identity.startswith(name_hash):
        return run
    hashes = f"its hash is {identity[:10]}, the directory's name has {name_hash}"
    return replace(run, known_fault=f"config.yaml was changed after the run: {hashes}")
