"""Many LoRA runs over one base, trained in one pass: each is as if it had been alone."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Adapter, Recipe, Site
from lora_lab.adapters.count import groups_of
from lora_lab.adapters.packed import Pack
from lora_lab.callbacks.checkpoint import Checkpoint
from lora_lab.callbacks.spectra import SpectraCallback
from lora_lab.config import Optimizer
from lora_lab.data import Data
from lora_lab.modules import READ_EVERY, BaseModule, Batch, DivergedError, LoRAModule, rate_at
from lora_lab.spectra import SVD
from lora_lab.tracking import Tracking

log = logging.getLogger(__name__)

CACHED = 2**28
"""Bytes that the runs of one pass keep for backward on a CPU: with more, its caches thrash."""

FULL = 2**24
"""Bytes from which one run keeps a CPU busy: what is computed for several is no quicker."""

CUTS = 64
"""Cuts of ΔW that are measured in one pass, at most."""

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""How far a run's outputs in a pack may be from those alone, relative; other dtypes: 0.1."""


class UnpackableError(RuntimeError):
    """A model that vmap refuses, or whose runs in a pack are not what they are alone."""


@dataclass(eq=False)
class Member:
    """One run of a pack: what it has of its own, and what ends it alone."""

    module: LoRAModule
    tracking: Tracking
    spectral: SpectraCallback
    checkpoint: Checkpoint
    fail: Callable[[Exception], None]
    kept: Path | None = None
    """The checkpoint that it goes on from."""

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


