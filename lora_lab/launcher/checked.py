"""Hydra's own sweeper, over points that have been composed and checked before."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from lora_lab import multirun


class CheckedSweeper(BasicSweeper):
    """Leaves out the points that cannot be, and composes none to find out once more."""

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """The overrides of each job."""
        return [point for point in super().get_job_batch() if multirun.can_be(point)]

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """They were."""
