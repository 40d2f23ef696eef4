"""One step of a pack, its losses and gradients: recorded on the first batch, replayed on others."""

import logging
from collections.abc import Callable, Sequence
from operator import is_

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lora_lab.adapters.model_call import Inputs
from lora_lab.adapters.pack import Pack, PackedAdapter

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes one run's mean loss, a scalar, from its outputs and the targets."""

StepResult = tuple[Tensor, list[Tensor | None]]
"""The losses (runs,), and the gradient of each trained parameter; None where it takes none."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far a result may be from the same result computed in another way, by dtype; others: 0.1."""


# Why a step is recorded: the runs of a pack are small, so much of a step's time is not arithmetic.
# vmap chooses a batching rule for each operation, autograd builds a graph and walks it back, and
# Python runs the model's forward. The choices are the same for each batch of one shape, so they are
# made once.
#
# What is recorded: `make_fx` computes the step on the first batch and writes down, one after the
# other, the operations of torch that are left when vmap and autograd have done their part. For 3
# runs of r = 2 on one Linear(64, 10), a batch of 8 rows and cross-entropy these are, in short:
#
#     inputs     x (8, 64), y (8,)                  the batch: the graph's only arguments
#     constants  W (10, 64), A (3, 2, 64), B (3, 10, 2)
#     addmm      x Wᵀ + bias            (8, 10)     the base's output, once for all runs
#     mm         x A'ᵀ, A' = A.view(6, 64)  (8, 6)  → (3, 8, 2)
#     baddbmm    + (x Aᵀ)(scale · B)ᵀ   (3, 8, 10)  the outputs
#     3 times    log_softmax, nll_loss, and their backward; stacked: the losses (3,)
#     bmm, mm    the backward of the layer: gradients of A (3, 2, 64) and of B (3, 10, 2)
#
# The constants are the parameters themselves and not copies: the optimizer writes to them in place,
# so a replay reads their present values. Dropout is recorded as a draw and draws anew each time.
#
# When the record is not trusted: in a replay the model's own Python code does not run. So
#   - a model that changes its attributes or buffers in the first batch is not recorded
#     (`_python_state`), nor is one that `make_fx` cannot follow, as where it branches on a number;
#   - the second batch is both computed and replayed, and the record is dropped where losses or
#     gradients differ (`_compare`);
#   - a batch of another shape, as the last of an epoch, is computed.
# One case is not noticed: a model with state outside of its attributes (a global counter, a list
# that it holds, Python's `random`) which first matters on the third batch or later.
class RecordedStep:
    """Computes losses and gradients of a pack for one batch; the optimizer's step is not part.

    A call sets the gradients of `pack` and returns the losses. The first batch is recorded as a
    graph of torch operations, forward and backward. Later batches of its shape replay the graph.
    A model for which that would be wrong is computed anew for each batch, and the log says why.
    """

    def __init__(self, pack: Pack, loss: Loss):
        self.pack, self.loss = pack, loss
        self.trained = [p for p in pack.parameters() if p.requires_grad]
        self.graph: GraphModule | None = None
        """The recorded operations; None before the first batch, and where there is no record."""
        self.recorded_shapes: list[torch.Size] | None = None
        """Shapes of inputs and targets of the first batch; None before it."""
        self.is_trusted = False
        """Whether a replay has given the same as computing the same batch."""

    def __call__(self, x: Inputs, y: Tensor) -> Tensor:
        """The losses (runs,) of a batch; its gradients are written to the parameters' `grad`."""
        shapes = [t.shape for t in (*(x.values() if isinstance(x, dict) else [x]), y)]
        if self.recorded_shapes is None:
            self.recorded_shapes = shapes
            losses, gradients = self._record(x, y)
        elif self.graph is None or self.recorded_shapes != shapes:
            losses, gradients = self._compute(x, y)
        else:
            losses, gradients = (self._replay if self.is_trusted else self._compare)(x, y)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        return losses

    def _record(self, x: Inputs, y: Tensor) -> StepResult:
        """Computes the first batch, then records it if computing left the model as it was."""
        numbers_before, values_before = self._python_state()
        computed = self._compute(x, y)
        numbers, values = self._python_state()
        if numbers != numbers_before or not all(map(is_, values, values_before)):
            log.info("not recorded: the model is changed by being called")
            return computed
        try:
            # Recording computes the batch once more. Its draws must not move the random stream.
            with torch.random.fork_rng():
                # A lambda, since make_fx would take a bound method's `self` for an argument.
                self.graph = make_fx(lambda *batch: self._compute(*batch))(x, y)
        except Exception as error:  # of any kind: whatever a model does that cannot be recorded
            log.info("not recorded: %s", str(error).partition("\n")[0])
        return computed

    def _compare(self, x: Inputs, y: Tensor) -> StepResult:
        """Computes and replays the second batch; the graph is kept if both give the same."""
        with torch.random.fork_rng():  # so that both draw the same dropout masks
            losses, gradients = self._replay(x, y)
        computed = self._compute(x, y)
        tolerance = RELATIVE_TOLERANCE.get(losses.dtype, 0.1)
        pairs = zip((computed[0], *computed[1]), (losses, *gradients), strict=True)
        self.is_trusted = all(
            a is b if a is None or b is None else bool((a - b).norm() <= tolerance * a.norm())
            for a, b in pairs
        )
        if not self.is_trusted:
            log.info("not recorded: the model does not do the same to every batch")
            self.graph = None
        return computed

    def _compute(self, x: Inputs, y: Tensor) -> StepResult:
        """The step by vmap and autograd. Backward goes from the losses to the outputs, then on."""
        outputs = self.pack(x)  # (runs, batch, …)
        losses, upstream = losses_and_output_gradients(self.loss, outputs.detach(), y)
        with torch.autocast(outputs.device.type, enabled=False):
            gradients = torch.autograd.grad(outputs, self.trained, upstream, allow_unused=True)
        return losses, [
            # In the memory layout of the parameter: fused optimizers take that for granted.
            g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(self.trained, gradients, strict=True)
        ]

    @torch.no_grad()
    def _replay(self, x: Inputs, y: Tensor) -> StepResult:
        assert self.graph is not None
        return self.graph(x, y)

    def _python_state(self) -> tuple[list[int], Sequence[object]]:
        """What a call of the model could change, to compare before and after.

        The values are all attributes and buffers of the base's modules, to be compared by identity.
        The numbers are how many these are, and each tensor's version: torch counts writes in place.
        """
        # The modules that stand for adapters are left out: the pack writes to them in each pass.
        modules = [m for m in self.pack.base.modules() if not isinstance(m, PackedAdapter)]
        values = [value for m in modules for value in (*vars(m).values(), *m._buffers.values())]
        versions = [v._version for v in values if isinstance(v, Tensor)]
        return [len(values), *versions], values


def losses_and_output_gradients(loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The runs' losses (runs,), and the gradient of each loss to its run's outputs.

    `outputs` and the gradients are (runs, batch, …); all runs share the targets `y`. The runs are
    taken one after the other: the outputs of one are then still in a CPU's caches for its backward.
    """
    losses, output_gradients = [], torch.empty_like(outputs)
    for output, gradient in zip(outputs, output_gradients, strict=True):
        run_loss = loss(output.requires_grad_(), y)
        with torch.autocast(output.device.type, enabled=False):
            gradient.copy_(torch.autograd.grad(run_loss, output)[0])
        losses.append(run_loss.detach())
    return torch.stack(losses), output_gradients