class Evaluated(BaseModule):
    """Many runs' validation losses in one pass over the data; `packs` are all of them."""

    def __init__(self, model: nn.Module, data: Data, optimizer: Optimizer):
        super().__init__(model, data.task, data.sizes["out_features"], optimizer)
        self.eval_rows = data.eval_rows
        self.packs: list[Pack] = []
        self.sums: list[Tensor] = []
        self.rows = 0

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self.sums, self.rows = [], 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds every run's loss, with no more memory than one run takes."""
        x, y = batch
        sums, place = [], 0
        for pack in self.packs:
            rows = max(1, self.eval_rows // len(pack.runs))
            total = torch.zeros(len(pack.runs), dtype=torch.float64)
            for xs, ys in zip(x.split(rows), y.split(rows), strict=True):
                outputs = pack(xs)
                losses = self.losses(outputs, ys)
                total += losses.double().cpu() * len(xs)
                self.measure(place, outputs, ys)
            sums.append(total)
            place += len(pack.runs)
        self.sums.append(torch.cat(sums))
        self.rows += len(x)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Every run's loss: one by one, which vmap would do in several passes over all outputs."""
        return torch.stack([self.task.loss(output, y) for output in outputs])

    def measure(self, place: int, outputs: Tensor, y: Tensor) -> None:
        """What else is measured of the runs from `place` on."""

    def means(self) -> Tensor:
        """The mean losses (runs,)."""
        return torch.stack(self.sums).sum(0) / self.rows

    def on_validation_epoch_end(self) -> None:
        """Logs nothing."""


class Cuts(Evaluated):
    """A model with ΔW cut to its best approximations: a run for each of `every` ranks by site.

    `found` are the SVDs of ΔW at all sites, `model` is without adapters. Raises AdapterError where
    the runs cannot be one pack.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: Optimizer,
        sites: Sequence[Site],
        found: Mapping[str, SVD],
        every: Sequence[Mapping[str, int]],
    ):
        super().__init__(model, data, optimizer)
        made = [
            {s.name: _cut(model, s, found[s.name].first(k[s.name])) for s in sites} for k in every
        ]
        self.own = nn.ModuleList(adapter for run in made for adapter in run.values())
        self.packs = [
            Pack(model, made[i : i + CUTS], [None] * CUTS) for i in range(0, len(made), CUTS)
        ]
        self.stacks = nn.ModuleList(self.packs)


def _cut(model: nn.Module, site: Site, svd: SVD) -> Adapter:
    """The adapter whose ΔW is the product of these singular triples."""
    layer, r = model.get_submodule(site.layer), max(1, len(svd.S))
    adapter = adapters.adapter_for(layer)(layer, site.parameter, site.rows, Recipe(r, r))
    dtype = torch.promote_types(adapter.weight_of(layer).dtype, torch.float32)
    A, B = svd.Vh.to(dtype), (svd.U * svd.S).to(dtype)
    if not len(svd.S):
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    if (padding := getattr(layer, "padding_idx", None)) is not None:
        A[:, padding] = 0  # but for rounding it is
    return adapter.fill({"A": A, "B": B})


class PackedModule(Evaluated):
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
        self.clip: tuple[float, str] | None = None

    def check(self, batch: Batch, memory: int) -> None:
        """Finds out whether the runs can be packed, and how many of them at once, on a batch.

        One pass keeps no more than `memory` bytes for backward.
        """
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
                alone = Pack(self.model, [self.members[-1].adapters], [None]).train()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    self._losses_of(alone, x, y).sum()
                together = Pack(self.model, [m.adapters for m in self.members], self._settings())
                with torch.no_grad():
                    outputs = together.eval()(some)
                    wanted = torch.stack([m.module.model.eval()(some) for m in self.members])
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            says = str(error).partition("\n")[0]
            raise UnpackableError(f"the model cannot be computed for many runs: {says}") from error
        finally:
            self.train()
        apart = (outputs - wanted).double().norm() / wanted.double().norm().clamp(min=1e-30)
        if not apart <= CLOSE.get(outputs.dtype, 0.1):
            raise UnpackableError(f"outputs in a pack differ from those alone by {apart:.2g}")
        each = sum(size for place, size in kept.items() if place not in known)
        if memory == CACHED and each > FULL:
            raise UnpackableError(
                f"a run keeps {each / 2**20:.0f} MB for backward: a CPU is quicker run by run"
            )
        self.at_once = max(1, min(len(self.members), memory // max(each, 1)))

    def _settings(self) -> list[str]:
        return [member.setting for member in self.members]

    def _build(self) -> None:
        settings, n = self._settings(), self.at_once
        with torch.inference_mode(False):  # they are trained after a validation, too
            self.packs = [
                Pack(self.model, [m.adapters for m in self.members[i : i + n]], settings[i : i + n])
                for i in range(0, len(self.members), n)
            ]
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
        self.packs = []

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: for each set of hyperparameters those that a run has alone."""
        found = []
        by_setting = {member.setting: member.module for member in self.members}
        for setting, module in by_setting.items():
            every = [stack for pack in self.packs for _, stack in pack.stacks]
            stacks = [stack.adapter for stack in every if stack.setting == setting]
            arguments = module.optimizer.arguments
            decay = arguments.get("weight_decay", 0.0)
            for group in groups_of(stacks, module.optimizer.lr, module.lr_ratio, decay):
                found.append({**arguments, **group, "schedule": _schedule(module, group["lr"])})
        return found

    def configure_optimizers(self) -> Any:
        """One optimizer for all runs. Their rates are set step by step."""
        self._build()
        return self.optimizer.callee(self.groups(), **self.optimizer.arguments)

    def _rebuild(self) -> None:
        """Lays the passes out anew for the runs there are, each with its optimizer's state."""
        optimizer = self.trainer.optimizers[0]
        states = [self.optimizer_state(member) for member in self.members]
        optimizer.zero_grad()
        self._build()
        optimizer.param_groups.clear()
        optimizer.state.clear()
        for group in self.groups():
            optimizer.add_param_group(group)
        self.load_optimizer_states(states)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # pyright: ignore
        """A step of every run."""
        optimizer: Any = self.optimizers()
        losses = self._backward(optimizer, batch)
        self._set_rates(optimizer.optimizer)
        if self.clip is not None:
            self._clip(*self.clip)
        optimizer.step()
        self._losses.append(losses)
        if len(self._losses) % READ_EVERY == 0 or self.trainer.is_last_batch:
            self._read_losses()

    def _backward(self, optimizer: Any, batch: Batch) -> Tensor:
        """The losses (runs,), and their gradients. Out of memory: again, half as many at once."""
        while True:
            optimizer.zero_grad()
            try:
                found = []
                for pack in self.packs:
                    losses = self._losses_of(pack, *batch)
                    with torch.autocast(losses.device.type, enabled=False):
                        self.manual_backward(losses.sum())
                    found.append(losses.detach())
                return torch.cat(found)
            except RuntimeError as error:  # CUDA's is one, too
                if self.at_once == 1 or not out_of_memory(error):
                    raise
            self.at_once = -(-self.at_once // 2)
            log.warning("out of memory: going on with %d runs at once", self.at_once)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._rebuild()

    def _losses_of(self, pack: Pack, x: Tensor, y: Tensor) -> Tensor:
        return self.losses(pack(x), y)

    def _set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """The rates of the step to come, of each run's own schedule."""
        for group in optimizer.param_groups:
            if group["schedule"]:
                base, kind, warmup = group["schedule"]
                steps = int(self.trainer.estimated_stepping_batches)
                group["lr"] = base * rate_at(kind, warmup * steps, steps, self.global_step)

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
        if self.trainer.optimizers:
            self._rebuild()
        else:
            self._build()

    def on_train_epoch_end(self) -> None:
        """Logs every run's mean training loss of the epoch."""
        means = self._read_losses().double().mean(0).tolist()
        for member, mean in zip(self.members, means, strict=True):
            self._log(member, {"train/loss": mean})

    def measure(self, place: int, outputs: Tensor, y: Tensor) -> None:
        """Every run's metrics."""
        for member, output in zip(self.members[place:], outputs, strict=False):
            for metric in member.module.metrics.values():
                metric.update(output, y)  # pyright: ignore

    def on_validation_epoch_end(self) -> None:
        """Logs them."""
        means = self.means()
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
        date = self.now()
        member.tracking.log({**row, "epoch": date["epoch"]}, int(date["step"]))

    def optimizer_state(self, member: Member) -> dict[str, Any]:
        """The state of a run's optimizer, as it would be alone."""
        optimizer = self.trainer.optimizers[0]
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        places = self._places(member)
        state, groups = {}, []
        for group in member.module.groups():
            numbers = []
            for own in group["params"]:
                stacked, i = places[id(own)]
                held = optimizer.state.get(stacked, {})
                numbers.append(len(numbers) + sum(len(g["params"]) for g in groups))
                if held:
                    state[numbers[-1]] = {
                        key: value[i].clone() if _per_run(value, stacked) else value
                        for key, value in held.items()
                    }
            about = group_of[id(places[id(group["params"][0])][0])]
            rest = {k: v for k, v in about.items() if k not in ("params", "schedule")}
            if about["schedule"]:  # alone the rate of the step to come is set already
                base, kind, warmup = about["schedule"]
                steps = int(self.trainer.estimated_stepping_batches)
                rate = base * rate_at(kind, warmup * steps, steps, self.global_step)
                rest |= {"initial_lr": base, "lr": rate}
            groups.append({**rest, "params": numbers})
        return {"state": state, "param_groups": groups}

    def load_optimizer_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Gives every run the state that its optimizer had, alone or in a pack."""
        optimizer = self.trainer.optimizers[0]
        parts: dict[nn.Parameter, list[dict[str, Any]]] = {}
        for member, state in zip(self.members, states, strict=True):
            places = self._places(member)
            every = [own for group in member.module.groups() for own in group["params"]]
            for number, own in enumerate(every):
                if number in state["state"]:
                    parts.setdefault(places[id(own)][0], []).append(state["state"][number])
        for stacked, held in parts.items():
            optimizer.state[stacked] = {
                key: torch.stack([h[key] for h in held]).to(stacked.device)
                if isinstance(value, Tensor) and value.shape == stacked.shape[1:]
                else value
                for key, value in held[0].items()
            }

    def _places(self, member: Member) -> dict[int, tuple[nn.Parameter, int]]:
        """Of each of a run's parameters the one it is part of, and its place in it."""
        found = {}
        for pack in self.packs:
            for _, stack in pack.stacks:
                for i, own in enumerate(stack.members):
                    for name, parameter in own.named_parameters():
                        found[id(parameter)] = stack.adapter.get_parameter(name), i
        return {id(p): found[id(p)] for g in member.module.groups() for p in g["params"]}

    def schedulers(self, member: Member) -> list[dict[str, Any]]:
        """The state that the run's schedule of rates would have alone."""
        if not (schedule := _schedule(member.module, 1.0)):
            return []
        _, kind, warmup = schedule
        steps, step = int(self.trainer.estimated_stepping_batches), self.global_step
        bases = [group["lr"] for group in member.module.groups()]
        share = rate_at(kind, warmup * steps, steps, step)
        return [
            {
                **{"base_lrs": bases, "last_epoch": step, "_step_count": step + 1},
                **{"_is_initial": False, "_get_lr_called_within_step": False},
                **{"_last_lr": [lr * share for lr in bases], "lr_lambdas": [None] * len(bases)},
            }
        ]


def room() -> int:
    """Bytes that a pass may keep for backward: half of a GPU's free memory, a CPU's caches."""
    return torch.cuda.mem_get_info()[0] // 2 if torch.cuda.is_available() else CACHED


def _schedule(module: LoRAModule, lr: float) -> tuple[float, str, float] | None:
    about = module.optimizer
    if about.schedule == "constant" and not about.warmup:
        return None
    return lr, about.schedule, about.warmup


def _per_run(value: Any, stacked: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == stacked.shape


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a device, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class EachRun(pl.Callback):
    """Measures every run's ΔW when its own callback would."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first step."""
        self._all("on_train_start", trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After so many steps."""
        assert isinstance(pl_module, PackedModule)
        if pl_module.members[0].spectral.schedule.every_n_steps is not None:
            self._all("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After so many epochs."""
        self._all("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last."""
        self._all("on_train_end", trainer, pl_module)

    def _all(
        self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule, *given: Any
    ) -> None:
        assert isinstance(pl_module, PackedModule)
        for member in list(pl_module.members):
            try:
                getattr(member.spectral, hook)(trainer, member.module, *given)
            except DivergedError as error:
                pl_module.fail(member, error)


class PackedCheckpoint(Checkpoint):
    """Keeps every run in its own directory, as it would be kept alone, and goes on from there."""

    def __init__(self, members: Sequence[Member]):
        first = members[0].checkpoint
        super().__init__(first.path.parent, "", first.every, members[0].tracking)
        self.what = "run"
        self.contents = [
            torch.load(member.kept, "cpu", weights_only=True) for member in members if member.kept
        ]
        self.members = members
        for member, content in zip(members, self.contents, strict=False):
            member.module.load_state_dict(content["state_dict"], strict=False)
            member.spectral.load_state_dict(content["callbacks"][member.spectral.state_key])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Weights that are loaded are the adapters' alone."""
        for member in self.members:
            member.module.strict_loading = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the loops begin where the runs are."""
        if self.contents:
            self.on_load_checkpoint(trainer, pl_module, self.contents[0])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the optimizer what it knew."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PackedModule)
        if self.contents:
            of = dict(zip(self.members, self.contents, strict=True))
            states = [of[member]["optimizer_states"][0] for member in pl_module.members]
            pl_module.load_optimizer_states(states)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing: `_write` asks each run's own."""

    def _write(self, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, PackedModule)
        for member in module.members:
            content: dict[str, Any] = {
                "epoch": trainer.current_epoch,
                "global_step": trainer.global_step,
                "pytorch-lightning_version": version("lightning"),
                "state_dict": member.module.state_dict(),
                "loops": None,
                "callbacks": {member.spectral.state_key: member.spectral.state_dict()},
                "optimizer_states": [module.optimizer_state(member)],
                "lr_schedulers": module.schedulers(member),
            }
            member.checkpoint.on_save_checkpoint(trainer, member.module, content)
            member.checkpoint.put(content)
