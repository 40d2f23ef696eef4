"""Wrong values for every key that can be set: refused in one paragraph, and nothing is made.

Independent truth: the types in the schema and in the signatures of what conf/ offers. From them
come, for each key, all values of other types (null, a word, a number, NaN, ∞, …) and those just
beyond its bounds. Each is composed, checked and planned by the function that the command uses.
Run: make test ARGS=tests/config/test_bad_values.py
"""

import types
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import lightning.pytorch as pl
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lora_lab.config import compose
from lora_lab.config.checks import parameters_of
from lora_lab.config.components import Component
from lora_lab.config.options import option_text, options
from lora_lab.config.schema import Config, Full, NoAdapter
from lora_lab.data import Data
from lora_lab.data.shift import Shift
from lora_lab.sweeps import multirun
from lora_lab.training.trainer_checks import RESERVED_TRAINER_ARGUMENTS
from tests.conftest import SMALL

FROM_FILES = ("text", "words", "language", "images")
KINDS = {
    "null": "null",
    "word": "text",
    "''": "text",
    "7": "int",
    "1.5": "float",
    "nan": "nan",
    "inf": "infinite",
    "1e400": "infinite",
    "true": "bool",
    "[]": "list",
    "{}": "dict",
}
"""Values as they are typed → what Hydra reads in them."""

ACCEPTED = {
    types.NoneType: {"null"},
    bool: {"bool"},
    int: {"int"},
    float: {"int", "float"},
    str: {"text"},
    list: {"list"},
    tuple: {"list"},
    Sequence: {"list"},
    dict: {"dict"},
    Any: {*KINDS.values()},
}
"""Type → the kinds of values that it takes."""

BEYOND_BOUND = {"gt": (0, -1), "ge": (-1,), "lt": (0, 1), "le": (1,)}
"""A bound → what is added to it for values that it rules out."""


