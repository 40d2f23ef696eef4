"""The files of conf/, the composition of configs, and the hashes that identify runs, cells, bases.

Independent truth: `hydra.compose` itself for each point of a multirun, the YAML files of conf/ read
back, and for the hashes a list of changes that must and must not change them.
Run: make test ARGS=tests/config/test_conf.py
"""

from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lora_lab.cli.help_text import train_help
from lora_lab.config import compose as compose_module
from lora_lab.config.checks import parse_config
from lora_lab.config.compose import hydra_arguments
from lora_lab.config.options import options
from lora_lab.config.schema import Config, ConfigError
from lora_lab.models.mlp import MLP
from lora_lab.sweeps.launchers.register import register
from lora_lab.training import bases
from lora_lab.training.plan import plan
from tests.conftest import SMALL, Lab, only_run
from tests.protocol_files import FILES as PROTOCOLS
from tests.protocol_files import paths
from tests.text_files import save_jsonl, save_rows, save_tokenizer
from tests.tiny_models import tiny_model
from tests.vision import save_images, tiny_convnext, use_torchvision

register()
OPTIONS = [(group, option) for group, choices in options().items() for option in choices]
PRETRAINED = ["model=pretrained", "model.path=bert", "model.head=classification", "target=all"]
"""A model whose weights lie in files, which a test has to write."""
EVERYTHING = "model._target_=tests.all_layer_kinds.AllLayerKinds"
TEXTS = ["data.train=train.jsonl", "data.base=train.jsonl", "data.tokenizer=tokenizer"]
FROM_FILES = ("text", "words", "language", "images", "docstrings")
"""Data sets that read a user's files, or a tokenizer's."""
NEEDS = {
    ("optimizer", "galore"): ["adapter=full"],
    ("trainer", "gpu"): ["trainer.accelerator=cpu"],
    ("base", "checkpoint"): ["base.path=base.safetensors"],
    ("data", "text"): [*TEXTS, "+model.in_features=4"],
    ("data", "words"): [*TEXTS, "+model.in_features=4"],
    ("data", "language"): [*TEXTS, "+model.in_features=4"],
    ("data", "docstrings"): [*PRETRAINED, "base=pretrained", "data.tokenizer=tokenizer"],
    ("data", "images"): [
        "data.train=images",
        "data.base=images",
        "data.batch_size=4",
        "+model.in_features=4",
    ],
    **{("target", option): [EVERYTHING] for option in options()["target"]},
    **{("model", option): ["target=all"] for option in options()["model"]},
    ("model", "pretrained"): PRETRAINED[1:],
    ("model", "timm"): ["model.path=convnext", "target=all"],
    ("base", "pretrained"): PRETRAINED,
    **{("experiment", option): paths(option) for option in PROTOCOLS},
}
"""What an option cannot do without on a machine with no GPU and no files."""
BRIEF = ("base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1")


def composed(*overrides: str) -> Config:
    with initialize_config_module("lora_lab.conf", version_base="1.3"):
        plain = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(plain, dict)
    return parse_config({str(key): value for key, value in plain.items()})


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_says_what_it_is(group: str, option: str):
    if group == "data" and option in FROM_FILES:
        save_rows("train.jsonl", 40)
        save_tokenizer("tokenizer")
        if option == "words":
            save_jsonl("train.jsonl", [{"words": ["a", "film"], "labels": ["O", "B"]}] * 40)
        if option == "images":
            use_torchvision()
            save_images("images", 40)
    if option in ("pretrained", "docstrings"):
        tiny_model("bert", "bert", "none")
    if option == "timm":
        tiny_convnext("convnext")
    cfg = composed(f"{group}={option}", *NEEDS.get((group, option), []))
    assert options()[group][option].endswith(".")
    # What forgetting is measured of is planned in tests/training/test_forgetting_pretrained.py.
    is_planned = group != "forget" and (group, option) != ("base", "checkpoint")
    if is_planned and option not in PROTOCOLS:
        plan(cfg)


@pytest.mark.parametrize("adapter", options()["adapter"])
def test_every_adapter_trains(lab: Lab, adapter: str):
    from_data = adapter in ("eva", "corda", "lora_ga")  # which are for layers of features
    of_features = from_data or adapter in ("loha", "lokr", "lokr_both", "relora")
    targets = "target=[linear,conv]" if of_features else "target=[linear,conv,embedding]"
    targets = "target=linear" if adapter in ("vera", "adalora") else targets
    assert lab("shift", EVERYTHING, targets, f"adapter={adapter}", *BRIEF) == 0
    losses = only_run().curve("val/loss")
    assert adapter == "none" or losses[0] != losses[1]


