"""Makes `python -m lora_lab.cli` the `lora-lab` command."""

from lora_lab.cli.main import main

main()
