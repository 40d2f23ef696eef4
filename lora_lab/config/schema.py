"""The schema of a config: the keys that can be set, their types, and the hash of a run."""

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from lora_lab.adapters import GROUPS, INITS, SCALINGS, TRAINS
from lora_lab.runs import DEVICE_KEYS, NOT_IN_IDENTITY


class ConfigError(ValueError):
    """A setting is wrong. The message names its key, its value, the rule, the nearest valid one."""


def nearest(word: object, choices: Iterable[object]) -> str:
    """The end of an error message: "; nearest: WORD" with the choice most like `word`.

    Empty where no choice is alike.
    """
    matches = difflib.get_close_matches(str(word), list(map(str, choices)), n=1, cutoff=0.5)
    return f"; nearest: {matches[0]}" if matches else ""


def one_of(choices: Collection[str]) -> AfterValidator:
    """A pydantic validator for a name in a table such as INITS. Its error lists the names."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(value, choices)}")
        return value

    return AfterValidator(check)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed in the range that numpy and scikit-learn accept."""


class Node(BaseModel):
    """Base class of the config's nodes: unknown keys and values of another type are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Component(Node, extra="allow"):
    """A node that names a callable by `_target_`; its other keys are the callable's arguments."""

    target: str = Field(alias="_target_")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the callable: all keys but `_target_`."""
        return dict(self.model_extra or {})

    @property
    def callee(self) -> Callable[..., Any]:
        """The class or function that `_target_` names, imported."""
        return resolve_name(self.target)


class Optimizer(Component):
    """A torch optimizer, and the schedule of its learning rate.

    `lr` is the highest rate. After a warm-up it stays constant, or falls to zero linearly or as a
    cosine. `warmup` is the share of all steps during which it rises from zero.
    """

    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup: float = Field(ge=0, lt=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the torch optimizer."""
        return {"lr": self.lr, **super().arguments}


class TrainedBase(Node):
    """A base that is trained here on the data's `base` phase, and kept in bases_dir."""

    method: Literal["train"]
    epochs: PositiveInt
    seed: Seed
    optimizer: Optimizer


class CheckpointBase(Node):
    """A base loaded from a safetensors file. Its `sha256`, not its path, counts in the identity."""

    method: Literal["checkpoint"]
    path: str
    sha256: str | None = None


Alpha = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
InitName = Annotated[str, one_of(INITS)]


class Lora(Node):
    """Low-rank adapters: ΔW = scale · B A, with r and alpha of all sites that set none of theirs.

    `rank_pattern` and `alpha_pattern` are {glob on site names: value}; the first glob that matches
    a site decides. `lr_ratio` is the learning rate of the factor that starts at zero divided by
    that of the other one (LoRA+).
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
    """Full fine-tuning: all parameters train, and no adapter is attached."""

    method: Literal["full"]


class NoAdapter(Node):
    """No training: the base is evaluated as it is."""

    method: Literal["none"]


class TargetRule(Node):
    """A rule that picks sites: by the kind of layer, and by globs on names that match or exclude.

    r, alpha, dropout and init, where given, replace those of the adapter at its sites. `tied`: two
    layers that share a weight share the adapter's factors.
    """

    kind: Annotated[str, one_of(GROUPS)] = "all"
    match: str | list[str] = "*"
    exclude: str | list[str] = []
    r: PositiveInt | None = None
    alpha: Alpha | None = None
    dropout: Dropout | None = None
    init: InitName | None = None
    tied: bool = False

    @model_validator(mode="after")
    def _names_sites(self) -> Self:
        # target.conv.r=2 where only target=linear is chosen makes a rule with r alone, which by its
        # defaults would pick all layers.
        if not {"kind", "match"} & self.model_fields_set:
            raise ValueError("must say a kind or a match, as the targets of conf/target do")
        return self


class Trainer(Node, extra="allow"):
    """Arguments of Lightning's Trainer: these four and any other that it takes."""

    accelerator: str
    devices: int | str | list[int]
    max_epochs: PositiveInt
    check_val_every_n_epoch: PositiveInt


