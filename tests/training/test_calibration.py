"""Runs whose adapters start from data: which batches are read, and whose identity they belong to.

The truth is the run's own data module, asked for its first batches, and numpy's SVD of what the
first layer is given.
Run: make test ARGS=tests/training/test_calibration.py
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab import adapters
from lora_lab.training.calibration import calibration_of, with_values
from lora_lab.training.plan import plan
from tests.config.test_conf import composed
from tests.conftest import SMALL, Lab, only_run

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
