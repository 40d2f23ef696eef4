"""One of the processes that reproduce a run on several devices.

`python -m lora_lab.cli.reproduce_process CONFIG`, where CONFIG is a file with the new run's config.
"""

import sys
from dataclasses import replace
from pathlib import Path

from lora_lab.exit_codes import CTRL_C


def main(config: Path) -> None:
    """Trains this process's part of the run. The command that started it has checked the config."""
    import yaml

    from lora_lab.config import project
    from lora_lab.config.checks import parse_config
    from lora_lab.console import console, show_log, silence_lightning
    from lora_lab.training import devices
    from lora_lab.training.plan import plan

    project.enter()
    silence_lightning()
    show_log()
    cfg = parse_config(yaml.safe_load(config.read_text()))
    devices.run_worker(replace(plan(cfg, is_stored=True), is_reproduction=True), console)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(CTRL_C)
