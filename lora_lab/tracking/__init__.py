"""Where numbers go: metrics.jsonl, W&B, and a dashboard in W&B."""
