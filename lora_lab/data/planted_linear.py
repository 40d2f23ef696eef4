"""A linear map that changes by a matrix of known singular values."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn
from torch.utils.data import TensorDataset

from lora_lab.adapters import INITS, Adapter, attached
from lora_lab.analysis import theory
from lora_lab.analysis.theory import Prediction
from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted, planted_matrix, white_noise
from lora_lab.seeding import generator


class PlantedLinear(Planted):
    """y = θ x for the base, y = (θ + Δ) x + noise to adapt to.

    θ (out × in) has iid normal entries of standard deviation `spread`, Δ the singular values
    `sigma`. The covariance of inputs i and j is correlation^|i−j|: with `whiten` exactly that over
    these `samples` rows, else that of the distribution they are drawn from.

    `expects` chooses what theory predicts: `end`, the metrics at the end of a run; `intruders`,
    those with the number of intruder dimensions; `first_step`, the first step of Adam.
    """

    def __init__(
        self,
        phase: Phase,
        samples: PositiveInt,
        in_features: PositiveInt,
        out_features: PositiveInt,
        sigma: list[PositiveFloat],
        spread: PositiveFloat,
        correlation: Annotated[float, Field(ge=0, lt=1)],
        whiten: bool,
        noise: NonNegativeFloat,
        expects: Literal["end", "intruders", "first_step"],
        steps: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, in_features, out_features, noise, steps, seed)
        if whiten and samples < in_features:
            raise ValueError(f"samples={samples}: whiten needs in_features={in_features} at least")
        self.samples, self.spread, self.correlation = samples, spread, correlation
        self.whiten, self.expects = whiten, expects
        self.delta = planted_matrix(out_features, in_features, sigma, generator(seed, "delta"))

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Inputs (samples, in) and y (samples, out), for training and for validation."""
        shape = (self.out_features, self.in_features)
        W = torch.randn(*shape, generator=generator(self.seed, "theta")).double() * self.spread
        rng = generator(self.seed, "x", self.phase)
        x = white_noise(self.samples, self.in_features, self.whiten, rng)
        index = torch.arange(self.in_features, dtype=torch.float64)
        covariance = self.correlation ** (index[:, None] - index).abs()  # (in, in)
        x = x @ torch.linalg.cholesky(covariance).T
        y = x @ (W + self.delta if self.phase == "adapt" else W).T
        return self.datasets(x.float(), y)

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """The predictions that `expects` chooses; empty where theory does not cover the run."""
        adapter = next(iter(attached(model).values()), None)
        if self.expects == "first_step":
            return {} if adapter is None else self._first_step(model, adapter)
        predictions = super().predicted_metrics(model)
        if self.expects == "intruders" and self.noise == 0:
            is_drawn = adapter is None or INITS[adapter.recipe.init].is_random
            if is_drawn and (best := self.best_update(model)) is not None and best.is_unique:
                strengths = torch.linalg.svdvals(best.delta).tolist()
                shape = (self.out_features, self.in_features, self.spread)
                if (count := theory.intruders(strengths, *shape)) is not None:
                    predictions["spectra/linear/intruders"] = Prediction(count)
        return predictions

    def _first_step(self, model: nn.Module, adapter: Adapter) -> dict[str, Prediction]:
        """The gradient of B and the descent of the loss in the first step, both relative to G's."""
        recipe = adapter.recipe
        if recipe.init not in theory.MOMENTS or recipe.dora or recipe.dropout or adapter.form:
            return {}
        X, Y = self.design_and_residual(model)
        G = -2 / Y.numel() * Y.T @ X  # (out, in): the gradient of the mean squared error
        return {
            f"first_step/{name}": closed_form(G, adapter.r, adapter.scale, recipe.init)
            for name, closed_form in (
                ("gradient_ratio", theory.gradient_ratio),
                ("descent", theory.descent),
            )
        }
