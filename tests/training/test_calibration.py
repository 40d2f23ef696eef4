"""Runs whose adapters start from data: which batches are read, and whose identity they belong to.

The truth is the run's own data module, asked for its first batches, and numpy's SVD of what the
first layer is given.
Run: make test ARGS=tests/training/test_calibration.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab import adapters
from lora_lab.config.schema import ConfigError
from lora_lab.report.run_tables import run_tables
from lora_lab.training.calibration import calibration_of, with_values
from lora_lab.training.plan import plan
from lora_lab.training.restore import restore
from tests.config.test_conf import composed
from tests.conftest import SMALL, Lab, command, only_run

EVA = ("adapter=eva", "adapter.trains=zero", "adapter.r=2")


@pytest.mark.parametrize("count", [2, 8])
def test_a_run_starts_from_its_first_training_batches(lab: Lab, count: int):
    assert lab("digits", *EVA, f"adapter.calibration={count}") == 0
    run = only_run()
    data = plan(composed("experiment=digits", *SMALL["digits"])).data("adapt")
    data.setup("fit")
    batches = [inputs for inputs, _ in data.train_dataloader()][:count]
    x = torch.cat(batches).flatten(1).double().numpy()
    A = load_file(run.path / "adapter" / "adapter.safetensors")["body.fc1.A"].double().numpy()
    V = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2]
    np.testing.assert_allclose(A.T @ A, V.T @ V, atol=1e-4)


def test_the_batches_are_of_the_identity_where_they_are_read():
    for init in ("kaiming", "pissa", "mica"):
        one, other = (composed(f"adapter.init={init}", f"adapter.calibration={n}") for n in (8, 2))
        assert one.identity() == other.identity()
    of_target = ("adapter.init=kaiming", "+target.linear.init=eva")
    for settings in (("adapter=eva",), ("adapter=lora_ga",), of_target):
        one, other = (composed(*settings, f"adapter.calibration={n}") for n in (8, 2))
        assert one.identity() != other.identity()


def test_a_site_that_eva_gives_no_rank_is_left_out_of_all_that_follows(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = ("adapter=eva", "adapter.r=1", "adapter.rho=2")
    assert lab("digits", *settings) == 0
    run = only_run()
    assert "'body.fc1' gets no rank by init=eva with rho=2" in caplog.text
    assert dict(run_tables(run)["facts"])["ranks that EVA gave, 2 in all"] == "head 2"
    assert run.last("parameters/trainable") == 2 * (10 + 16)
    measured = [key for key in np.load(run.path / "spectra.npz") if key.endswith("singular_values")]
    assert measured == ["head/singular_values"]
    (site,) = restore(run).plan.sites
    assert (site.name, site.recipe and site.recipe.r) == ("head", 2)
    assert command(monkeypatch, "export", str(run.path), "peft") == 0
    config = json.loads(Path("peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 16, "head")


def test_rho_is_of_the_identity_and_is_refused_without_eva():
    eva = composed("adapter=eva")
    assert eva.identity() == composed("adapter=eva", "adapter.rho=1.0").identity()
    assert eva.identity() != composed("adapter=eva", "adapter.rho=2").identity()
    with pytest.raises(ConfigError, match=r"adapter.rho=2 moves ranks between sites with init=eva"):
        plan(composed("adapter=pissa", "adapter.rho=2"))
    of_target = ("+target.linear.init=eva", "adapter.rho=2")
    assert plan(composed(*of_target)).cfg.adapter.rho == 2  # pyright: ignore


def test_nothing_is_read_for_other_inits():
    cfg = composed("experiment=digits")
    assert calibration_of(cfg, plan(cfg).sites) is None


def test_the_loss_is_that_of_the_run_and_the_values_are_those_of_its_head():
    cfg = composed("experiment=digits", *SMALL["digits"], "adapter=lora_ga", "label_smoothing=0.1")
    run_plan = plan(cfg)
    calibration = calibration_of(cfg, run_plan.sites)
    assert calibration is not None
    assert calibration.loss is not None
    model, (batch, *_) = run_plan.model(), calibration.batches
    bias = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
    x, y = batch
    expected = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(calibration.loss(model, batch), expected)
    before = adapters.weights_hash(model.state_dict())
    with with_values(model, {bias: torch.full((16,), 3.0)}):
        assert model.get_parameter(bias).tolist() == [3.0] * 16
    assert adapters.weights_hash(model.state_dict()) == before
