"""Run directories → tables, figures and pages.

A report reads only the files that a run wrote. It imports nothing of training, so that runs of
another machine or version can be reported too.
"""

from lora_lab.report.best import best_by_experiment
from lora_lab.report.compare import difference_tables
from lora_lab.report.printed_tables import damaged_lines, job_table, runs_table, site_table
from lora_lab.report.run import show_run, write_run
from lora_lab.report.subspace_pairs import SubspacePair, write_pairs
from lora_lab.report.sweep import show_sweep, write_sweep
from lora_lab.report.tables import terminal_table

__all__ = [
    "SubspacePair",
    "best_by_experiment",
    "damaged_lines",
    "difference_tables",
    "job_table",
    "runs_table",
    "show_run",
    "show_sweep",
    "site_table",
    "terminal_table",
    "write_pairs",
    "write_run",
    "write_sweep",
]
