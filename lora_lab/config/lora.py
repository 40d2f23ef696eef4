"""The schema of low-rank adapters: their settings, and the ranks to which they are cut at last."""

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from lora_lab.adapters import FORMS, INITS, OVER_RANK, SCALINGS, TRAINS
from lora_lab.config.components import (
    Node,
    NonNegativeNumber,
    PositiveNumber,
    check_float32,
    share_or_whole,
    warmup_steps,
)
from lora_lab.config.errors import one_of

Alpha = PositiveNumber
Dropout = Annotated[float, Field(ge=0, lt=1)]
InitName = Annotated[str, one_of(INITS)]


def _as_list(value: Any) -> Any:
    """One rank as a list of it: a sweep over adapter.cut=4,2 gives each by itself."""
    return [value] if isinstance(value, int) else value


def _ranks_to_cut_to(ranks: list[int], info: ValidationInfo) -> list[int]:
    """The ranks of `adapter.cut`, the largest first. Raises ValueError where there are none such.

    `info` has the keys of the adapter before this one. That they are below the rank of ΔW is
    checked once the sites are known (training/part_checks.py).
    """
    if len({*ranks}) < len(ranks):
        raise ValueError("must be different ranks")
    if ranks and info.data.get("dora"):
        raise ValueError("not with adapter.dora=true, whose ΔW is no product of factors to be cut")
    return sorted(ranks, reverse=True)


def _steps_after_a_cut(steps: int, info: ValidationInfo) -> int:
    """The steps of `adapter.heal`. Raises ValueError where nothing is cut."""
    if steps and not info.data.get("cut", [1]):
        raise ValueError("are steps after a cut, and adapter.cut=[] has no rank to cut to")
    return steps


Length = Annotated[float, Field(ge=0), AfterValidator(share_or_whole)]
"""A share of a run's steps if below 1, else their number."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class Allocation(Node):
    """When and by what AdaLoRA prunes triplets: see training/callbacks/allocation.py.

    `warmup` is the length before the first pruning, `final` that after the last, `interval` that
    from one to the next. `beta1` and `beta2` are those of the running means of a number's
    sensitivity and uncertainty. `orthogonality` is the weight of the penalty.
    """

    warmup: Length
    final: Length
    interval: Length
    beta1: Beta
    beta2: Beta
    orthogonality: NonNegativeNumber

    @model_validator(mode="after")
    def _leaves_steps(self) -> Self:
        if max(self.warmup, self.final) < 1 <= self.warmup + self.final:
            raise ValueError(
                f"warmup={self.warmup:g} and final={self.final:g} are shares of the steps and must "
                "be less than 1 together"
            )
        return self


class Restarts(Node):
    """When ReLoRA's factors begin anew: see training/callbacks/restarts.py.

    `every` is the length from one restart to the next, `warmup` that over which the learning rate
    then rises from 0. `prune` is the share of the optimizer's moments that is set to zero.
    """

    every: Annotated[float, Field(gt=0), AfterValidator(share_or_whole)]
    warmup: Length
    prune: Annotated[float, Field(ge=0, le=1)]

    def lengths(self, steps: int) -> tuple[int, float]:
        """The steps of `every` and of `warmup`, of a training of so many steps."""
        return ceil(warmup_steps(self.every, steps)), warmup_steps(self.warmup, steps)


class Lora(Node):
    """Low-rank adapters: ΔW = scale · B A, with r and alpha of all sites that set none of theirs.

    `rank_pattern` and `alpha_pattern` are {glob on site names: value}; the first glob that matches
    a site decides. `lr_ratio` is the learning rate of the factor that starts at zero divided by
    that of the other one (LoRA+). `form` is what ΔW is made of, where that is not A and B alone.
    `over_rank` is what becomes of an r over a weight's rank. `calibration` is how many training
    batches are read by inits that start from data. With `rho` above 1 EVA moves ranks between sites
    (adapters/rank_redistribution.py). `cut` are ranks that the trained adapter is cut
    to at the end, and `heal` how many steps each of the smaller adapters trains then
    (training/heal.py). `allocation` is how AdaLoRA comes to its `budget`, the mean
    rank at the end; None is two thirds of that at the start, as in the paper. `restarts` are
    ReLoRA's. `start_from` is a stored adapter whose A and B are the first values.
    """

    method: Literal["lora"]
    r: PositiveInt
    alpha: Alpha
    dropout: Dropout
    init: InitName
    scaling: Annotated[str, one_of(SCALINGS)]
    trains: Annotated[str, one_of(TRAINS)]
    dora: bool
    form: Annotated[str, one_of(FORMS)] = "lora"
    lr_ratio: PositiveNumber
    rank_pattern: dict[str, PositiveInt] | None
    alpha_pattern: dict[str, Alpha] | None
    over_rank: Annotated[str, one_of(OVER_RANK)] = "error"
    calibration: PositiveInt = 8
    rho: Annotated[float, Field(ge=1), AfterValidator(check_float32)] = 1.0
    cut: Annotated[
        list[PositiveInt], BeforeValidator(_as_list), AfterValidator(_ranks_to_cut_to)
    ] = Field(default=[])
    heal: Annotated[NonNegativeInt, AfterValidator(_steps_after_a_cut)] = 0
    start_from: str | None = None
    start_sha256: str | None = None
    """filled in by the plan: the SHA-256 of what start_from names, in the path's place in a run's
    identity"""
    budget: PositiveNumber | None = None
    allocation: Allocation | None = None
    restarts: Restarts | None = None

    @model_validator(mode="after")
    def _is_all_of_adalora(self) -> Self:
        is_adalora = self.form == "adalora"
        if is_adalora and self.allocation is None:
            raise ValueError("form=adalora has no allocation of ranks here; take adapter=adalora")
        if not is_adalora and (self.allocation or self.budget):
            raise ValueError(
                f"form={self.form} has no budget and no allocation, which are AdaLoRA's; take "
                "adapter=adalora, or adapter=lora without them"
            )
        return self

    @model_validator(mode="after")
    def _is_all_of_relora(self) -> Self:
        if self.form == "relora" and self.restarts is None:
            raise ValueError("form=relora has no restarts here; take adapter=relora")
        if self.form != "relora" and self.restarts is not None:
            raise ValueError(
                f"form={self.form} has no restarts, which are ReLoRA's; take adapter=relora, or "
                "adapter=lora without them"
            )
        return self
