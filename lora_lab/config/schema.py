"""The typed schema of a run, and what identifies it."""

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
)

from lora_lab.adapters import GROUPS, INITS, SCALINGS, TRAINS
from lora_lab.runs import DEVICE_KEYS, NOT_IN_IDENTITY


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, the value, the rule, the nearest one."""


def nearest(word: object, choices: Iterable[object]) -> str:
    """'; nearest: …' with the choice that looks most like `word`, '' where none does."""
    found = difflib.get_close_matches(str(word), list(map(str, choices)), n=1, cutoff=0.5)
    return f"; nearest: {found[0]}" if found else ""


def one_of(choices: Collection[str]) -> AfterValidator:
    """A validator for a key of a table, as INITS: its error lists the keys."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    return AfterValidator(check)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy and scikit-learn take too."""


class Node(BaseModel):
    """A node of the config: no key beyond those named, no value of another type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Component(Node, extra="allow"):
    """A node that names a callable by `_target_`, and gives its arguments."""

    target: str = Field(alias="_target_")

    @property
    def arguments(self) -> dict[str, Any]:
        """What is given beside `_target_`."""
        return dict(self.model_extra or {})

    @property
    def callee(self) -> Callable[..., Any]:
        """What `_target_` names."""
        return resolve_name(self.target)


class Optimizer(Component):
    """A torch optimizer, and its learning rate over the run: constant, linear or cosine to zero.

    `warmup` is the share of all steps in which the rate first rises from zero.
    """

    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float = Field(ge=0, lt=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the torch optimizer is given."""
        return {"lr": self.lr, **super().arguments}


class TrainedBase(Node):
    """A base that is trained here, on the data's `base` phase."""

    method: Literal["train"]
    epochs: PositiveInt
    seed: Seed
    optimizer: Optimizer


class CheckpointBase(Node):
    """A base that is loaded from a safetensors file, known by its content, not by its path."""

    method: Literal["checkpoint"]
    path: str
    sha256: str | None = None


Alpha = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
InitName = Annotated[str, one_of(INITS)]


class Lora(Node):
    """Low-rank adapters. Patterns are {glob on sites: value}, the first that fits.

    `lr_ratio` is the learning rate of the factor that starts at zero, over the other's (LoRA+).
    """

    method: Literal["lora"]
    r: PositiveInt
    alpha: Alpha
    dropout: Dropout
    init: InitName
    scaling: Annotated[str, one_of(SCALINGS)]
    trains: Annotated[str, one_of(TRAINS)]
    dora: bool
    lr_ratio: float = Field(gt=0)
    rank_pattern: dict[str, PositiveInt] | None
    alpha_pattern: dict[str, Alpha] | None


class Full(Node):
    """Full fine-tuning."""

    method: Literal["full"]


class NoAdapter(Node):
    """The base as it is."""

    method: Literal["none"]


class TargetRule(Node):
    """What a target picks, by kind and by globs on names, and what is its sites' own."""

    kind: Annotated[str, one_of(GROUPS)] = "all"
    match: str | list[str] = "*"
    exclude: str | list[str] = []
    r: PositiveInt | None = None
    alpha: Alpha | None = None
    dropout: Dropout | None = None
    init: InitName | None = None
    tied: bool = False

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        # Settings of a target that was not chosen would otherwise make one that picks everything.
        if not {"kind", "match"} & self.model_fields_set:
            raise ValueError("must say a kind or a match, as the targets of conf/target do")
        return self


class Trainer(Node, extra="allow"):
    """The arguments of lightning's Trainer."""

    accelerator: str
    devices: int | str | list[int]
    max_epochs: PositiveInt
    check_val_every_n_epoch: PositiveInt