@pytest.mark.parametrize("target", options()["target"])
def test_every_target_trains(lab: Lab, target: str):
    assert lab("shift", EVERYTHING, f"target=[{target}]", *BRIEF) == 0
    losses = only_run().curve("val/loss")
    assert losses[0] != losses[1]


def test_no_experiment_sets_what_an_adapter_is():
    """adapter=pissa must not be undone by the experiment it is tried in."""
    conf = Path(__file__).parents[2] / "conf"
    defining = {
        key
        for path in (conf / "adapter").glob("*.yaml")
        for key in yaml.safe_load(path.read_text())
        if path.stem not in ("lora", "full", "none")
    }
    for path in (conf / "experiment").glob("*.yaml"):
        keys = set(yaml.safe_load(path.read_text()).get("adapter", {}))
        assert not keys & (defining - {"defaults"}), path


def by_hydra(overrides: list[str]) -> Config | str:
    """What Hydra makes of a complete command line: the config, or the message of its error."""
    try:
        return composed(*overrides)
    except ConfigError as error:
        return str(error)
    except HydraException as error:
        return compose_module.hydra_error_message(error)


@pytest.mark.parametrize(
    "swept",
    [
        ["experiment=digits", "adapter.r=1,2", "adapter=lora,dora", "optimizer.lr=1e-3,0.01"],
        pytest.param(
            [
                "experiment=digits",
                "target=*.fc*,conv",
                "adapter.rank_pattern={*fc1:2},{}",
                "seed=0,1",
            ],
            marks=pytest.mark.slow,
        ),
        [
            "experiment=shift",
            "spectra={keep:0.9},{keep:0.8}",
            "optimizer={lr:0.3}",
            "data.seed=1,2",
        ],
        ["adapter.r=1,0", "seed=0,no", "adapter.rr=1,2"],
        pytest.param(
            ["target.linear.match=a,b", "model.arguments=1,2", "+target.linear.r=2,3"],
            marks=pytest.mark.slow,
        ),
        ["experiment=digits,no_such", "~published", "base.epochs=${trainer.max_epochs},3"],
    ],
)
def test_the_points_of_a_multirun_are_what_hydra_composes_of_each(swept: list[str]):
    points = compose_module.sweep_points(hydra_arguments(["-m", *swept])[1:])
    assert len(points) >= 4
    for overrides, cfg in list(compose_module.compose_points(points)):
        assert (cfg if isinstance(cfg, Config) else str(cfg)) == by_hydra(overrides)


def test_all_groups_are_listed():
    groups = "experiment data model base adapter target forget optimizer trainer tracking"
    assert sorted(options()) == sorted([*groups.split(), "hydra/launcher"])
    assert sorted(options()["experiment"]) == sorted(SMALL)


@pytest.mark.parametrize(
    ("data", "model"),
    [*product([d for d in options()["data"] if d not in FROM_FILES], options()["model"])],
)
def test_every_model_fits_every_data_set(data: str, model: str):
    if model == "pretrained":
        tiny_model("bert", "bert", "none")
    if model == "timm":
        tiny_convnext("convnext")
    settings = NEEDS["model", model]
    assert plan(composed(f"data={data}", f"model={model}", *settings)).sites


def test_plans_of_the_same_model_build_it_once(monkeypatch: pytest.MonkeyPatch):
    built: list[int] = []

    class Counted(MLP):
        def __init__(self, in_features: int, out_features: int, hidden: list[int]):
            super().__init__(in_features, out_features, hidden)
            built.append(hidden[0])

    monkeypatch.setattr("lora_lab.models.mlp.MLP", Counted)
    for hidden, r in ((96, 1), (96, 2), (32, 1), (96, 1)):
        cfg = composed("experiment=digits", f"model.hidden=[{hidden}]", f"adapter.r={r}")
        shapes = [site.shape for site in plan(cfg).sites]
        assert shapes == [(hidden, 64), (10, hidden)]
    assert built == [96, 32, 96]


def test_a_rank_of_full_is_full_fine_tuning_and_one_of_none_no_adapter():
    for word in ("full", "none"):
        alone = composed(f"adapter={word}")
        assert composed(f"adapter.r={word}").identity() == alone.identity()
        assert composed("adapter.alpha=3", f"adapter.r={word}").identity() == alone.identity()
    with pytest.raises(ConfigError, match=r"adapter\.r=Full"):
        composed("adapter.r=Full")


