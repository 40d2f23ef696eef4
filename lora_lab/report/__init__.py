"""Run directories → tables and figures. Reads what a run wrote and imports nothing of training."""

from lora_lab.report.pairs import Pair, pairs
from lora_lab.report.run import listing, show, sites, write
from lora_lab.report.sweep import jobs
from lora_lab.report.sweep import show as show_sweep
from lora_lab.report.sweep import write as write_sweep

__all__ = [
    "Pair",
    "jobs",
    "listing",
    "pairs",
    "show",
    "show_sweep",
    "sites",
    "write",
    "write_sweep",
]
