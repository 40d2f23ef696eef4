"""Nodes of a config that name a callable: data, model and optimizer; and the kinds of bases."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed in the range that numpy and scikit-learn accept."""


def check_float32(value: Any) -> Any:
    """The value, a number or a list. Raises ValueError where a tensor cannot hold the number."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not abs(number) <= 3.4e38:
            raise ValueError("must be at most 3.4e38: tensors of float32 hold no larger number")
    return value


PositiveNumber = Annotated[float, Field(gt=0), AfterValidator(check_float32)]
NonNegativeNumber = Annotated[float, Field(ge=0), AfterValidator(check_float32)]


class Node(BaseModel):
    """Base class of the config's nodes: unknown keys and values of another type are errors.

    A text below a field is the key's meaning, where no YAML file of conf/ has one
    (config/key_meanings.py).
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _is_none(value: object) -> bool:
    return value is None


DATA_LEFT_OUT_AT_DEFAULT = {"column_names": None, "shares": None, "templates": None}
DATA_LEFT_OUT_AT_DEFAULT |= {"balance": False, "mask_padding": True}
"""Arguments of our data sets that earlier configs lack, with the values that change nothing."""


class Component(Node, extra="allow"):
    """A node that names a callable by `_target_`; its other keys are the callable's arguments."""

    target: str = Field(alias="_target_")
    """the class or function that makes it; the other keys are its arguments"""
    content: dict[str, str] | None = Field(default=None, exclude_if=_is_none)
    """filled in by the plan: the hash (or the hub's commit) of what lies at each argument that is a
    path, which stands for the path in a run's identity"""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the callable: all keys but `_target_` and `content`."""
        return dict(self.model_extra or {})

    def identifying_settings(self) -> dict[str, Any]:
        """The node's keys and values with content in the place of paths."""
        settings = self.model_dump(by_alias=True, exclude={"content"}) | (self.content or {})
        if self.target.startswith("lora_lab.data."):
            for key, default in DATA_LEFT_OUT_AT_DEFAULT.items():
                if settings.get(key) == default:
                    settings.pop(key, None)
        return settings

    @property
    def callee(self) -> Callable[..., Any]:
        """The class or function that `_target_` names, imported."""
        return resolve_name(self.target)


def share_or_whole(value: float) -> float:
    """The value. Raises ValueError unless it is a share below 1 or a whole number of steps."""
    if value > 1 and not value.is_integer():
        raise ValueError("must be a share below 1, or a whole number of steps")
    return value


class Optimizer(Component):
    """A torch optimizer, and the schedule of its learning rate."""

    lr: PositiveNumber
    """the learning rate; of a schedule, the highest"""
    schedule: Literal["constant", "linear", "cosine"]
    """after the warm-up the rate stays constant, or falls to zero linearly or as a cosine"""
    warmup: Annotated[float, Field(ge=0), AfterValidator(share_or_whole)]
    """how long the rate rises from zero: a share of all steps if below 1, else their number"""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the torch optimizer."""
        return {"lr": self.lr, **super().arguments}


def warmup_steps(warmup: float, steps: int) -> float:
    """The number of steps that a share below 1, or a number, means of `steps` in all."""
    return warmup if warmup >= 1 else warmup * steps


class TrainedBase(Node):
    """A base that is trained here on the data's `base` phase, and kept in bases_dir."""

    method: Literal["train"]
    epochs: PositiveInt
    seed: Seed
    optimizer: Optimizer


class CheckpointBase(Node):
    """A base loaded from a safetensors file."""

    method: Literal["checkpoint"]
    path: str
    sha256: str | None = None
    """filled in by the plan: the file's SHA-256 (of base=pretrained: that of the weights at
    model.path, or the hub's commit), which stands for the path in a run's identity"""


class PretrainedBase(Node):
    """The weights that lie at model.path."""

    method: Literal["pretrained"]
    sha256: str | None = None
