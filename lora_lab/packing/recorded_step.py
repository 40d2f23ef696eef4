"""A pack's losses and gradients: computed, recorded as they are, and played back from then on."""

import logging
from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lora_lab.adapters.pack import Pack, PackedAdapter

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and what they should be."""

Step = tuple[Tensor, list[Tensor | None]]
"""The losses (runs,), and the gradients of the parameters."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far what is computed in another way may be from it, relative; other dtypes: 0.1."""


class RecordedStep:
    """The step of a pack, without the optimizer's: a call sets the gradients and gives the losses.

    The first batch is recorded as operations of torch, backward's and those of vmap's rules among
    them, which later batches of its shape repeat: what Python, vmap and autograd decide on is
    decided once. A model that decides by numbers, or is changed by being called, or does not do the
    same to the second batch as to the first, is computed each time, and the log says so.
    """

    def __init__(self, pack: Pack, loss: Loss):
        self.pack, self.loss = pack, loss
        self.trained = [p for p in pack.parameters() if p.requires_grad]
        self.record: GraphModule | None = None
        self.of: tuple[torch.Size, torch.Size] | None = None
        """The shapes of the batch that was recorded."""
        self.checked = False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The losses (runs,); their gradients are the parameters' `grad`."""
        if self.of is None:
            self.of = x.shape, y.shape
            losses, found = self._first(x, y)
        elif self.record is None or self.of != (x.shape, y.shape):
            losses, found = self._computed(x, y)
        else:
            losses, found = (self._played if self.checked else self._second)(x, y)
        for parameter, gradient in zip(self.trained, found, strict=True):
            parameter.grad = gradient
        return losses

    def _first(self, x: Tensor, y: Tensor) -> Step:
        (numbers, held), computed = self._held(), self._computed(x, y)
        if (now := self._held())[0] != numbers or not all(map(is_, now[1], held)):
            log.info("not recorded: the model is changed by being called")
            return computed
        try:
            with torch.random.fork_rng():
                self.record = make_fx(lambda *batch: self._computed(*batch))(x, y)
        except Exception as error:  # of any kind: whatever a model does that cannot be recorded
            log.info("not recorded: %s", str(error).partition("\n")[0])
        return computed

    def _second(self, x: Tensor, y: Tensor) -> Step:
        with torch.random.fork_rng():
            losses, found = self._played(x, y)
        computed = self._computed(x, y)
        close = RELATIVE_TOLERANCE.get(losses.dtype, 0.1)
        pairs = zip((computed[0], *computed[1]), (losses, *found), strict=True)
        self.checked = all(
            a is b if a is None or b is None else bool((a - b).norm() <= close * a.norm())
            for a, b in pairs
        )
        if not self.checked:
            log.info("not recorded: the model does not do the same to every batch")
            self.record = None
        return computed

    def _computed(self, x: Tensor, y: Tensor) -> Step:
        outputs = self.pack(x)
        losses, by_outputs = gradients(self.loss, outputs.detach(), y)
        with torch.autocast(outputs.device.type, enabled=False):
            found = torch.autograd.grad(outputs, self.trained, by_outputs, allow_unused=True)
        return losses, [
            # Laid out as the parameter: fused optimizers take that for granted.
            g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(self.trained, found, strict=True)
        ]

    @torch.no_grad()
    def _played(self, x: Tensor, y: Tensor) -> Step:
        assert self.record is not None
        return self.record(x, y)

    def _held(self) -> tuple[list[int], list[object]]:
        """What Python keeps of the model: how much, how often tensors were written to; it."""
        every = [m for m in self.pack.base.modules() if not isinstance(m, PackedAdapter)]
        values: list[object] = [
            value for m in every for value in (*vars(m).values(), *m._buffers.values())
        ]
        written = [v._version for v in values if isinstance(v, Tensor)]
        return [len(values), *written], values


def gradients(loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (runs,), and the gradient of each by its run's outputs, (runs, …).

    Run by run, while what it reads is in the caches.
    """
    losses, found = [], torch.empty_like(outputs)
    for output, gradient in zip(outputs, found, strict=True):
        own = loss(output.requires_grad_(), y)
        with torch.autocast(output.device.type, enabled=False):
            gradient.copy_(torch.autograd.grad(own, output)[0])
        losses.append(own.detach())
    return torch.stack(losses), found
