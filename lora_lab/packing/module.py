"""The LightningModule of many LoRA runs over one base, each as if it had been alone."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter
from lora_lab.adapters.pack import Pack
from lora_lab.adapters.stacks import unstack
from lora_lab.data import Data
from lora_lab.packing.optimizer import PackedOptimizer
from lora_lab.packing.recorded_step import RELATIVE_TOLERANCE, RecordedStep
from lora_lab.tracking.tracking import Tracking
from lora_lab.training.cuts import PackValidationModule
from lora_lab.training.modules import LOSS_READ_INTERVAL, Batch, DivergedError, LoRAModule

log = logging.getLogger(__name__)

MAX_SAVED_BYTES_ON_CPU = 2**28
"""Bytes that the runs of one pass keep for backward on a CPU: with more, its caches thrash."""

BUSY_BYTES_ON_CPU = 2**24
"""Bytes from which one run keeps a CPU busy: what is computed for several is no quicker."""


class UnpackableError(RuntimeError):
    """A model that vmap refuses, or whose runs in a pack are not what they are alone."""


@dataclass(eq=False)
class Member:
    """One run of a pack: what it has of its own, and what ends it alone."""

    module: LoRAModule
    tracking: Tracking
    fail: Callable[[Exception], None]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Its adapters by site."""
        return adapters.attached(self.module.model)

    @property
    def setting(self) -> str:
        """What its parameters' group of the optimizer is made of."""
        return json.dumps([self.module.optimizer.model_dump(), self.module.lr_ratio])

    def order(self) -> Any:
        """Runs that are next to each other by this can share most."""
        recipes = [a.recipe for a in self.adapters.values()]
        return [r.r for r in recipes], [r.dropout for r in recipes], self.setting


