"""One step of a pack, its losses and gradients: recorded on the first batch, replayed on others."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.adapters.model_call import Inputs
from lora_lab.adapters.pack import Pack, PackedAdapter

log = logging.getLogger(__name__)

LossSum = Callable[[Tensor, Tensor], Tensor]
"""Computes one run's summed loss, a scalar, from its outputs and the targets."""

StepResult = tuple[Tensor, list[Tensor | None]]
"""The loss sums (runs,), and their gradient to each trained parameter; None where it takes none."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far a result may be from the same result computed in another way, by dtype; others: 0.1."""

MAX_RECORDS = 8
"""The most records that are kept: to record a batch takes as long as many steps."""


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
#     3 times    log_softmax, nll_loss, and their backward; stacked: the loss sums (3,)
#     bmm, mm    the backward of the layer: gradients of A (3, 2, 64) and of B (3, 10, 2)
#
# The constants are the parameters themselves and not copies: the optimizer writes to them in place,
# so a replay reads their present values. Dropout is recorded as a draw and draws anew each time.
#
# Batches of padded text have many lengths. Each shape has another record, up to MAX_RECORDS:
# the first batch's, and those of shapes that come a second time. Other batches are computed.
#
# When a record is not trusted: in a replay the model's own Python code does not run. So
#   - a model that changes its attributes or buffers in the first batch is not recorded
#     (`_python_state`), nor is one that `make_fx` cannot follow;
#   - where Python code reads a number of a tensor, as `if mask.all():` does, the record holds for
#     batches in which that number is the same (`Record.fits`); for another number there is another
#     record. A model that reads a number which was drawn, or whose shapes depend on numbers
#     (`x[mask]`), is not recorded;
#   - the record's second batch is both computed and replayed, and nothing is recorded any more
#     where losses or gradients differ (`_compare`).
# One case is not noticed: a model with state outside of its attributes (a global counter, a list
# that it holds, Python's `random`) which first matters on the third batch or later.
class RecordedStep:
    """Computes losses and gradients of a pack for one batch; the optimizer's step is not part.

    A call sets the gradients of `pack`, or adds to them, and returns the loss sums. The first batch
    is recorded as a graph of torch operations, forward and backward. Later batches of its shape
    replay the graph. A model for which that would be wrong is computed anew for each batch, and the
    log says why.
    """

    def __init__(self, pack: Pack, loss_sum: LossSum):
        self.pack, self.loss_sum = pack, loss_sum
        self.trained = [p for p in pack.parameters() if p.requires_grad]
        self.records: dict[tuple[Any, ...], list[Record]] = {}
        """The records by `shapes` of a batch, of all shapes that occurred."""
        self.is_recordable = True

    def __call__(self, inputs: Inputs, targets: Tensor, add: bool = False) -> Tensor:
        """The loss sums (runs,) of a batch; their gradients go to the parameters' `grad`.

        `add`: to what is there already, as for a further micro-batch.
        """
        loss_sums, gradients = self._step(inputs, targets)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            if add and parameter.grad is not None:
                parameter.grad += 0 if gradient is None else gradient
            else:
                parameter.grad = gradient
        return loss_sums

    def _step(self, inputs: Inputs, targets: Tensor) -> StepResult:
        """Replays, compares, records or computes the batch."""
        is_first, shapes = not self.records, batch_shapes(inputs, targets)
        is_new = shapes not in self.records
        records = self.records.setdefault(shapes, [])
        if not self.is_recordable:
            return self._compute(inputs, targets)
        with torch.no_grad():
            record = next((r for r in records if r.fits(tensors_of(inputs, targets))), None)
        if record is not None:
            return (self._replay if record.is_trusted else self._compare)(record, inputs, targets)
        if is_first or (not is_new and sum(map(len, self.records.values())) < MAX_RECORDS):
            return self._record(records, inputs, targets)
        return self._compute(inputs, targets)

    def _record(self, records: list["Record"], inputs: Inputs, targets: Tensor) -> StepResult:
        """Computes a batch, then adds its record if computing left the model as it was."""
        numbers_before, values_before = self._python_state()
        computed = self._compute(inputs, targets)
        numbers, values = self._python_state()
        if numbers != numbers_before or not all(map(is_, values, values_before)):
            self._stop_recording("the model is changed by being called")
            return computed
        names = list(inputs) if isinstance(inputs, dict) else None
        numbers_read = NumbersRead()

        def step(*tensors: Tensor) -> Any:
            batch = dict(zip(names, tensors, strict=False)) if names else tensors[0]
            with numbers_read:
                return *self._compute(batch, tensors[-1]), numbers_read.tensors

        try:
            # Recording computes the batch once more. Its draws must not move the random stream.
            with torch.random.fork_rng():
                graph = make_fx(step)(*tensors_of(inputs, targets))
            records.append(Record(graph, _graph_of_numbers(graph), numbers_read.numbers))
        except Exception as error:  # of any kind: whatever a model does that cannot be recorded
            self._stop_recording(str(error).partition("\n")[0])
        return computed

    def _stop_recording(self, reason: str) -> None:
        log.info("not recorded: %s", reason)
        self.is_recordable = False
        for records in self.records.values():
            records.clear()

    def _compare(self, record: "Record", inputs: Inputs, targets: Tensor) -> StepResult:
        """Computes and replays a record's second batch; it is kept if both give the same."""
        with torch.random.fork_rng():  # so that both draw the same dropout masks
            loss_sums, gradients = self._replay(record, inputs, targets)
        computed = self._compute(inputs, targets)
        tolerance = RELATIVE_TOLERANCE.get(loss_sums.dtype, 0.1)
        pairs = zip((computed[0], *computed[1]), (loss_sums, *gradients), strict=True)
        record.is_trusted = all(
            a is b if a is None or b is None else bool((a - b).norm() <= tolerance * a.norm())
            for a, b in pairs
        )
        if not record.is_trusted:
            self._stop_recording("the model does not do the same to every batch")
        return computed

    def _compute(self, inputs: Inputs, targets: Tensor) -> StepResult:
        """The step by vmap and autograd. Backward goes from the losses to the outputs, then on."""
        outputs = self.pack(inputs)  # (runs, batch, …)
        loss_sums, upstream = losses_and_output_gradients(self.loss_sum, outputs.detach(), targets)
        with torch.autocast(outputs.device.type, enabled=False):
            gradients = torch.autograd.grad(outputs, self.trained, upstream, allow_unused=True)
        return loss_sums, [
            # In the memory layout of the parameter: fused optimizers take that for granted.
            g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(self.trained, gradients, strict=True)
        ]

    @torch.no_grad()
    def _replay(self, record: "Record", inputs: Inputs, targets: Tensor) -> StepResult:
        loss_sums, gradients, _ = record.graph(*tensors_of(inputs, targets))
        return loss_sums, gradients

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


