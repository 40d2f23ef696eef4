"""One run of a pack: its parts, and its place among the others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_lab.adapters import Adapter, also_trained, attached
from lora_lab.adapters.trained_in_full import FullParameter
from lora_lab.packing.optimizer import optimizer_settings
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.trial import Trial


@dataclass(eq=False)
class Member:
    """One run of a pack.

    `module` is that of its `trial`, with the run's model, metrics and optimizer settings. `fail`
    marks the run as failed with an error, and closes its directory.
    """

    trial: Trial
    module: LoRAModule
    fail: Callable[[Exception], None]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Its adapters by site."""
        return attached(self.module.model)

    @property
    def in_full(self) -> dict[str, FullParameter]:
        """What it trains in full beside them, by key."""
        return also_trained(self.module.model)

    def sort_key(self) -> Any:
        """Sorts runs so that those of equal ranks, dropout and optimizer settings are neighbours.

        Only neighbours can share a stack. Ascending ranks, so that the last run has the highest.
        """
        recipes = [adapter.recipe for adapter in self.adapters.values()]
        ranks, dropouts = [r.r for r in recipes], [r.dropout for r in recipes]
        return ranks, dropouts, optimizer_settings(self.module)
