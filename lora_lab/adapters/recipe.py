"""How an adapter is built: its rank, scale, init and what of it trains."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.init import INITS
from lora_lab.adapters.scaling import SCALINGS

TRAINS = ("both", "zero", "core")
"""What trains of an adapter.

- "both": both factors.
- "zero": only the factor that starts at zero, which is B, or A of an embedding or of the init mica.
  The other one keeps the values it was drawn with (LoRA-FA, Zhang et al. 2023; MiCA).
- "core": only an r × r core between two frozen factors (LoRA-XS, Bałazy et al. 2024).
"""


class AdapterError(ValueError):
    """An adapter that cannot be built, loaded, merged or switched as requested."""


def python_scalar(value: Any) -> Any:
    """The Python number of a scalar of numpy or torch; anything else as it is."""
    is_scalar = hasattr(value, "item") and math.prod(value.shape) == 1
    return value.item() if is_scalar else value


@dataclass(frozen=True)
class Recipe:
    """How an adapter is built: all choices but the place where it sits.

    `init` is a key of INITS, `scaling` a key of SCALINGS, `trains` one of TRAINS, `form` a key of
    FORMS. `dropout` is the probability with which an input feature of the adapter is dropped in
    training.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    init: str = "kaiming"
    scaling: str = "alpha/r"
    trains: str = "both"
    dora: bool = False
    form: str = "lora"

    def __post_init__(self):
        """Makes Python's numbers of those of numpy and torch, which no JSON file can hold."""
        for field in fields(self):
            object.__setattr__(self, field.name, python_scalar(getattr(self, field.name)))

    def check(self) -> None:
        """Raises AdapterError for a choice that does not exist or does not go with another."""
        if type(self.r) is not int or self.r < 1:
            raise AdapterError(f"r={self.r!r}: must be an integer of at least 1")
        for name in ("alpha", "dropout"):
            if type(value := getattr(self, name)) not in (int, float):
                raise AdapterError(f"{name}={value!r}: must be a number")
        if type(self.dora) is not bool:
            raise AdapterError(f"dora={self.dora!r}: must be True or False")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"alpha={self.alpha}: must be more than 0")
        tables = {"init": INITS, "scaling": SCALINGS, "trains": TRAINS, "form": FORMS}
        for name, table in tables.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in table:
                raise AdapterError(f"{name}={value!r}: must be one of {', '.join(table)}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout={self.dropout}: must be at least 0 and less than 1")
        for name, default in (("init", "kaiming"), ("trains", "both")):
            if FORMS[self.form] is not None and (value := getattr(self, name)) != default:
                raise AdapterError(
                    f"{name}={value} with form={self.form}, which decides that itself: "
                    f"take {name}={default}, or form=lora"
                )
        if self.trains == "core" and not INITS[self.init].starts_nonzero:
            able = ", ".join(name for name, init in INITS.items() if init.starts_nonzero)
            zero = INITS[self.init].zero_factor or "B"
            raise AdapterError(
                f"trains=core with init={self.init}: {zero} is zero, so no core could move ΔW; "
                f"take an init from the weight: {able}"
            )

    def with_rank(self, r: int) -> "Recipe":
        """The recipe at another rank, with the alpha that keeps the scale."""
        scale = SCALINGS[self.scaling]
        return replace(self, r=r, alpha=self.alpha * scale(1, self.r) / scale(1, r))

    def check_shared(self, site: str) -> None:
        """Raises AdapterError where two layers with one, tied weight cannot share the adapter."""
        if (
            self.dora
            or self.trains == "core"
            or self.form != "lora"
            or INITS[self.init].starts_nonzero
        ):
            raise AdapterError(
                f"'{site}' is tied: only plain A and B can be shared; leave it to an adapter "
                "with form=lora, without DoRA and with an init of which one factor is zero, or "
                "exclude it"
            )
