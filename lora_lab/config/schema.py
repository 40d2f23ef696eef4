"""The schema of a config: the keys that can be set, their types, and the hash of a run."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    model_validator,
)

from lora_lab.adapters import GROUPS, INITS
from lora_lab.config.components import CheckpointBase as CheckpointBase
from lora_lab.config.components import Component as Component
from lora_lab.config.components import (
    Node,
    NonNegativeNumber,
    PretrainedBase,
    TrainedBase,
)
from lora_lab.config.components import Optimizer as Optimizer
from lora_lab.config.components import Seed as Seed
from lora_lab.config.errors import ConfigError as ConfigError
from lora_lab.config.errors import nearest as nearest
from lora_lab.config.errors import one_of
from lora_lab.config.generate import Generate as Generate
from lora_lab.config.hashes import content_hash as content_hash
from lora_lab.config.lora import Alpha, Dropout, InitName
from lora_lab.config.lora import Lora as Lora
from lora_lab.runs import DEVICE_KEYS, NOT_IN_IDENTITY


class Full(Node):
    """Full fine-tuning: all parameters train, and no adapter is attached."""

    method: Literal["full"]


class NoAdapter(Node):
    """No training: the base is evaluated as it is."""

    method: Literal["none"]


class TargetRule(Node):
    """A rule that picks sites: by the kind of layer, and by globs on names."""

    kind: Annotated[str, one_of(GROUPS)] = "all"
    """of layer: all | linear | conv | embedding | weight | experts | attention"""
    match: str | list[str] = "*"
    """a glob, or a list of globs, on the names of layers: those that it takes"""
    exclude: str | list[str] = Field(default=[])
    """a glob, or a list of globs, on names: those that it leaves out"""
    r: PositiveInt | None = None
    """in the place of adapter.r at its sites"""
    alpha: Alpha | None = None
    """in the place of adapter.alpha at its sites"""
    dropout: Dropout | None = None
    """in the place of adapter.dropout at its sites"""
    init: InitName | None = None
    """in the place of adapter.init at its sites"""
    tied: bool = False
    """true: two layers that share a weight share the adapter's A and B"""

    @model_validator(mode="after")
    def _names_sites(self) -> Self:
        # target.conv.r=2 where only target=linear is chosen makes a rule with r alone, which by its
        # defaults would pick all layers.
        if not {"kind", "match"} & self.model_fields_set:
            raise ValueError("must say a kind or a match, as the targets of conf/target do")
        return self


TRAINER_DEFAULTS = {"max_steps": -1, "accumulate_grad_batches": 1, "val_check_interval": None}
TRAINER_DEFAULTS |= {"log_every_n_steps": None, "gradient_clip_algorithm": None}
"""Keys of the trainer that earlier configs lack, with the values that change nothing."""


class Trainer(Node, extra="allow"):
    """Arguments of Lightning's Trainer: these four and any other that it takes."""

    accelerator: str
    devices: int | str | list[int]
    max_epochs: PositiveInt | Literal[-1]
    check_val_every_n_epoch: PositiveInt | None

    def identifying_settings(self) -> dict[str, Any]:
        """What can change the result: no devices, and no key at its default of TRAINER_DEFAULTS."""
        return {
            key: value
            for key, value in self.model_dump(exclude=set(DEVICE_KEYS)).items()
            if key not in TRAINER_DEFAULTS or value != TRAINER_DEFAULTS[key]
        }


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
    """Whether the run is logged to W&B (offline, online or off), and to which project.

    `finish_timeout`: seconds that W&B's server is waited for at the end, once in a sweep.
    """

    mode: Literal["offline", "online", "off"]
    project: str = Field(pattern=r"^[^/\\#?%:\r\n]{1,128}$")  # W&B's rule
    entity: str | None
    tags: list[Annotated[str, Field(min_length=1)]]
    finish_timeout: float = Field(default=120, gt=0)


class Sweep(Node):
    """Settings of a multirun. `fail_fast`: the first run that fails ends it."""

    fail_fast: bool = False


class EarlyStopping(Node):
    """When training ends early."""

    metric: str = Field(min_length=1)
    """the metric that must improve, as val/loss"""
    patience: PositiveInt
    """training ends after so many validations in a row that are no better than the best before"""
    min_delta: NonNegativeNumber = 0.0
    """better is by more than this"""


class Published(Node):
    """What was published of an experiment."""

    source: str | None = None
    """where it was published"""
    base: dict[int, float] = Field(default={})
    """{epoch: loss on all data} of the base"""
    adapted: dict[int, float] = Field(default={})
    """{epoch: loss on all data} of the adapted model"""
    cells: dict[str, dict[str, float]] = Field(default={})
    """metrics at the end, by the settings that are typed behind experiment=NAME to run that cell:
    {"adapter.r=16": {"test/accuracy": 0.9667}}"""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _last_or_best(value: str) -> str:
    if value != "last" and not re.fullmatch(r"best \S+", value):
        raise ValueError('must be last, or best and a metric, as "best val/accuracy"')
    return value


