"""What an adapter is: the trainable change to one weight, and the two views every adapter has."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters.init import INITS
from lora_lab.adapters.scaling import SCALINGS

TRAINS = ("both", "zero", "core")
"""What trains: both factors; the one that starts at zero, the drawn one frozen (LoRA-FA, Zhang et
al. 2023: B, or an embedding's A); an r × r core between two frozen factors (LoRA-XS, Bałazy et al.
2024)."""

TENSORS = ("A", "B", "core", "A0", "B0", "magnitude")
"""What an adapter may hold: all of it, and nothing else, is stored."""


Stacks = Sequence[Tensor]
"""What belongs to all runs of a `Pack`, a tensor (k, …) for each k of them in one stack."""


class AdapterError(ValueError):
    """An adapter that cannot be made, loaded, merged or switched as asked."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made: every choice there is but where it sits."""

    r: int
    alpha: float
    dropout: float = 0.0
    init: str = "kaiming"
    scaling: str = "alpha/r"
    trains: str = "both"
    dora: bool = False

    def check(self) -> None:
        """Raises AdapterError for a choice that does not exist or does not go with another."""
        if type(self.r) is not int or self.r < 1:
            raise AdapterError(f"r={self.r!r}: must be a whole number of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"alpha={self.alpha}: must be more than 0")
        for name, table in (("init", INITS), ("scaling", SCALINGS), ("trains", TRAINS)):
            if getattr(self, name) not in table:
                value = getattr(self, name)
                raise AdapterError(f"{name}={value!r}: must be one of {', '.join(table)}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout={self.dropout}: must be at least 0 and less than 1")
        if self.trains == "core" and not INITS[self.init].from_weight:
            made = ", ".join(name for name, init in INITS.items() if init.from_weight)
            raise AdapterError(
                f"trains=core with init={self.init}: B is zero, so no core could move ΔW; "
                f"take an init from the weight: {made}"
            )


class Adapter(nn.Module, ABC):
    """A low-rank change ΔW to one weight of one frozen layer.

    ΔW = scale · B A on the weight as a matrix (out × rest); with a core R, scale · B R A; with
    factors that start from the weight, scale · (B A − B₀ A₀), so that ΔW starts at zero and the
    base stays what it is. DoRA (Liu et al. 2024, equation 5) then sets the norm of every row of
    W + ΔW to a trained magnitude. In a `Pack` an adapter stands for k runs: its tensors, and its
    scale, then have a dimension of runs before all others.

    Two views of the same change are kept equal: `delta()`, ΔW in the weight's own shape, and
    `forward()`, what the layer gives with it. Tensors are stored in float32, or in the weight's
    dtype where that is wider.
    """

    kind: ClassVar[str]
    zero_factor: ClassVar[str] = "B"
    """The factor that starts at zero."""
    takes_dora: ClassVar[bool] = True

    A: nn.Parameter  # (r, rest)
    B: nn.Parameter  # (out, r)
    core: nn.Parameter | None  # (r, r)
    A0: Tensor | None  # (r, rest)
    B0: Tensor | None  # (out, r)
    magnitude: nn.Parameter | None  # (out,)
    source: "Adapter | None"
    """The adapter of another layer that uses the same weight, and whose tensors these are."""
    kept: Tensor | None
    """The weight as it was before a merge; None while not merged."""

    def __init__(
        self, layer: nn.Module, parameter: str, rows: tuple[int, int] | None, recipe: Recipe
    ):
        """For rows `rows` (None: all) of `layer`'s parameter; `draw` or `fill` give the tensors."""
        super().__init__()
        self.parameter, self.rows, self.recipe = parameter, rows, recipe
        self.scale = SCALINGS[recipe.scaling](recipe.alpha, recipe.r)
        self.shape = self.weight_of(layer).shape
        self.masked: int | None = None
        """The padding token of a table that several layers share: its change is held at zero."""
        self.tied = False
        """Whether another layer uses the same weight, with these tensors."""
        # Not a child: the tensors are registered, trained and stored once, with their owner.
        object.__setattr__(self, "source", None)
        self.register_buffer("kept", None, persistent=False)

    @classmethod
    @abstractmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of a type that this kind adapts."""

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        """Why this one layer cannot be adapted though its type can; None where it can."""
        return None

    @property
    def r(self) -> int:
        """The rank."""
        return self.recipe.r

    def weight_of(self, layer: nn.Module) -> Tensor:
        """The weight of `layer` that this adapter changes, as it is without it."""
        weight = layer._parameters[self.parameter]
        assert weight is not None
        return weight if self.rows is None else weight[slice(*self.rows)]

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Float[Tensor, "out rest"]:
        """The weight as the matrix that B A is added to."""
        return weight.flatten(1)

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "out rest"], shape: Sequence[int]) -> Tensor:
        """A matrix in its weight's own shape."""
        return matrix.view(*shape)

    def draw(self, layer: nn.Module, generator: torch.Generator) -> "Adapter":
        """Gives the factors what the recipe's init draws for the layer's weight."""
        weight, recipe = self.weight_of(layer).detach(), self.recipe
        if weight.is_meta:
            raise AdapterError("the model is on the meta device: attach once it has its weights")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        W = self.weight_to_matrix(weight).to(dtype)
        init = INITS[recipe.init]
        zero_is_B = self.zero_factor == "B"
        drawn, zero = init.draw(W if zero_is_B else W.T, recipe.r, self.scale, generator)
        drawn, zero = drawn.to(W), zero.to(W)
        if (padding := getattr(layer, "padding_idx", None)) is not None:
            zero[padding] = 0  # and no gradient reaches it: that row's change stays zero
        tensors = {"A": drawn, "B": zero} if zero_is_B else {"A": zero.T, "B": drawn.T}
        if recipe.trains == "core":
            tensors["core"] = W.new_zeros(recipe.r, recipe.r)
        elif init.from_weight:
            tensors |= {"A0": tensors["A"].clone(), "B0": tensors["B"].clone()}
        self.fill(tensors)
        if recipe.dora:
            self.magnitude = nn.Parameter(self.norms(weight))
        return self

    def fill(self, tensors: dict[str, Tensor]) -> "Adapter":
        """Takes `tensors` by their names in TENSORS."""
        for name in TENSORS:
            if (tensor := tensors.get(name)) is None:
                setattr(self, name, None)
            elif name in ("A0", "B0"):
                setattr(self, name, nn.Buffer(tensor))
            else:
                setattr(self, name, nn.Parameter(tensor.contiguous()))
        self.thaw(True)
        return self

    def thaw(self, thawed: bool) -> None:
        """Lets what the recipe trains take gradients, or nothing."""
        trained = {"both": ("A", "B"), "zero": (self.zero_factor,), "core": ("core",)}[
            self.recipe.trains
        ]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(thawed and name in (*trained, "magnitude"))

    def tensors(self) -> dict[str, Tensor]:
        """What there is to store."""
        return {name: t.detach() for name in TENSORS if (t := getattr(self, name)) is not None}

    def factors(
        self,
    ) -> tuple[Float[Tensor, "*runs rank rest"], Float[Tensor, "*runs out rank"]]:
        """A and B of one product: ΔW = scale · B A, but for DoRA's magnitude.

        Their rank is r, or 2r where ΔW is measured from factors that start from the weight.
        """
        source = self.source or self
        A, B = (
            (source.A, source.B)
            if source.zero_factor == self.zero_factor
            else (source.B.T, source.A.T)
        )
        if self.masked is not None:
            token = torch.tensor(self.masked, device=A.device)
            A, B = (
                (A.index_fill(1, token, 0), B)
                if self.zero_factor == "A"
                else (A, B.index_fill(0, token, 0))
            )
        if self.core is not None:
            return A, B @ self.core
        if self.A0 is not None and self.B0 is not None:
            return torch.cat([A, self.A0], -2), torch.cat([B, -self.B0], -1)
        return A, B

    def norms(self, weight: Tensor) -> Float[Tensor, "*runs out"]:
        """The norm of every row of the matrix W + scale · B A, without forming it.

        The terms cancel, and digits are lost, where a row is thousands of times smaller than W's.
        """
        with torch.no_grad():
            A, B = self.factors()
            W, B = self.weight_to_matrix(weight).to(A.dtype), self.scale * B
            square = torch.linalg.vector_norm(W, dim=1) ** 2
            square = square + 2 * ((W @ A.mT) * B).sum(-1) + ((B @ (A @ A.mT)) * B).sum(-1)
            return square.clamp(min=0).sqrt()

    def gain(self, weight: Tensor) -> Float[Tensor, "*runs out"]:
        """What DoRA multiplies every row by; the norm takes no gradient (section 4.3)."""
        assert self.magnitude is not None
        norms = self.norms(weight)
        # A row of zeros has no direction to be scaled.
        return torch.where(norms > 0, self.magnitude / norms, 1.0)

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in the weight's own shape. `weight` is the base's, which only DoRA reads."""
        A, B = self.factors()
        matrix = self.scale * B @ A
        if self.magnitude is not None:
            W = self.weight_to_matrix(weight).to(matrix.dtype)
            matrix = self.gain(weight)[:, None] * (W + matrix) - W
        return self.matrix_to_weight(matrix, self.shape)

    def dropped(self, x: Tensor) -> Tensor:
        """`x` under this adapter's dropout."""
        p = self.recipe.dropout
        return F.dropout(x, p) if p and self.training else x

    def extra_repr(self) -> str:
        """The numbers that tell one adapter from another, for print(model)."""
        recipe = self.recipe
        return f"r={recipe.r}, alpha={recipe.alpha}, scale={self.scale:g}, init={recipe.init}"


class FactoredAdapter(Adapter):
    """An adapter whose ΔW is never formed in training: a forward hook changes the layer's output.

    It computes in the dtype of that output.
    """

    def forward(self, layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
        """The layer's output with W + ΔW, from its `input` and its `output` with W."""
        A, B = self.factors()
        if A.dtype != output.dtype:
            A, B = A.to(output.dtype), B.to(output.dtype)
        adapted = self.up(layer, self.down(layer, input, A), B, output)
        if self.magnitude is None:
            return adapted
        bias = getattr(layer, "bias", None)
        linear = adapted if bias is None else adapted - self.along(bias, output)
        gain = self.gain(self.weight_of(layer)).to(output.dtype)
        # At the start the gain is 1 and this adds exactly nothing.
        return adapted + (self.along(gain, output) - 1) * linear

    def along(self, values: Float[Tensor, "*runs out"], output: Tensor) -> Tensor:
        """One value for each of the layer's outputs, to be broadcast over `output`."""
        return values

    @abstractmethod
    def down(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """A on the layer's input, the r numbers that B takes."""

    @abstractmethod
    def up(self, layer: nn.Module, hidden: Tensor, B: Tensor, output: Tensor) -> Tensor:
        """`output` + scale · B on what `down` gave."""

    @abstractmethod
    def down_stacked(self, layer: nn.Module, input: Tensor, A: Tensor) -> Tensor:
        """`down` of k runs: A (k, r, rest), `input` (k, …) or, shared, (1, …) → (k, …)."""

    @abstractmethod
    def up_stacked(self, layer: nn.Module, hidden: Stacks, B: Stacks, output: Tensor) -> Tensor:
        """`up` of all runs, stack by stack in `hidden` and in B, which has the scale in it.

        `output` is (runs, …) or, shared, (1, …); gives (runs, …).
        """
