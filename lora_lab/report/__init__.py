"""Run directories → tables and figures. Reads what a run wrote and imports nothing of training."""

from lora_lab.report.run import listing, show, sites, write

__all__ = ["listing", "show", "sites", "write"]
