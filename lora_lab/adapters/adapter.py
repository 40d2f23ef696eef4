"""What an adapter is: the trainable change ΔW to one weight, and its two views."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lab.adapters import quantized
from lora_lab.adapters.data_inits import InputMoments
from lora_lab.adapters.form import Form
from lora_lab.adapters.forms import FORMS
from lora_lab.adapters.init import INITS
from lora_lab.adapters.memory import full_tensor
from lora_lab.adapters.quantized import dense_weight, weight_or_shape
from lora_lab.adapters.recipe import AdapterError, Recipe
from lora_lab.adapters.scaling import SCALINGS

Rows = tuple[int, int] | None
"""Some rows of a weight: the first, and the one after the last. None: all rows."""

OF_FORMS = ("lambda_b", "lambda_d", "A2", "B2", "C", "C2", "D", "lambdas")
OF_FORMS += ("A_merged", "B_merged")
"""The tensors that only forms other than LoRA have: see `Form`."""

TENSOR_NAMES = ("A", "B", "core", "A0", "B0", *OF_FORMS, "magnitude")
"""The tensors that an adapter can hold, which are all that is stored of it."""


class Adapter(nn.Module, ABC):
    """A low-rank change ΔW to one weight of one frozen layer.

    ΔW is a product of the factors A (r × rest) and B (out × r). It is added to the weight as a
    matrix (out × rest, see `weight_to_matrix`):

    - LoRA: ΔW = scale · B A.
    - With a core R (r × r, LoRA-XS): ΔW = scale · B R A.
    - With factors of which none starts at zero (PiSSA, OLoRA, svd): ΔW = scale · (B A − B₀ A₀),
      where A₀ and B₀ are their first values. So ΔW starts at zero and the base's weight stays as it
      is.
    - With another form (VeRA, LoHa, LoKr, AdaLoRA, ReLoRA): A and B are made of its tensors, see
      `Form`.

    DoRA (Liu et al. 2024, equation 5) then scales each row of W + ΔW to a trained norm, the
    magnitude.

    An adapter has two views of the same change, which tests hold equal: `delta()` is ΔW in the
    weight's shape, `forward()` is what the layer gives with W + ΔW.

    Tensors are stored in float32, or in the weight's dtype where that is wider. In a `Pack` one
    adapter holds those of k runs. Its tensors then have a dimension of runs before all others, as A
    (k, r, rest), and so has its scale.
    """

    kind: ClassVar[str]
    zero_factor: ClassVar[str] = "B"
    """The factor that starts at zero, unless the init says another."""
    takes_dora: ClassVar[bool] = True
    is_transposed: ClassVar[bool] = False
    """Whether the layer holds its weight as rest × out."""

    A: nn.Parameter  # (r, rest)
    B: nn.Parameter  # (out, r)
    core: nn.Parameter | None  # (r, r)
    A0: Tensor | None  # (r, rest)
    B0: Tensor | None  # (out, r)
    magnitude: nn.Parameter | None  # (out,)
    source: "Adapter | None"
    """The adapter of another layer that uses the same weight, and whose tensors this one uses."""
    weight_before_merge: Tensor | None
    """A copy of the weight from before `merge` changed it; None while not merged."""

    def __init__(self, layer: nn.Module, parameter: str, rows: Rows, recipe: Recipe):
        """An adapter without tensors yet, which `draw` or `fill` give it.

        It is for these rows of the weight that `layer` holds under the name `parameter`.
        """
        super().__init__()
        self.parameter, self.rows, self.recipe = parameter, rows, recipe
        self.scale = SCALINGS[recipe.scaling](recipe.alpha, recipe.r)
        weight = weight_or_shape(layer, parameter)
        assert weight is not None
        self.shape = self.block_of(weight, rows).shape
        self.masked_token: int | None = None
        """The padding token of a table that several layers share: its change is held at zero."""
        self.is_tied = False
        """Whether another layer uses the same weight, with these tensors."""
        # Set past nn.Module, so that it is no child: the shared tensors are registered, trained and
        # stored once, by the adapter that owns them.
        object.__setattr__(self, "source", None)
        self.register_buffer("weight_before_merge", None, persistent=False)

    @classmethod
    @abstractmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether this kind of adapter is for layers of the type of `layer`."""

    @classmethod
    def fits_parameter(cls, layer: nn.Module, parameter: str) -> bool:
        """Whether this kind of adapter is for this parameter of `layer`."""
        return cls.fits(layer)

    @staticmethod
    def reason_not_adaptable(layer: nn.Module) -> str | None:
        """Why this layer cannot be adapted although its type can; None where it can."""
        if getattr(layer, "max_norm", None) is not None:
            return "its max_norm rewrites the base's weight in every forward pass; set it to None"
        return quantized.reason_not_adaptable(layer)

    @property
    def r(self) -> int:
        """The rank."""
        return self.recipe.r

    @property
    def starts_at_zero(self) -> str:
        """The tensor that starts at zero ("A" or "B", or a form's), where one does."""
        if self.form is not None:
            return self.form.zero_tensor
        return INITS[self.recipe.init].zero_factor or self.zero_factor

    @property
    def form(self) -> Form | None:
        """What the adapter is made of, where that is not A and B alone."""
        return FORMS[self.recipe.form]

    def form_shapes(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of the tensors of this adapter's form."""
        assert self.form is not None
        out, rest = self.weight_to_matrix(torch.empty(self.shape, device="meta")).shape
        return self.form.shapes(out, rest, math.prod(self.shape[2:]), self.r)

    def form_tensors(self) -> dict[str, Tensor]:
        """The tensors of this adapter's form by name, with their gradients."""
        parameters = self._parameters.items()
        return {name: p for name, p in parameters if p is not None and name != "magnitude"}

    def weight_of(self, layer: nn.Module) -> Tensor:
        """The weight in `layer` that this adapter is for, without ΔW (unless it is merged).

        Of a quantized weight it is a dense copy, made anew each time.
        """
        weight = dense_weight(layer, self.parameter)
        assert weight is not None
        return self.block_of(weight, self.rows)

    @classmethod
    def block_of(cls, weight: Tensor, rows: Rows) -> Tensor:
        """These rows of the matrix of a weight, in the weight's own layout: a view of it."""
        if rows is None:
            return weight
        return weight[:, slice(*rows)] if cls.is_transposed else weight[slice(*rows)]

    @staticmethod
    def weight_to_matrix(weight: Tensor) -> Float[Tensor, "out rest"]:
        """The weight as the matrix to which B A is added."""
        return weight.flatten(1)

    @staticmethod
    def matrix_to_weight(matrix: Float[Tensor, "*runs out rest"], shape: Sequence[int]) -> Tensor:
        """The inverse of `weight_to_matrix`: (*runs, out, rest) in the weight's shape."""
        return matrix.view(*matrix.shape[:-2], *shape)

    def draw(
        self,
        layer: nn.Module,
        generator: torch.Generator,
        data: InputMoments | Tensor | None = None,
    ) -> "Adapter":
        """Sets the factors to what the recipe's init draws for the weight of `layer`.

        `data` is what the init reads: see `Init`; a gradient is in the weight's shape.
        """
        weight = self.weight_of(layer).detach()
        if weight.is_meta:
            raise AdapterError("the model is on the meta device: attach once it has its weights")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        W = self.weight_to_matrix(weight).to(dtype)
        if isinstance(data, Tensor):
            data = self.weight_to_matrix(data).to(W)
        self.fill(self.draw_tensors(W, layer, generator, data))
        if self.recipe.dora:
            self.magnitude = nn.Parameter(self.row_norms(weight))
        return self

    def draw_tensors(
        self,
        W: Float[Tensor, "out rest"],
        layer: nn.Module,
        generator: torch.Generator,
        data: InputMoments | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The first values for the matrix W: A, B and what goes with them, or a form's tensors."""
        recipe = self.recipe
        if self.form is not None:
            drawn = self.form.draw(self.form_shapes(), generator)
            return {name: tensor.to(W) for name, tensor in drawn.items()}
        init = INITS[recipe.init]
        # Most inits draw A and leave B at zero. Where A is the kind's zero factor, such an init
        # gets the transposed matrix and the factors it gives are transposed and change places. An
        # embedding of 1000 tokens and 64 features, r = 4: W (64, 1000); the init is given (1000,
        # 64) and gives A (4, 64) and B (1000, 4), zero; so A = B.T (4, 1000) and B = A.T (64, 4).
        is_swapped = self.zero_factor == "A" and init.zero_factor is None
        read = () if data is None else (data,)
        A, B = init.draw(W.T if is_swapped else W, recipe.r, self.scale, generator, *read)
        A, B = (B.T.to(W), A.T.to(W)) if is_swapped else (A.to(W), B.to(W))
        if (padding := getattr(layer, "padding_idx", None)) is not None:
            A[:, padding] = 0  # no gradient reaches it, so the padding token never changes
        tensors = {"A": A, "B": B}
        if recipe.trains == "core":
            tensors["core"] = W.new_zeros(recipe.r, recipe.r)
        elif init.starts_nonzero:
            tensors |= {"A0": tensors["A"].clone(), "B0": tensors["B"].clone()}
        return tensors

    def fill(self, tensors: dict[str, Tensor]) -> "Adapter":
        """Sets the adapter's tensors by their names in TENSOR_NAMES; those not given are None."""
        for name in TENSOR_NAMES:
            if (tensor := tensors.get(name)) is None:
                setattr(self, name, None)
            elif name in ("A0", "B0"):
                setattr(self, name, nn.Buffer(tensor))
            else:
                setattr(self, name, nn.Parameter(tensor.contiguous()))
        self.set_trainable(True)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any):
        """As nn.Module's. A tensor that grows in training takes the size that is loaded."""
        for name in self.form.grows if self.form else ():
            if (stored := state_dict.get(prefix + name)) is not None:
                parameter = self.get_parameter(name)
                parameter.data = parameter.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_trainable(self, trainable: bool) -> None:
        """Turns gradients on or off for the tensors that the recipe trains; others take none."""
        trains = {"both": ("A", "B"), "zero": (self.starts_at_zero,), "core": ("core",)}
        trained = (*trains[self.recipe.trains], "magnitude")
        if self.form is not None:
            trained = {*TENSOR_NAMES} - {*self.form.frozen}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable and name in trained)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this adapter holds, by name."""
        return {name: t.detach() for name in TENSOR_NAMES if (t := getattr(self, name)) is not None}

    def factors(self) -> tuple[Float[Tensor, "*runs rank rest"], Float[Tensor, "*runs out rank"]]:
        """A and B with ΔW = scale · B A, before DoRA's magnitude.

        Their rank is r, or 2r where ΔW is measured from the first values of the factors; of another
        form it may be more. Where gradients are off, those that FSDP has split over processes are
        gathered. In training a gathered copy would give each process its own gradient.
        """
        if self.form is not None:
            tensors = self.form_tensors()
            if not torch.is_grad_enabled():
                tensors = {name: full_tensor(tensor) for name, tensor in tensors.items()}
            return self.form.factors(tensors)
        # A tied weight can be used in two orientations: as the table of an embedding (matrix
        # features × tokens) and as the weight of the output layer (matrix tokens × features).
        # (B A)ᵀ = Aᵀ Bᵀ, so the factors of the one are those of the other, transposed and swapped.
        source = self.source or self
        is_transposed = source.zero_factor != self.zero_factor
        A, B, core = source.A, source.B, self.core
        if not torch.is_grad_enabled():
            A, B, core = full_tensor(A), full_tensor(B), None if core is None else full_tensor(core)
        A, B = (B.T, A.T) if is_transposed else (A, B)
        if self.masked_token is not None:
            token = torch.tensor(self.masked_token, device=A.device)
            if self.zero_factor == "A":
                A = A.index_fill(1, token, 0)
            else:
                B = B.index_fill(0, token, 0)
        if core is not None:
            return A, B @ core
        if self.A0 is not None and self.B0 is not None:
            # B A − B₀ A₀ as one product: [B, −B₀] (out, 2r) times [A; A₀] (2r, rest)
            return torch.cat([A, self.A0], -2), torch.cat([B, -self.B0], -1)
        return A, B

    def row_norms(self, weight: Tensor) -> Float[Tensor, "*runs out"]:
        """The norm of each row of the matrix W + scale · B A, without forming it.

        Digits are lost where a row of the sum is thousands of times smaller than W's.
        """
        with torch.no_grad():
            A, B = self.factors()
            W, B = self.weight_to_matrix(weight).to(A.dtype), self.scale * B
            # Of a row w of W and b of scale · B: ‖w + b A‖² = ‖w‖² + (2 w Aᵀ + b A Aᵀ)·b
            square = torch.linalg.vector_norm(W, dim=1) ** 2  # (out,)
            square = square + ((2 * (W @ A.mT) + B @ (A @ A.mT)) * B).sum(-1)
            return square.clamp_(min=0).sqrt_()

    def row_gain(self, weight: Tensor) -> Float[Tensor, "*runs out"]:
        """DoRA's factor for each row of W + ΔW: magnitude / norm.

        The norm takes no gradient (section 4.3).
        """
        assert self.magnitude is not None
        norms = self.row_norms(weight)
        # A row of zeros has no direction to be scaled.
        return torch.where(norms > 0, self.magnitude / norms, 1.0)

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW in the weight's shape, (*runs, *weight). Only DoRA reads `weight`, the base's."""
        return self.delta_of(*self.factors(), weight)

    def delta_of(self, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        """ΔW of these factors, with this adapter's scale and magnitude."""
        matrix = self.scale * B @ A  # (*runs, out, rest)
        if self.magnitude is not None:
            W = self.weight_to_matrix(weight).to(matrix.dtype)
            matrix = self.row_gain(weight)[..., None] * (W + matrix) - W
        return self.matrix_to_weight(matrix, self.shape)

    def drop_columns(self, A: Tensor) -> Tensor:
        """A with columns dropped in training, by the recipe's dropout: the same for all rows."""
        ones = A.new_ones(*A.shape[:-2], 1, A.shape[-1])  # (*runs, 1, rest)
        return A * self.apply_dropout(ones) if self.recipe.dropout else A

    def apply_dropout(self, x: Tensor) -> Tensor:
        """`x` with entries dropped in training, by the recipe's dropout."""
        p = self.recipe.dropout
        return F.dropout(x, p) if p and self.training else x

    def extra_repr(self) -> str:
        """The settings that print(model) shows."""
        recipe = self.recipe
        form = "" if self.form is None else f", form={recipe.form}"
        return f"r={recipe.r}, alpha={recipe.alpha}, scale={self.scale:g}, init={recipe.init}{form}"