class PackedModule(PackValidationModule):
    """The runs of `members` over the one base `model`, each with its own adapters.

    Every step is taken in passes of `at_once` runs. The optimizer is torch's own, elementwise, with
    a group for each set of hyperparameters; rates and clipping are each run's own. A run whose loss
    is no number any more fails, and the others go on without it. Raises UnpackableError, from
    `check`, where the model cannot be trained so.
    """

    def __init__(self, model: nn.Module, data: Data, members: Sequence[Member]):
        super().__init__(model, data, members[0].module.optimizer)
        self.automatic_optimization = False
        self.members = sorted(members, key=Member.order)
        self.own = nn.ModuleList(member.module for member in self.members)
        self.at_once = len(members)
        self.recorded: list[RecordedStep] = []
        self.clip: tuple[float, str] | None = None

    def check(self, batch: Batch, gpu: bool) -> None:
        """Finds out whether the runs can be packed, and how many of them at once, on a batch.

        A pass keeps for backward half of a GPU's free memory at most, or on a CPU
        MAX_SAVED_BYTES_ON_CPU.
        """
        if len(self.members) == 1:
            raise UnpackableError("it is one run")
        x, y = batch
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        known = {t.untyped_storage().data_ptr() for t in (*self.parameters(), *self.buffers())}
        some = x[: max(1, min(len(x), 4))]
        try:
            with torch.random.fork_rng():
                alone = Pack(self.model, [self.members[-1].adapters]).train()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    self.losses_by_run(alone(x), y).sum()
                together = Pack(self.model, [m.adapters for m in self.members], self._settings())
                with torch.no_grad():
                    outputs = together.eval()(some)
                    wanted = torch.stack([m.module.model.eval()(some) for m in self.members])
        except (RuntimeError, ValueError, TypeError) as error:
            says = str(error).partition("\n")[0]
            raise UnpackableError(f"the model cannot be computed for many runs: {says}") from error
        finally:
            self._separate()
            self.train()
        apart = (outputs - wanted).double().norm() / wanted.double().norm().clamp(min=1e-30)
        if not apart <= RELATIVE_TOLERANCE.get(outputs.dtype, 0.1):
            raise UnpackableError(f"outputs in a pack differ from those alone by {apart:.2g}")
        each = sum(size for place, size in kept.items() if place not in known)
        if not gpu and each > BUSY_BYTES_ON_CPU:
            raise UnpackableError(
                f"a run keeps {each / 2**20:.0f} MB for backward: a CPU is quicker run by run"
            )
        most = torch.cuda.mem_get_info()[0] // 2 if gpu else MAX_SAVED_BYTES_ON_CPU
        self.at_once = max(1, min(len(self.members), most // max(each, 1)))

    def _settings(self) -> list[str]:
        return [member.setting for member in self.members]

    def _build(self) -> None:
        settings, n = self._settings(), self.at_once
        with torch.inference_mode(False):  # they are trained after a validation, too
            self.packs = [
                Pack(self.model, [m.adapters for m in self.members[i : i + n]], settings[i : i + n])
                for i in range(0, len(self.members), n)
            ]
        self.recorded = [RecordedStep(pack, self.task.loss) for pack in self.packs]
        for pack in self.packs:
            pack.train(self.training)

    def setup(self, stage: str) -> None:
        """Says to every run's own module what they are trained by."""
        for member in self.members:
            member.module.trainer = self.trainer

    def on_validation_start(self) -> None:
        """Nothing is dropped. Before the first step there are no passes yet."""
        if not self.packs:
            self._build()
        for pack in self.packs:
            pack.eval()

    def on_validation_end(self) -> None:
        """What follows is training again."""
        for pack in self.packs:
            pack.train()

    def teardown(self, stage: str) -> None:
        """The weights may move to another device now, each on its own."""
        self.packs, self.recorded = [], []
        self._separate()

    def _separate(self) -> None:
        for member in self.members:
            unstack(member.adapters)

    def configure_optimizers(self) -> Any:
        """One optimizer for all runs. Their rates are set step by step."""
        self._build()
        steps = int(self.trainer.estimated_stepping_batches)
        own = [member.module for member in self.members]
        self.packed_optimizer = PackedOptimizer(own, self._settings(), self.packs, steps)
        return self.packed_optimizer.torch

    def _rebuild(self) -> None:
        """Lays the passes out anew for the runs there are."""
        self._build()
        if self.trainer.optimizers:
            own = [member.module for member in self.members]
            self.packed_optimizer.move(own, self._settings(), self.packs, self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # pyright: ignore
        """A step of every run."""
        optimizer: Any = self.optimizers()
        losses = self._backward(batch)
        self.packed_optimizer.set_rates(self.global_step)
        if self.clip is not None:
            self._clip(*self.clip)
        optimizer.step()
        self._losses.append(losses)
        if len(self._losses) % LOSS_READ_INTERVAL == 0 or self.trainer.is_last_batch:
            self._read_losses()

    def _backward(self, batch: Batch) -> Tensor:
        """The losses (runs,), and their gradients. Out of memory: again, half as many at once."""
        while True:
            try:
                return torch.cat([step(*batch) for step in self.recorded])
            except RuntimeError as error:  # CUDA's is one, too
                if self.at_once == 1 or not out_of_memory(error):
                    raise
            self.at_once = -(-self.at_once // 2)
            log.warning("out of memory: going on with %d runs at once", self.at_once)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._rebuild()

    def _clip(self, most: float, by: str) -> None:
        """Clips every run's gradient as if it were alone: by its norm, or by value."""
        for pack in self.packs:
            if by == "value":
                nn.utils.clip_grad_value_(pack.parameters(), most)
                continue
            held = [(at, p.grad) for at, stack in pack.stacks for p in stack.adapter.parameters()]
            held = [(slice(at, at + len(g)), g) for at, g in held if g is not None]
            squares = held[0][1].new_zeros(len(pack.runs))
            for runs, gradient in held:
                squares[runs] += gradient.flatten(1).square().sum(1)
            share = (most / (squares.sqrt() + 1e-6)).clamp(max=1)
            for runs, gradient in held:
                gradient.mul_(share[runs].view(-1, *[1] * (gradient.dim() - 1)))

    def _read_losses(self) -> Tensor:
        """(steps, runs); a run whose losses are no numbers any more fails."""
        before = sum(map(len, self._read))
        if self._losses:
            self._read.append(torch.stack(self._losses).cpu())
            self._losses.clear()
            new = self._read[-1]
            for i in (~new.isfinite().all(0)).nonzero().flatten().tolist()[::-1]:
                try:
                    self.members[i].module.check_losses(new[:, i], before)
                except DivergedError as error:
                    self.fail(self.members[i], error)
            self.train_loss = self._read[-1][-1].median().item()
        return torch.cat(self._read)

    def fail(self, member: Member, error: Exception) -> None:
        """Takes a run out. Raises its error where it was the last."""
        i = self.members.index(member)
        member.fail(error)
        del self.members[i]
        if not self.members:
            raise error
        left = [j for j in range(len(self.members) + 1) if j != i]
        self._losses = [row[left] for row in self._losses]
        self._read = [rows[:, left] for rows in self._read]
        self._rebuild()

    def on_train_epoch_end(self) -> None:
        """Logs every run's mean training loss of the epoch."""
        means = self._read_losses().double().mean(0).tolist()
        for member, mean in zip(self.members, means, strict=True):
            self._log(member, {"train/loss": mean})

    def update_metrics(self, place: int, outputs: Tensor, y: Tensor) -> None:
        """Every run's metrics."""
        for member, output in zip(self.members[place:], outputs, strict=False):
            for metric in member.module.metrics.values():
                metric.update(output, y)  # pyright: ignore

    def on_validation_epoch_end(self) -> None:
        """Logs them."""
        means = self.mean_losses()
        for member, mean in zip(list(self.members), means, strict=True):
            found = member.module.metrics.items()
            measured = {f"val/{name}": metric.compute().item() for name, metric in found}  # pyright: ignore
            for _, metric in found:
                metric.reset()  # pyright: ignore
            try:
                member.module.check_val_loss(mean)
                self._log(member, {"val/loss": mean.item(), **measured})
            except DivergedError as error:
                self.fail(member, error)
        self.log("val/loss of the runs, median", means.nanmedian())

    def _log(self, member: Member, row: dict[str, float]) -> None:
        date = self.step_and_epoch()
        member.tracking.log({**row, "epoch": date["epoch"]}, int(date["step"]))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a device, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