def members(annotation: Any, bounds: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The types that an annotation allows, each with its bounds and other metadata."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extras = [e.metadata if isinstance(e, FieldInfo) else [e] for e in inner[1:]]
        yield from members(inner[0], (*bounds, *chain(*extras)))
    elif origin in (Union, types.UnionType):
        yield from (member for one in inner for member in members(one, bounds))
    else:
        yield annotation, bounds


def wrong_values(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    """The values, as they are typed, that an annotation rules out."""
    allowed, beyond = set(), set()
    for one, bounds in members(annotation, tuple(metadata)):
        if get_origin(one) is Literal:
            continue  # of these values none is among its words
        allowed |= ACCEPTED.get(get_origin(one) or one, {"dict"} if is_node(one) else set())
        for bound, (name, steps) in product(bounds, BEYOND_BOUND.items()):
            if (limit := getattr(bound, name, None)) is not None:
                beyond |= {f"{limit + step}" for step in steps}
    return [value for value, kind in KINDS.items() if kind not in allowed] + sorted(beyond)


def is_node(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def schema_cases(node: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each key of the schema with its wrong values. Groups of conf/ are in other tests."""
    for name, field in node.model_fields.items():
        if name in ("target", "method", "content", "sha256", "published"):
            continue  # chosen by groups, or not a user's
        key = f"{prefix}{field.alias or name}"
        nodes = [one for one, _ in members(field.annotation) if is_node(one)]
        inner = next((n for n in nodes if n not in (Full, NoAdapter)), None)
        if inner is None or name == "early_stopping":
            yield key, wrong_values(field.annotation, field.metadata)
        if inner is not None and name != "early_stopping" and inner is not Component:
            yield from schema_cases(inner, f"{key}.")


def component_cases() -> Iterator[tuple[str, str, list[str]]]:
    """Each argument of the data sets, models and optimizers of conf/, with its wrong values.

    What several take with the same annotation, as a seed, is checked in one of them.
    """
    seen: set[tuple[str, str]] = set()
    for group in ("data", "model", "optimizer"):
        for option in options()[group]:
            if option in ("pretrained", "timm"):
                continue  # their files are read first
            content = yaml.safe_load(option_text(group, option))
            hints = parameters_of(Component(_target_=content["_target_"]).callee)[1]
            for key in content:
                name = f"{group}.{key}"
                if (
                    key in hints
                    and key not in ("fused", "lr")
                    and (name, str(hints[key])) not in seen
                ):
                    seen.add((name, str(hints[key])))
                    yield option, name, wrong_values(hints[key])


TRAINER = {
    name: wrong_values(hint)
    for name, hint in parameters_of(pl.Trainer)[1].items()
    if name not in ("return", "default_root_dir", "model_registry", *RESERVED_TRAINER_ARGUMENTS)
}
BEYOND = {
    "devices": ["0", "-5", "[]", "[0,0]", "word"],
    "accelerator": ["tpu", "word"],
    "precision": ["17", "word"],
    "strategy": ["word", "''"],
    "max_time": ["word", "{hourz:1}", "0", "00:00:00:00", "{seconds:0}"],
    "max_epochs": ["0", "-2", "-1"],
    "min_epochs": ["-1"],
    "max_steps": ["0", "-2"],
    "min_steps": ["-1"],
    "limit_train_batches": ["0", "-1", "1.5", "nan", "0.0"],
    "limit_val_batches": ["0", "-1", "1.5", "inf"],
    "overfit_batches": ["-1", "1.5", "1"],
    "val_check_interval": ["0", "-1", "nan", "2.5"],
    "check_val_every_n_epoch": ["0"],
    "log_every_n_steps": ["0", "-1"],
    "accumulate_grad_batches": ["0", "-1"],
    "gradient_clip_val": ["-1", "nan", "inf"],
    "gradient_clip_algorithm": ["word"],
    "fast_dev_run": ["true", "3"],
    "barebones": ["true"],
    "plugins": ["word"],
    "profiler": ["word"],
    "reload_dataloaders_every_n_epochs": ["-1"],
    "num_nodes": ["0", "-1", "2"],
}
"""Values of Lightning's arguments that its annotations allow, and a run cannot have."""

GROUPS = ("data", "model", "adapter", "target", "optimizer", "base", "trainer", "experiment")


def refused(*commands: str) -> list[str]:
    """The error of each command: it names the last setting, and nothing was made."""
    lines = [f"{command}".split() for command in commands]
    jobs = multirun.plan_jobs([compose.hydra_arguments(words) for words in lines])
    for words, job in zip(lines, jobs, strict=True):
        assert job.error, f"accepted: {' '.join(words)}"
        assert words[-1].lstrip("+~").partition("=")[0] in job.error
        assert len(job.error) < 900
        assert "\n\n" not in job.error
    assert not list(Path().iterdir())
    return [str(job.error) for job in jobs]


SCHEMA = dict(schema_cases(Config))


@pytest.mark.parametrize("key", SCHEMA)
def test_a_key_of_the_schema(key: str):
    owners = {"adapter.budget": "adalora", "adapter.allocation": "adalora"}
    owners["adapter.restarts"] = "relora"
    owner = next((owner for start, owner in owners.items() if key.startswith(start)), None)
    where = f"adapter={owner} " if owner else ""
    refused(*(f"{where}{key}={value}" for value in SCHEMA[key]))


@pytest.mark.parametrize("group", ["data", "model", "optimizer"])
def test_an_argument_of_what_conf_offers(group: str):
    commands = []
    for i, (option, key, values) in enumerate(component_cases()):
        start = f"{group}={option}" + (" data.train=x" if option in FROM_FILES else "")
        if key.startswith(group):
            # All values of all arguments are some 1600: of each ∞ and one other.
            some = {values[i % len(values)], *(["inf"] if "inf" in values else [])}
            commands += [f"{start} {key}={value}" for value in some]
    refused(*commands)


def test_an_argument_of_lightnings_trainer():
    some = {key: values[i % 3 :: 3] for i, (key, values) in enumerate(TRAINER.items())}
    refused(*(f"trainer.{key}={v}" for key, values in some.items() for v in values))
    refused(*(f"trainer.{key}={v}" for key, values in BEYOND.items() for v in values))


@pytest.mark.parametrize("value", ["null", "7", "1.5", "true", "[]", "''", "[linear,null]"])
def test_a_group_that_is_set_to_no_option(value: str):
    for error in refused(*(f"{group}={value}" for group in GROUPS)):
        assert "must be the name of an option: conf/" in error


class NoSizes(Shift):
    """A data set that does not say how many numbers are to be predicted."""

    @property
    def sizes(self) -> dict[str, int]:
        return {"in_features": self.in_features}


class Loud(Shift):
    """A user's data set, for which infinity is a value."""

    def __init__(self, phase: Any, noise: float, **settings: Any):
        super().__init__(phase, **settings)
        self.noise = noise


def shift_data(phase: Any, **settings: Any) -> Shift:
    """A function that gives a data set."""
    return Shift(phase, **settings)


def no_data(phase: Any, **settings: Any) -> Data:
    """A function that says that it gives one."""
    return "no data"  # pyright: ignore[reportReturnType]


def not_annotated(phase: Any, **settings: Any):
    """A function of which nothing is known before it is called."""
    raise AssertionError


HERE = "tests.config.test_bad_values"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data._target_=torch.nn.Linear", "must be a Data of lora_lab, or a function that gives"),
        ("data._target_=builtins.dict", "must be a Data of lora_lab"),
        ("data._target_=math.pi", "must be a Data of lora_lab"),
        (f"data._target_={HERE}.no_data", "must give a Data of lora_lab, and gave 'no data'"),
        *(
            (f"{key}._target_={target}", "must be a")
            for key in ("data", "model", "optimizer")
            for target in (
                *("os.system", "subprocess.Popen", "subprocess.run", "builtins.exec", "torch.load"),
                *("torch.hub.load", f"{HERE}.not_annotated", "lora_lab.runs.os.system"),
                "lora_lab.training.modules.BaseModule.load_from_checkpoint",
            )
        ),
        (f"data._target_={HERE}.NoSizes", "must have out_features, the number of classes or of"),
        ("model._target_=builtins.dict", "must be a Module of torch"),
        ("optimizer._target_=torch.nn.Linear", "must be a Optimizer of torch"),
        ("+optimizer.betas=[0.9]", "has too few values"),
        ("+optimizer.betas=[0.9,0.99,0.999]", "must have at most 2 items, not 3"),
        ("+optimizer.weight_decay=inf", "must be a finite number"),
        ("optimizer.betas=[0.9,0.99]", "+optimizer.betas=… gives it to torch.optim.Adam"),
        ("adapter.rank=2", "there is no such key; nearest: r ("),
        ("rank=2", "there is no such key; nearest: adapter.r ("),
        ("learning_rate=2", "there is no such key; nearest: optimizer.lr ("),
        ("batch_size=2", "there is no such key; nearest: data.batch_size ("),
        ("seed.x=2", "there is no such key: seed has none below it"),
        ("adapter.rank_pattern={fc:2}", "adapter.rank_pattern: 'fc' fits no site; nearest: linear"),
        ("adapter.method=lorra", "must be one of lora, full, none"),
        ("adapter.alpha=1e308", "must be at most 3.4e38"),
        ("data.shift=-1e308", "must be at most 3.4e38"),
        ("data.samples=100000000000000", "GiB, and this machine has"),
        ("model=mlp model.hidden=[1000000000,1000000000]", "model: takes"),
        (f"runs_dir={'x' * 300}", "File name too long"),
        ("early_stopping=patience:3", "in quotes: 'early_stopping={metric: …, patience: …}'"),
        ("early_stopping={metric:", "braces need quotes"),
        ("seed=${nope}", "seed: Interpolation key 'nope' not found"),
        ("~adapter", "adapter: must be given"),
        ("~data", "data: must be given: data=bytes|digits"),
        ("~target", "~target: cannot be left out"),
        ("+adapter.r=2", "+adapter.r: is set already; adapter.r=… changes it"),
        ("=3", "=3: has no key"),
    ],
)
def test_the_message_says_what_is_right(command: str, message: str):
    key = command.partition("=")[0]
    points = [compose.hydra_arguments([*SMALL["shift"][:4], *command.split()])]
    (job,) = multirun.plan_jobs(points)
    assert message in str(job.error), key
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "trainer.devices=auto",
        "trainer.max_epochs=-1 trainer.max_steps=5",
        "trainer.max_steps=-1",
        "trainer.gradient_clip_val=0",
        "trainer.limit_train_batches=1 trainer.limit_val_batches=1.0",
        "trainer.limit_train_batches=0.5 trainer.limit_test_batches=0",
        "trainer.fast_dev_run=false",
        "trainer.max_time=00:01:00:00",
        "trainer.max_time={hours:1}",
        "trainer.val_check_interval=0.5",
        "trainer.overfit_batches=0",
        "+optimizer.betas=[0.5,0.6]",
        "optimizer={lr:0.3}",
        "adapter.r=full",
        "early_stopping={metric:val/loss,patience:3}",
        f"data._target_={HERE}.shift_data",
        f"data._target_={HERE}.Loud +data.noise=inf",
    ],
)
def test_a_special_value_stays_valid(command: str):
    points = [compose.hydra_arguments([*SMALL["shift"][:4], *command.split()])]
    assert [job.error for job in multirun.plan_jobs(points)] == [None]
