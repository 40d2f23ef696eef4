"""A linear map that moves by a matrix of known singular values."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lora_lab.adapters import INITS, Adapter, attached
from lora_lab.analysis import theory
from lora_lab.analysis.theory import Prediction
from lora_lab.config.schema import Seed
from lora_lab.data.module import Phase
from lora_lab.data.planted import Planted, orthonormal, planted_matrix
from lora_lab.seeding import generator


class PlantedLinear(Planted):
    """y = θ x for the base, y = (θ + Δ) x + noise to adapt to.

    θ (out × in) has iid normal entries of deviation `spread`, Δ the singular values `sigma`. The
    inputs' covariance is correlation^|i−j|: with `whiten` exactly that of these very rows, else of
    the distribution they are drawn from. `expects` is what theory is asked of a run: its end, its
    end with the intruder dimensions, or its first step, which is Adam's.
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
        super().__init__(phase, steps, seed)
        if whiten and samples < in_features:
            raise ValueError(f"samples={samples}: whiten needs in_features={in_features} at least")
        self.samples, self.in_features, self.out_features = samples, in_features, out_features
        self.spread, self.correlation, self.whiten = spread, correlation, whiten
        self.noise, self.sigma, self.expects = noise, sigma, expects
        self.delta = planted_matrix(out_features, in_features, sigma, generator(seed, "delta"))

    @property
    def sizes(self) -> dict[str, int]:
        """The two sides of θ."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """All of the phase's rows, twice."""
        shape, rows = (self.out_features, self.in_features), (self.samples, self.in_features)
        W = torch.randn(*shape, generator=generator(self.seed, "theta")).double() * self.spread
        draws = generator(self.seed, "x", self.phase)
        if self.whiten:
            x = orthonormal(*rows, draws) * self.samples**0.5
        else:
            x = torch.randn(*rows, generator=draws, dtype=torch.float64)
        place = torch.arange(self.in_features, dtype=torch.float64)
        covariance = self.correlation ** (place[:, None] - place).abs()
        x = x @ torch.linalg.cholesky(covariance).T
        y = x @ (W + self.delta if self.phase == "adapt" else W).T
        if self.phase == "adapt":
            noise = torch.randn(y.shape, generator=generator(self.seed, "noise"))
            y = y + self.noise * noise
        everything = TensorDataset(x.float(), y.float())
        return everything, everything

    def design(self) -> tuple[Tensor, Tensor]:
        """x and y themselves."""
        assert self.train is not None
        x, y = self.train.tensors
        return x, y

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """As of any planted change, with what is asked beside it; nothing where theory ends."""
        adapter = next(iter(attached(model).values()), None)
        if self.expects == "first_step":
            return {} if adapter is None else self._first_step(model, adapter)
        found = super().predicted_metrics(model)
        if self.expects == "intruders" and self.noise == 0:
            drawn = adapter is None or not INITS[adapter.recipe.init].from_weight
            if drawn and (best := self.best_update(model)) is not None and best.is_unique:
                strengths = torch.linalg.svdvals(best.delta).tolist()
                shape = (self.out_features, self.in_features, self.spread)
                if (count := theory.intruders(strengths, *shape)) is not None:
                    found["spectra/linear/intruders"] = Prediction(count)
        return found

    def _first_step(self, model: nn.Module, adapter: Adapter) -> dict[str, Prediction]:
        recipe = adapter.recipe
        if recipe.init not in theory.MOMENTS or recipe.dora or recipe.dropout:
            return {}
        X, Y = self.residual(model)
        G = -2 / Y.numel() * Y.T @ X
        return {
            f"first_step/{name}": form(G, adapter.r, adapter.scale, recipe.init)
            for name, form in (
                ("gradient_ratio", theory.gradient_ratio),
                ("descent", theory.descent),
            )
        }
