"""W + ΔW as a tensor that computes with the factors of ΔW, and is formed only where it must be."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lora_lab.adapters.recipe import AdapterError
from lora_lab.adapters.watch import ResultOfReading

_GROUPED_MM: Any = getattr(torch, "_grouped_mm", None)
"""The product of groups of rows with a matrix each, from torch 2.8."""


# A mixture of 64 experts holds their weights as one parameter, (64, out 128, in 32), and its code
# is someone else's: it takes one expert's weight after the other, `F.linear(x, stack[expert])`, or
# one for each token, `torch.bmm(stack[experts], x)`, or gives all to a kernel for groups of tokens.
# With r = 2 the stack that it reads is the sum of W (64, 128, 32) and the product of
# left (64, 128, 2) and right (64, 2, 32), of which
#   stack[5]                    is the sum of W[5] (128, 32), and left[5] (128, 2), right[5] (2, 32)
#   F.linear(x, stack[5])       is x W[5]ᵀ + scale · (x right[5]ᵀ) left[5]ᵀ
#   stack.transpose(1, 2)       is the sum of Wᵀ, with rightᵀ and leftᵀ as left and right
#   all else, as stack.norm()   is computed with the sum, which is formed (64, 128, 32)
# The tensor has W's shape, dtype and device and no memory: what would read its memory past
# __torch_function__ finds none, and so cannot take W for the sum.
class LowRankSum(Tensor):
    """W + scale · left right: (…, a, b) of W (…, a, b), left (…, a, r) and right (…, r, b).

    The factors may be of a wider dtype than W. Products are computed in W's; where the sum is
    formed, it is rounded to that once.
    """

    W: Tensor
    left: Tensor
    right: Tensor
    scale: float

    @staticmethod
    def __new__(cls, W: Tensor, left: Tensor, right: Tensor, scale: float) -> "LowRankSum":
        """The sum of these, as a tensor."""
        trains = left.requires_grad or right.requires_grad
        shaped: Any = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls,
            W.shape,
            W.stride(),
            dtype=W.dtype,
            device=W.device,
            requires_grad=trains and torch.is_grad_enabled(),
        )
        shaped.W, shaped.left, shaped.right, shaped.scale = W, left, right, scale
        return shaped

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        options = {key: value for key, value in (kwargs or {}).items() if value is not None}
        rule = None if options.keys() - _KEYWORDS else _RULES.get(func)
        if rule and (result := rule(*args, **options)) is not None:
            return result
        args, kwargs = tree_map_only(cls, cls.formed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyright: ignore
        raise AdapterError(
            f"{func} reads an adapted stack of experts past torch's functions, and would miss the "
            "adapter: set another implementation of the experts, or merge the adapter"
        )

    def formed(self) -> Tensor:
        """The sum in memory of its own, in which a change would be lost, and is an error."""
        result = _formed(self.W, self.left, self.right, self.scale)
        in_vmap = torch._C._are_functorch_transforms_active()
        return result if in_vmap else result.as_subclass(ResultOfReading)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`left` and `right` in the dtype of W."""
        return self.left.to(self.W.dtype), self.right.to(self.W.dtype)


def low_rank_sum(W: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """W + scale · left right as a LowRankSum; where torch.compile traces it, as a plain tensor."""
    if torch.compiler.is_compiling():
        return _formed(W, left, right, scale)
    return LowRankSum(W, left, right, scale)


def _formed(W: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """W + scale · left right in W's dtype."""
    delta = scale * left @ right
    return (W.to(delta.dtype) + delta).to(W.dtype)


# Each rule gives None where it is not for these arguments: the sum is then formed.
def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """F.linear with a sum as its weight (out, in)."""
    if isinstance(x, LowRankSum) or not isinstance(weight, LowRankSum):
        return None
    left, right = weight.factors()
    return F.linear(x, weight.W, bias) + F.linear(weight.scale * F.linear(x, right), left)


def _matmul(one: Any, other: Any) -> Tensor | None:
    """A product of matrices, or of batches of them, one of which is a sum."""
    sums = [isinstance(matrix, LowRankSum) for matrix in (one, other)]
    if all(sums) or min(one.ndim, other.ndim) < 2:
        return None
    if isinstance(other, LowRankSum):
        left, right = other.factors()
        return one @ other.W + (other.scale * (one @ left)) @ right
    left, right = one.factors()
    return one.W @ other + left @ (one.scale * (right @ other))


def _grouped_mm(x: Any, weight: Any, offs: Any = None, bias: Any = None) -> Tensor | None:
    """Rows of x (rows, a), those of each group times the group's matrix of a sum (groups, a, b)."""
    if isinstance(x, LowRankSum) or not isinstance(weight, LowRankSum) or bias is not None:
        return None
    left, right = weight.factors()
    # The kernel wants rows of a multiple of 16 bytes: of r = 2 in bfloat16 it takes 8, with zeros.
    missing = -left.shape[-1] % (16 // left.element_size())
    left, right = F.pad(left, (0, missing)), F.pad(right.mT, (0, missing)).mT
    hidden = weight.scale * _GROUPED_MM(x, left, offs=offs)
    return _GROUPED_MM(x, weight.W, offs=offs) + _GROUPED_MM(hidden, right, offs=offs)


def _getitem(stack: Any, index: Any) -> LowRankSum | None:
    """Some matrices of a stack (E, a, b), by an index for its first dimension."""
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    if stack.ndim != 3 or is_mask or not isinstance(index, int | slice | Tensor):
        return None
    return LowRankSum(stack.W[index], stack.left[index], stack.right[index], stack.scale)


def _transpose(matrices: Any, one: Any = -1, other: Any = -2) -> LowRankSum | None:
    """The matrices (…, a, b) transposed."""
    if not all(isinstance(dim, int) for dim in (one, other)):
        return None
    if {one % matrices.ndim, other % matrices.ndim} != {matrices.ndim - 2, matrices.ndim - 1}:
        return None
    left, right = matrices.right.mT, matrices.left.mT
    return LowRankSum(matrices.W.mT, left, right, matrices.scale)


def _T(matrix: Any) -> LowRankSum | None:  # noqa: N802
    return _transpose(matrix) if matrix.ndim == 2 else None


_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "requires_grad")
_LOOKS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.get_device),
}
"""What can be asked of a sum without forming it."""

_KEYWORDS = {"bias", "offs"}
"""The keywords that the rules know: with others the sum is formed."""

_RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm), _matmul),
    **dict.fromkeys((Tensor.bmm, Tensor.__matmul__), _matmul),
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((torch.transpose, Tensor.transpose, Tensor.mT.__get__), _transpose),  # pyright: ignore
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), _T),  # pyright: ignore
}
"""What is computed with the factors, by torch's function."""

if _GROUPED_MM:
    _RULES[_GROUPED_MM] = _grouped_mm
