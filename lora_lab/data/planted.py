"""Base class of data sets that plant a known change in one weight, with the best ΔW for them."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lora_lab.adapters import INITS, adapter_class, attached
from lora_lab.analysis import theory
from lora_lab.analysis.theory import LeastSquaresFit, Prediction
from lora_lab.data.module import Data, Phase
from lora_lab.seeding import generator


class Planted(Data):
    """A known change planted in the one weight of a linear model.

    The model is for `in_features` (of an embedding: tokens) and `out_features`. Normal noise of
    standard deviation `noise` is added to the targets that adapters learn, not to the base's.
    Each step trains on all rows, and validation is on the same rows. So the final validation loss
    should be that of the best ΔW the adapter can reach, which is a least squares problem.
    """

    task = "regression"

    def __init__(
        self, phase: Phase, in_features: int, out_features: int, noise: float, steps: int, seed: int
    ):
        super().__init__(phase, None, seed, steps)
        self.in_features, self.out_features, self.noise = in_features, out_features, noise

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of inputs and outputs of the weight; of an embedding, tokens and features."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    def datasets(self, x: Tensor, y: Tensor) -> tuple[TensorDataset, TensorDataset]:
        """The training and the validation set, which are one: inputs `x` and targets `y` + noise.

        The base's targets have no noise.
        """
        if self.phase == "adapt":
            y = y + self.noise * torch.randn(y.shape, generator=generator(self.seed, "noise"))
        dataset = TensorDataset(x, y.float())
        return dataset, dataset

    def design_and_targets(self) -> tuple[Tensor, Tensor]:
        """The training data as a regression Y ≈ X Wᵀ on the weight as a matrix W (out × rest).

        X is the design matrix (n × rest), Y the targets (n × out). Here X are the inputs as they
        are, or tokens as one-hot rows.
        """
        assert self.train is not None
        x, y = self.train.tensors
        return x if x.is_floating_point() else F.one_hot(x, self.in_features), y

    def design_and_residual(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """X, and Y − X Wᵀ with the weight W of the base, in float64."""
        (site,) = base_parameters(model)
        layer = model.get_submodule(site)
        W = adapter_class(layer).weight_to_matrix(
            base_parameters(model)[site].detach().cpu().double()
        )
        X, Y = (tensor.double() for tensor in self.design_and_targets())
        return X, Y - X @ W.T

    def best_update(self, model: nn.Module) -> LeastSquaresFit | None:
        """The best ΔW within reach of the adapter on `model`, by least squares.

        None where the model has several weights, and for DoRA, dropout and other forms than LoRA.
        A model without adapter is fully fine-tuned: any ΔW is within reach.
        """
        if len(base_parameters(model)) != 1:
            return None
        (site,) = base_parameters(model)
        X, Y = self.design_and_residual(model)
        X = X[:, occurring := X.any(0)]  # without the tokens of an embedding that never occur
        if (adapter := attached(model).get(site)) is None:
            return theory.least_squares(X, Y)
        if adapter.magnitude is not None or adapter.recipe.dropout or adapter.form is not None:
            return None
        tensors = {name: t.detach().cpu().double() for name, t in adapter.tensors().items()}
        A, B = tensors["A"][:, occurring], tensors["B"]
        match adapter.recipe.trains, adapter.starts_at_zero:
            case "both", _ if "A0" in tensors:  # ΔW = s (B A − B₀ A₀)
                start = adapter.scale * tensors["B0"] @ tensors["A0"][:, occurring]
                fit = theory.least_squares(X, Y, adapter.r, start=start)
            case "both", _:
                fit = theory.least_squares(X, Y, adapter.r)
            case "core", _:  # LoRA-XS: both factors are frozen, a matrix between them trains
                fit = theory.least_squares(X, Y, A=A, B=B)
            case _, "A":  # the factor that starts at zero trains: A, of an embedding or MiCA
                fit = theory.least_squares(X, Y, B=B)
            case _:
                fit = theory.least_squares(X, Y, A=A)
        # Factors that start from the weight also move the tokens that never occur: the data does
        # not say where to, so ΔW is not unique.
        moves_others = INITS[adapter.recipe.init].starts_nonzero and not occurring.all()
        return replace(fit, is_unique=fit.is_unique and not moves_others)

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """The loss of the best ΔW and, where that is unique, its first four singular values."""
        if (best := self.best_update(model)) is None:
            return {}
        predictions = {"val/loss": Prediction(best.loss)}
        if best.is_unique:
            (site,) = base_parameters(model)
            sigma = torch.linalg.svdvals(best.delta)[:4].tolist()
            for i, value in enumerate(sigma, 1):
                if value > 1e-3 * sigma[0]:  # the rest is rounding
                    predictions[f"spectra/{site}/sigma_{i}"] = Prediction(value)
        return predictions


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base, without those of adapters, by the name of their layer."""
    named = model.named_parameters()
    return {name.rpartition(".")[0]: p for name, p in named if "lora" not in name.split(".")}


def planted_matrix(out: int, rest: int, sigma: list[float], rng: torch.Generator) -> Tensor:
    """A matrix (out × rest) with singular values `sigma` and random singular vectors, in float64.

    Raises ValueError for more values than min(out, rest).
    """
    if len(sigma) > min(out, rest):
        raise ValueError(
            f"sigma={sigma}: {len(sigma)} singular values, and {out} × {rest} has {min(out, rest)}"
        )
    U, V = (random_orthonormal(size, len(sigma), rng) for size in (out, rest))
    return U * torch.tensor(sigma, dtype=torch.float64) @ V.T


def white_noise(rows: int, columns: int, whiten: bool, rng: torch.Generator) -> Tensor:
    """White noise (rows × columns) of variance 1, in float64.

    With `whiten` the columns are exactly orthogonal, and each has the mean square 1.
    """
    if whiten:
        return random_orthonormal(rows, columns, rng) * rows**0.5
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def random_orthonormal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """A random matrix (rows × columns) with orthonormal columns, in float64.

    Raises ValueError for more columns than rows.
    """
    if columns > rows:
        raise ValueError(f"{columns} orthonormal columns do not fit in {rows} rows")
    return torch.linalg.qr(torch.randn(rows, columns, generator=rng, dtype=torch.float64)).Q
