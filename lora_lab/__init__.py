"""Experiments with low-rank adaptation: which rank, which alpha, which layers, and what ΔW is."""

__version__ = "0.1.0"