class Spectra(Node):
    """When ΔW's singular values are measured, and what is computed from the finished ΔW.

    They are measured at the start, each `every_n_epochs` epochs (or `every_n_steps` steps), and at
    the end. `truncation` measures the validation loss with ΔW cut to each lower rank: at all sites
    at once (model), at single sites too (sites), or not (none). The advised ranks keep the share
    `keep` of the loss's improvement. `against_base` compares ΔW with the SVD of each W, stored in
    bases_dir. `first_step` measures the dense gradient and the loss's descent at the first step.
    """

    every_n_epochs: PositiveInt
    every_n_steps: PositiveInt | None = None
    truncation: Literal["sites", "model", "none"] = "sites"
    keep: float = Field(default=0.99, gt=0, le=1)
    against_base: bool = True
    first_step: bool = False


class Tracking(Node):
    """Whether the run is logged to W&B (offline, online or off), and to which project."""

    mode: Literal["offline", "online", "off"]
    project: str = Field(pattern=r"^[^/\\#?%:]{1,128}$")  # W&B's rule
    entity: str | None
    tags: list[str]


class Sweep(Node):
    """Settings of a multirun. `fail_fast`: the first run that fails ends it."""

    fail_fast: bool = False


class Published(Node):
    """Published losses of an experiment, on all data, by epoch: of the base, and when adapted."""

    base: dict[int, float] = {}
    adapted: dict[int, float] = {}


class Config(Node):
    """The complete config of one run."""

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=64)  # W&B's rule for a tag
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
    sweep: Sweep = Sweep()  # a default, as the config.yaml of older runs has no such key
    published: Published | None
    runs_dir: str = Field(min_length=1)
    bases_dir: str = Field(min_length=1)
    overwrite: bool
    figures: bool | None = None
    checkpoint_every: float = Field(default=60, ge=0)

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dicts, lists, texts and numbers, as config.yaml has it."""
        return self.model_dump(by_alias=True)

    def identity(self) -> str:
        """The hash of all settings that can change the run's result.

        Paths, tracking, devices and the other keys of NOT_IN_IDENTITY and DEVICE_KEYS are left out.
        """
        return content_hash(self._identifying_settings())

    def _identifying_settings(self) -> dict[str, Any]:
        """The settings that `identity` hashes."""
        config = self.model_dump(by_alias=True, exclude=set(NOT_IN_IDENTITY))
        for key in DEVICE_KEYS:
            config["trainer"].pop(key, None)
        if isinstance(self.base, CheckpointBase):
            del config["base"]["path"]
        for pattern in ("rank_pattern", "alpha_pattern"):
            if globs := config["adapter"].get(pattern):
                # The first glob that matches decides, so their order is part of the identity; a
                # list keeps it where the hash sorts a dict's keys.
                config["adapter"][pattern] = list(globs.items())
        return config

    def cell(self) -> str:
        """The name of the run's cell (all settings but the seed): readable, then a short hash."""
        config = self._identifying_settings()
        del config["seed"]
        return f"{self.readable_name()}-{content_hash(config)[:6]}"

    def readable_name(self) -> str:
        """The main settings as a directory name, as r8-alpha16-kaiming; the seed is not in it."""
        adapter = self.adapter
        parts = [adapter.method]
        if isinstance(adapter, Lora):
            parts = [f"r{adapter.r}", f"alpha{adapter.alpha:g}", adapter.init]
            parts += ["dora"] if adapter.dora else []
            parts += [f"trains-{adapter.trains}"] if adapter.trains != "both" else []
            parts += [f"ratio{adapter.lr_ratio:g}"] if adapter.lr_ratio != 1 else []
            parts += [adapter.scaling.replace("/", "-")] if adapter.scaling != "alpha/r" else []
            parts += [f"dropout{adapter.dropout:g}"] if adapter.dropout else []
        targets = "+".join(self.target) if adapter.method != "none" else ""
        data = f"data{self.data.arguments['seed']}" if "seed" in self.data.arguments else ""
        rate = f"lr{self.optimizer.lr:g}" if adapter.method != "none" else ""
        name = "-".join(filter(None, [*parts, targets, rate, data]))
        # The cut keeps the directory's name, which seed and hash follow, under 255 bytes.
        return "".join(c if c.isalnum() or c in "-+._" else "_" for c in name)[:120]


def content_hash(content: Any) -> str:
    """The SHA-256 of nested dicts, lists and numbers, whatever the order of a dict's keys.

    A float with an integral value counts as the int, so that lr=1 and lr=1.0 are one run.
    """
    return hashlib.sha256(json.dumps(_as_ints(content), sort_keys=True).encode()).hexdigest()


def _as_ints(content: Any) -> Any:
    """The content with each float of integral value as an int: 1.0 as 1."""
    if isinstance(content, dict):
        return {key: _as_ints(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_ints(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content