class Spectra(Node):
    """When ΔW's spectrum is measured, and what is asked of the finished update.

    At the start, every so many epochs or steps, at the end. `truncation`: the validation loss with
    ΔW cut to each lower rank, of the whole model or of each site too; `keep` is the share of the
    gain that the advised ranks keep. `against_base` takes an SVD of each W, kept in bases_dir.
    `first_step` measures the dense gradient and the descent of the first step.
    """

    every_n_epochs: PositiveInt
    every_n_steps: PositiveInt | None = None
    truncation: Literal["sites", "model", "none"] = "sites"
    keep: float = Field(default=0.99, gt=0, le=1)
    against_base: bool = True
    first_step: bool = False


class Tracking(Node):
    """Where W&B keeps the run."""

    mode: Literal["offline", "online", "off"]
    project: str = Field(pattern=r"^[^/\\#?%:]{1,128}$")  # W&B's rule
    entity: str | None
    tags: list[str]


class Sweep(Node):
    """A multirun: whether the first failure ends it."""

    fail_fast: bool = False


class Published(Node):
    """Loss on all data by epoch, as published for an experiment."""

    base: dict[int, float] = {}
    adapted: dict[int, float] = {}


class Config(Node):
    """One run."""

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=64)  # it is a tag in W&B
    seed: Seed
    data: Component
    model: Component
    base: TrainedBase | CheckpointBase = Field(discriminator="method")
    adapter: Lora | Full | NoAdapter = Field(discriminator="method")
    target: dict[str, TargetRule] = Field(min_length=1)
    optimizer: Optimizer
    trainer: Trainer
    spectra: Spectra
    tracking: Tracking
    sweep: Sweep = Sweep()  # what an older run's config.yaml does not have has a default
    published: Published | None
    runs_dir: str = Field(min_length=1)
    bases_dir: str = Field(min_length=1)
    overwrite: bool
    figures: bool | None = None
    checkpoint_every: float = Field(default=60, ge=0)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts, lists and numbers: what config.yaml holds."""
        return self.model_dump(by_alias=True)

    def identity(self) -> str:
        """The hash of what can change the run's result: not paths, tracking or devices."""
        return content_hash(self._matters())

    def _matters(self) -> dict[str, Any]:
        config = self.model_dump(by_alias=True, exclude=set(NOT_IN_IDENTITY))
        for device in DEVICE_KEYS:
            config["trainer"].pop(device, None)
        if isinstance(self.base, CheckpointBase):
            del config["base"]["path"]
        for pattern in ("rank_pattern", "alpha_pattern"):
            if globs := config["adapter"].get(pattern):
                config["adapter"][pattern] = list(globs.items())  # the first that fits wins
        return config

    def cell(self) -> str:
        """One point of an ablation: the run without its seed, in words and by a short hash."""
        config = self._matters()
        del config["seed"]
        return f"{self.readable_name()}-{content_hash(config)[:6]}"

    def readable_name(self) -> str:
        """What is most asked of a run, but for its seed; the rest is in its hash."""
        adapter = self.adapter
        words = [adapter.method]
        if isinstance(adapter, Lora):
            words = [f"r{adapter.r}", f"alpha{adapter.alpha:g}", adapter.init]
            words += ["dora"] if adapter.dora else []
            words += [f"trains-{adapter.trains}"] if adapter.trains != "both" else []
            words += [f"ratio{adapter.lr_ratio:g}"] if adapter.lr_ratio != 1 else []
            words += [adapter.scaling.replace("/", "-")] if adapter.scaling != "alpha/r" else []
            words += [f"dropout{adapter.dropout:g}"] if adapter.dropout else []
        targets = "+".join(self.target) if adapter.method != "none" else ""
        data = f"data{self.data.arguments['seed']}" if "seed" in self.data.arguments else ""
        rate = f"lr{self.optimizer.lr:g}" if adapter.method != "none" else ""
        text = "-".join(filter(None, [*words, targets, rate, data]))
        return "".join(c if c.isalnum() or c in "-+._" else "_" for c in text)[:120]


def content_hash(content: Any) -> str:
    """The SHA-256 of plain nested data, whatever the order of its keys; 1.0 is 1."""
    return hashlib.sha256(json.dumps(_whole(content), sort_keys=True).encode()).hexdigest()


def _whole(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _whole(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_whole(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content
