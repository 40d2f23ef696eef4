"""Callbacks: when to measure and what to show; the maths is elsewhere."""
