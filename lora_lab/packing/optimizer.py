"""The optimizer of many runs: torch's own, and each run's state as it would be alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.optimizer_groups import groups_of
from lora_lab.adapters.pack import Pack
from lora_lab.adapters.stacks import Stack
from lora_lab.training.modules import LoRAModule, lr_factor


class PackedOptimizer:
    """One optimizer over the stacks of `packs`, elementwise: each number moves as it would alone.

    It has groups for each of `settings`, one a run, as that run's `modules` has alone. A run is
    known by its module. `steps` is how many the schedules span.
    """

    def __init__(
        self, modules: Sequence[LoRAModule], settings: Sequence[str], packs: list[Pack], steps: int
    ):
        self.steps = steps
        self._lay(modules, packs)
        about = modules[0].optimizer
        self.torch: torch.optim.Optimizer = about.callee(
            self._groups(modules, settings, packs), **about.arguments
        )

    def _lay(self, modules: Sequence[LoRAModule], packs: list[Pack]) -> None:
        """Of each of the runs' parameters the one it is part of, and its place in it."""
        found: dict[int, tuple[nn.Parameter, int]] = {}
        for pack in packs:
            for _, stack in pack.stacks:
                for i, own in enumerate(stack.run_adapters):
                    for name, parameter in own.named_parameters():
                        found[id(parameter)] = stack.adapter.get_parameter(name), i
        self.places = found

    def _groups(
        self, modules: Sequence[LoRAModule], settings: Sequence[str], packs: list[Pack]
    ) -> list[dict[str, Any]]:
        every, found = [stack for pack in packs for _, stack in pack.stacks], []
        for setting, module in dict(zip(settings, modules, strict=True)).items():
            stacks = [stack.adapter for stack in every if stack.setting == setting]
            about = module.optimizer
            decay = about.arguments.get("weight_decay", 0.0)
            for group in groups_of(stacks, about.lr, module.lr_ratio, decay):
                constant = about.schedule == "constant" and not about.warmup
                scheduled = None if constant else (group["lr"], about.schedule, about.warmup)
                found.append({**about.arguments, **group, "schedule": scheduled})
        return found

    def move(
        self, modules: Sequence[LoRAModule], settings: Sequence[str], packs: list[Pack], step: int
    ) -> None:
        """Goes on with these runs, now in these packs, each with its state."""
        states = [self.state(module, step) for module in modules]
        self.torch.param_groups.clear()
        self.torch.state.clear()
        self._lay(modules, packs)
        for group in self._groups(modules, settings, packs):
            self.torch.add_param_group(group)
        self.load(modules, states)

    def set_rates(self, step: int) -> None:
        """The rates of the step after `step` others, of each run's own schedule."""
        for group in self.torch.param_groups:
            if group["schedule"]:
                group["lr"] = self._rate(group["schedule"], step)

    def _rate(self, schedule: tuple[float, str, float], step: int) -> float:
        base, kind, warmup = schedule
        return base * lr_factor(kind, warmup * self.steps, self.steps, step)

    def state(self, module: LoRAModule, step: int) -> dict[str, Any]:
        """The state of a run's optimizer after `step` steps."""
        group_of = {id(p): group for group in self.torch.param_groups for p in group["params"]}
        state, groups, number = {}, [], 0
        for group in module.optimizer_groups():
            first = number
            for own in group["params"]:
                stacked, i = self.places[id(own)]
                if held := self.torch.state.get(stacked):
                    state[number] = {
                        # Laid out as a parameter is alone.
                        key: Stack.view_of_run(value, i, own).clone(
                            memory_format=torch.contiguous_format
                        )
                        if _of_runs(value, stacked.shape)
                        else value
                        for key, value in held.items()
                    }
                number += 1
            about = group_of[id(self.places[id(group["params"][0])][0])]
            rest = {k: v for k, v in about.items() if k not in ("params", "schedule")}
            if schedule := about["schedule"]:  # alone the rate of the step to come is set already
                rest |= {"initial_lr": schedule[0], "lr": self._rate(schedule, step)}
            groups.append({**rest, "params": list(range(first, number))})
        return {"state": state, "param_groups": groups}

    def load(self, modules: Sequence[LoRAModule], states: Sequence[dict[str, Any]]) -> None:
        """Gives every run the state that its optimizer had, alone or in a pack."""
        for module, state in zip(modules, states, strict=True):
            every = [own for group in module.optimizer_groups() for own in group["params"]]
            for number, held in state["state"].items():
                stacked, i = self.places[id(every[number])]
                whole = self.torch.state[stacked]
                for key, value in held.items():
                    if not _of_runs(value, every[number].shape):
                        whole[key] = value
                        continue
                    if key not in whole:
                        whole[key] = torch.zeros_like(stacked, dtype=value.dtype)
                    Stack.view_of_run(whole[key], i, value).copy_(value)

    def schedulers(self, module: LoRAModule, step: int) -> list[dict[str, Any]]:
        """The states of the schedulers that a run would have alone."""
        about = module.optimizer
        if about.schedule == "constant" and not about.warmup:
            return []
        bases = [group["lr"] for group in module.optimizer_groups()]
        rates = [self._rate((lr, about.schedule, about.warmup), step) for lr in bases]
        return [
            {
                **{"base_lrs": bases, "last_epoch": step, "_step_count": step + 1},
                **{"_is_initial": False, "_get_lr_called_within_step": False},
                **{"_last_lr": rates, "lr_lambdas": [None] * len(bases)},
            }
        ]


def _of_runs(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape
