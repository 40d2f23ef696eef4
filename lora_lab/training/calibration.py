"""The batches of a run's training data that inits read: EVA, CorDA and LoRA-GA start from them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from torch import Tensor, nn

from lora_lab.adapters import INITS, Calibration, Site
from lora_lab.adapters.model_call import logits
from lora_lab.config.schema import Config, Lora
from lora_lab.data import Data
from lora_lab.training.modules import Batch
from lora_lab.training.tasks import TASKS


def calibration_of(cfg: Config, sites: Iterable[Site]) -> Calibration | None:
    """The first batches of the first epoch, and the summed loss that is trained on.

    They are as many as adapter.calibration says, or all of an epoch that has fewer, with all of
    their rows in each process of the run. None where the init of no site reads data.
    """
    if not any(site.recipe is not None and INITS[site.recipe.init].reads for site in sites):
        return None
    assert isinstance(cfg.adapter, Lora)
    data: Data = cfg.data.callee(phase="adapt", **cfg.data.arguments)
    data.setup("fit")
    loss_sum = TASKS[data.task].training_loss(cfg.label_smoothing)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return loss_sum(logits(model, inputs), targets)

    return Calibration([*islice(data.train_dataloader(), cfg.adapter.calibration)], loss)


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which parameters of the model have these values, as a new head's of a seed."""
    parameters = {name: model.get_parameter(name) for name in values}
    base = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(base[name])
