"""Models: one file each, plain nn.Modules that know nothing of LoRA."""