def test_help_names_every_option():
    text = train_help()
    for group, option in OPTIONS:
        assert f"{group}=" in text
        assert f" {option} " in text or f"={option} " in text


def test_help_has_the_keys_of_chosen_options():
    text = train_help(["-m", "model=pretrained", "data=text", "data.train=x", "--help"])
    conf = Path(__file__).parents[2] / "conf"
    for option in ("model/pretrained", "data/text"):
        for line in (conf / f"{option}.yaml").read_text().splitlines():
            assert f"\n  {line}\n" in text
    assert text.startswith(train_help())
    assert "\nexperiment=digits sets KEY:\n" in train_help(["experiment=digits"])


def test_identity_is_of_what_can_change_the_result():
    one = composed()
    for same in ("runs_dir=x", "bases_dir=y", "tracking=off", "figures=false", "trainer=cpu"):
        assert composed(same).identity() == one.identity()
    others = ("seed=1", "data.seed=1", "adapter.r=2", "optimizer.lr=0.1", "base.epochs=3")
    others = (*others, "target=lin*", "trainer.max_epochs=3", "+trainer.limit_train_batches=5")
    hydra_arguments(["target=lin*"])
    assert len({composed(other).identity() for other in others} | {one.identity()}) == 9


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_an_argument_of_the_trainer_is_set_whether_the_yaml_has_it_or_not(plus: str):
    words = [f"{plus}trainer.max_steps=5", f"{plus}trainer.limit_train_batches=3"]
    trainer = composed(*hydra_arguments(words)).trainer.model_dump()
    assert (trainer["max_steps"], trainer["limit_train_batches"]) == (5, 3)


def test_the_order_of_a_pattern_matters_and_its_names_may_be_numbers():
    patterns = ("{li*:2,linear:3}", "{linear:3,li*:2}")
    one, other = (composed(f"++adapter.rank_pattern={pattern}") for pattern in patterns)
    assert one.identity() != other.identity()
    assert one.cell() != other.cell()
    numbers = composed("++adapter.rank_pattern={0:1,linear:2}").adapter
    assert numbers.rank_pattern == {"0": 1, "linear": 2}  # pyright: ignore


def test_a_config_that_is_older_than_a_key_is_read():
    plain = composed().to_dict()
    for key in ("sweep", "figures"):
        del plain[key]
    plain["spectra"] = {"every_n_epochs": 10}
    assert parse_config(plain).identity() == composed().identity()


def test_base_key_is_of_what_can_change_the_base():
    one = composed()
    same = ("seed=1", "adapter.r=2", "adapter=full", "optimizer.lr=0.1", "trainer.max_epochs=3")
    for other in (*same, "name=other", "trainer=cpu", "base.optimizer.fused=true"):
        assert bases.key(composed(other)) == bases.key(one)
    others = ("base.seed=1", "data.seed=1", "base.epochs=3", "base.optimizer.lr=0.1", "model=mlp")
    others = (*others, "trainer.precision=bf16-true", "trainer.gradient_clip_val=1")
    others = (*others, "trainer.check_val_every_n_epoch=7")
    assert len({bases.key(composed(other)) for other in others} | {bases.key(one)}) == 9


def test_a_cell_names_its_run_within_a_file_systems_limits():
    path = plan(composed("+optimizer.betas=[0.5,0.6]", r"adapter.scaling=alpha/sqrt\(r\)")).path
    assert path.name.startswith("r1-alpha1-gaussian-alpha-sqrt_r_-linear-lr0.001-data0-seed0-")
    assert len(path.name.encode()) < 255


def test_a_cell_is_all_of_a_run_but_its_seed():
    one = composed()
    assert composed("seed=1").cell() == one.cell()
    for other in ("optimizer.lr=0.1", "adapter.dropout=0.5", "base.epochs=3", "data.seed=1"):
        assert composed(other).cell() != one.cell()


def test_one_and_one_point_nought_are_the_same_run():
    assert composed("data.shift=1").identity() == composed("data.shift=1.0").identity()


def test_a_base_is_of_its_source_too(monkeypatch: pytest.MonkeyPatch):
    cfg = composed()
    before, source = bases.key(cfg), bases.inspect.getsource
    monkeypatch.setattr(bases.inspect, "getsource", lambda code: source(code) + "changed = 1\n")
    assert bases.key(cfg) != before