LEFT_OUT_AT_DEFAULT = ("also_train", "label_smoothing", "select", "early_stopping")
LEFT_OUT_AT_DEFAULT += ("generate", "forget")
"""Keys that the identity leaves out at their defaults, as configs of earlier versions lack them."""

LORA_KEYS_LEFT_OUT_AT_DEFAULT = ("over_rank", "form", "cut", "heal", "budget", "allocation", "rho")
LORA_KEYS_LEFT_OUT_AT_DEFAULT += ("restarts", "start_from", "start_sha256")
"""Those of a low-rank adapter."""


class Config(Node):
    """The complete config of one run.

    `also_train` are globs on the names of parameters (or of modules above them) that train in full
    beside the adapters; `bias` means each bias. `select` says which weights are the run's result:
    the `last`, or the `best METRIC`, as "best val/accuracy". `forget` is a data set that the base
    knew, of which the run measures what it forgets; None: that of the base phase, if it is known.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=64)  # W&B's rule for a tag
    seed: Seed
    data: Component
    model: Component
    base: TrainedBase | CheckpointBase | PretrainedBase = Field(discriminator="method")
    adapter: Lora | Full | NoAdapter = Field(discriminator="method")
    target: dict[str, TargetRule] = Field(min_length=1)
    optimizer: Optimizer
    trainer: Trainer
    also_train: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=[])
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    select: Annotated[str, AfterValidator(_last_or_best)] = "last"
    early_stopping: EarlyStopping | None = None
    generate: Generate | None = None
    forget: Component | None = None
    spectra: Spectra
    tracking: Tracking
    sweep: Sweep = Sweep()  # a default, as the config.yaml of older runs has no such key
    published: Published | None
    runs_dir: str = Field(min_length=1)
    bases_dir: str = Field(min_length=1)
    overwrite: bool
    figures: bool | None = None
    checkpoint_every: float = Field(default=60, ge=0)

    @property
    def trains(self) -> bool:
        """Whether anything trains: adapters, all weights, or those of `also_train` alone."""
        return not isinstance(self.adapter, NoAdapter) or bool(self.also_train)

    @property
    def freezes_base(self) -> bool:
        """Whether the base stays as it is, beneath adapters or the parameters of `also_train`."""
        return self.trains and not isinstance(self.adapter, Full)

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
        for key in ("data", "model", "trainer", *(["forget"] if self.forget else [])):
            config[key] = getattr(self, key).identifying_settings()
        if isinstance(self.base, CheckpointBase):
            del config["base"]["path"]
        if isinstance(self.adapter, Full):
            del config["also_train"]  # all parameters train anyway
        for key in LEFT_OUT_AT_DEFAULT:
            if config.get(key) == Config.model_fields[key].default:
                del config[key]
        if config["model"].get("quantization") is None:  # which configs of earlier versions lack
            config["model"].pop("quantization", None)
        if config["adapter"].get("start_sha256") is not None:  # which stands for the path
            del config["adapter"]["start_from"]
        for key in LORA_KEYS_LEFT_OUT_AT_DEFAULT:
            if config["adapter"].get(key) == Lora.model_fields[key].default:
                config["adapter"].pop(key, None)
        inits = [
            config["adapter"].get("init"),
            *(rule["init"] for rule in config["target"].values()),
        ]
        if not any(INITS[init].reads for init in inits if init):
            config["adapter"].pop("calibration", None)
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
            parts += [adapter.form.replace("_", "-")] if adapter.form != "lora" else []
            parts += [f"budget{adapter.budget:g}"] if adapter.budget is not None else []
            parts += [f"rho{adapter.rho:g}"] if adapter.rho != 1 else []
            parts += ["dora"] if adapter.dora else []
            parts += [f"trains-{adapter.trains}"] if adapter.trains != "both" else []
            parts += [f"ratio{adapter.lr_ratio:g}"] if adapter.lr_ratio != 1 else []
            parts += [adapter.scaling.replace("/", "-")] if adapter.scaling != "alpha/r" else []
            parts += [f"dropout{adapter.dropout:g}"] if adapter.dropout else []
            parts += [f"cut{'+'.join(map(str, adapter.cut))}"] if adapter.cut else []
            parts += [f"heal{adapter.heal}"] if adapter.heal else []
        also = [glob.strip("*.") for glob in self.also_train if self.freezes_base]
        targets = "+".join(sorted(self.target)) if adapter.method != "none" else ""
        data = f"data{self.data.arguments['seed']}" if "seed" in self.data.arguments else ""
        rate = f"lr{self.optimizer.lr:g}" if self.trains else ""
        trained = "+".join(["-".join(filter(None, [*parts, targets])), *also])
        name = "-".join(filter(None, [trained, rate, data]))
        # The cut keeps the directory's name, which seed and hash follow, under 255 bytes.
        return "".join(c if c.isalnum() or c in "-+._" else "_" for c in name)[:120]
