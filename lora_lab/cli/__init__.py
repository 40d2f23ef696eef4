"""The `lora-lab` command: what can be typed, its help, and what each subcommand prints."""
