"""The schema of low-rank adapters: their settings, and the ranks to which they are cut at last."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationInfo

from lora_lab.adapters import FORMS, INITS, OVER_RANK, SCALINGS, TRAINS
from lora_lab.config.components import Node, PositiveNumber
from lora_lab.config.errors import one_of

Alpha = PositiveNumber
Dropout = Annotated[float, Field(ge=0, lt=1)]
InitName = Annotated[str, one_of(INITS)]


def _ranks_to_cut_to(ranks: list[int], info: ValidationInfo) -> list[int]:
    """The ranks of `adapter.cut`, the largest first. Raises ValueError where there are none such.

    `info` has the keys of the adapter before this one; those with an error of their own lack.
    """
    if len({*ranks}) < len(ranks):
        raise ValueError("must be different ranks")
    if ranks and max(ranks) >= (r := info.data.get("r", max(ranks) + 1)):
        raise ValueError(f"each must be below adapter.r={r}, as [{max(1, r // 2)}]")
    if ranks and info.data.get("dora"):
        raise ValueError("not with adapter.dora=true, whose ΔW is no product of factors to be cut")
    return sorted(ranks, reverse=True)


def _steps_after_a_cut(steps: int, info: ValidationInfo) -> int:
    """The steps of `adapter.heal`. Raises ValueError where nothing is cut."""
    if steps and not info.data.get("cut", [1]):
        raise ValueError("are steps after a cut, and adapter.cut=[] has no rank to cut to")
    return steps


class Lora(Node):
    """Low-rank adapters: ΔW = scale · B A, with r and alpha of all sites that set none of theirs.

    `rank_pattern` and `alpha_pattern` are {glob on site names: value}; the first glob that matches
    a site decides. `lr_ratio` is the learning rate of the factor that starts at zero divided by
    that of the other one (LoRA+). `form` is what ΔW is made of, where that is not A and B alone.
    `over_rank` is what becomes of an r over a weight's rank. `calibration` is how many training
    batches are read by inits that start from data. `cut` are ranks that the trained adapter is cut
    to at the end, and `heal` how many steps each of the smaller adapters trains then
    (training/heal.py).
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
    cut: Annotated[list[PositiveInt], AfterValidator(_ranks_to_cut_to)] = Field(default=[])
    heal: Annotated[NonNegativeInt, AfterValidator(_steps_after_a_cut)] = 0
