"""Run directories → tables and figures. Reads what a run wrote and imports nothing of training."""

from lora_lab.report.best import Best, best
from lora_lab.report.compare import difference
from lora_lab.report.run import listing, show, sites, write
from lora_lab.report.subspace_pairs import SubspacePair, write_pairs
from lora_lab.report.sweep import jobs, table
from lora_lab.report.sweep import show as show_sweep
from lora_lab.report.sweep import write as write_sweep

__all__ = [
    "Best",
    "SubspacePair",
    "best",
    "difference",
    "jobs",
    "listing",
    "show",
    "show_sweep",
    "sites",
    "table",
    "write",
    "write_pairs",
    "write_sweep",
]
