"""What learns: one model per file, each a plain nn.Module that knows nothing of LoRA."""