@dataclass
class Record:
    """The recorded operations of a step, for batches of one shape in which `numbers` are the same.

    Attributes:
        graph: from the tensors of a batch, loss sums and gradients, and the numbers.
        graph_of_numbers: from these tensors, the numbers alone; None where the model reads none.
        numbers: those that the model's Python code read in the recorded batch, in their order.
    """

    graph: GraphModule
    graph_of_numbers: GraphModule | None
    numbers: list[Any]
    is_trusted: bool = False
    """Whether a replay has given the same as computing the same batch."""

    def fits(self, tensors: list[Tensor]) -> bool:
        """Whether the model's Python code would read the same numbers in this batch."""
        if self.graph_of_numbers is None:
            return True
        return [number.item() for number in self.graph_of_numbers(*tensors)] == self.numbers


# make_fx refuses `if mask.all():`, which reads a number of a tensor that it follows: the operations
# it writes down are those of one branch. Within this mode, which sees each operation before make_fx
# does, the number is given, and the tensor that it was read from becomes a result of the graph.
class NumbersRead(TorchDispatchMode):
    """Notes the `numbers` that Python code reads while a step is recorded, and their `tensors`."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []
        self.numbers: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            with disable_proxy_modes_tracing():
                number = func(*args)
            self.tensors.append(args[0])
            self.numbers.append(number)
            return number
        indexes = args[1] if func is torch.ops.aten.index.Tensor else ()
        is_masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indexes)
        tags = () if func is torch.ops.aten.index.Tensor else func.tags
        if is_masked or torch.Tag.dynamic_output_shape in tags:
            raise ValueError(f"the shape of a result of {func} depends on numbers")
        return func(*args, **(kwargs or {}))


def _graph_of_numbers(graph: GraphModule) -> GraphModule | None:
    """The part of a recorded step that computes the numbers which the model's Python code reads."""
    *_, last = graph.graph.nodes
    tensors: Any = last.args[0][2]
    if not tensors:
        return None
    needed = set(tensors)
    for node in reversed(graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    part, copies = Graph(), {}
    for node in graph.graph.nodes:
        if node in needed or node.op == "placeholder":
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise ValueError("the model branches on a number that it draws")
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in tensors])
    return GraphModule(graph, part)


def tensors_of(inputs: Inputs, targets: Tensor) -> list[Tensor]:
    """All tensors of a batch."""
    return [*(inputs.values() if isinstance(inputs, dict) else [inputs]), targets]


def batch_shapes(inputs: Inputs, targets: Tensor) -> tuple[Any, ...]:
    """What two batches must have in common to share a record: names and shapes."""
    names = tuple(inputs) if isinstance(inputs, dict) else ()
    return *names, *(tensor.shape for tensor in tensors_of(inputs, targets))


def losses_and_output_gradients(loss: LossSum, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The runs' loss sums (runs,), and the gradient of each to its run's outputs.

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
