"""The optimizer of a pack: torch's own over stacked parameters, and each run's state read out."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.adapters.optimizer_groups import groups_of
from lora_lab.adapters.pack import Pack
from lora_lab.adapters.stacks import FullStack, Stack
from lora_lab.config.components import warmup_steps
from lora_lab.training.lora_module import LoRAModule
from lora_lab.training.schedule import lr_factor

Schedule = tuple[float, str, float]
"""The learning rate that a schedule starts from, its kind, and the share of steps that warm up."""


# How runs share an optimizer. On a layer Linear(64, 10) three runs of r = 1, 2, 2 are one stack:
#
#     A (3, 2, 64)    B (3, 10, 2)    their gradients, and Adam's exp_avg and exp_avg_sq, likewise
#
# Run 0 has r = 1. Its own A (1, 64) is the view A[0, :1], its own B (10, 1) is B[0, :, :1]; A[0, 1]
# and B[0, :, 1] are padding. The optimizers allowed here are elementwise: a number moves by its own
# gradient and its own moments alone. So one optimizer over the stack moves each run's numbers as
# an optimizer of the run's would, and the runs need no loop.
#
# The padding stays zero. Run 0's ΔW (10, 64) is B[0] A[0], so the gradients of its padding are
# products with padding: dB[0, :, 1] = dΔW A[0, 1] = 0 and dA[0, 1] = dΔWᵀ B[0, :, 1] = 0. Then the
# moments are zero too, and weight decay is a share of the number itself: each step on it is zero.
#
# One run's state is read out of the stack's as its parameters are: of exp_avg (3, 2, 64) run 0 has
# exp_avg[0, :1], of shape (1, 64). That is what the run's optimizer would hold outside of a pack,
# so a checkpoint made in a pack can be resumed by the run alone, and the other way round.
class PackedOptimizer:
    """One torch optimizer for all runs of a pack, elementwise, over their stacked parameters.

    A run is known by its module. Hyperparameters are those of a parameter group, so there are
    groups for each different value of `optimizer_settings`; a stack holds runs of one value only.

    Args:
        modules: each run's module, with its optimizer settings and its own view of the parameters.
        packs: the passes that a step is made of, which hold the stacks.
        total_steps: the number of steps that learning rate schedules span.
    """

    def __init__(self, modules: Sequence[LoRAModule], packs: list[Pack], total_steps: int):
        self.total_steps = total_steps
        self._locate(packs)
        config, groups = modules[0].optimizer, self._groups(modules)
        self.torch_optimizer: torch.optim.Optimizer = config.callee(groups, **config.arguments)

    def _locate(self, packs: list[Pack]) -> None:
        """Sets `stacks`, those of all passes, and `locations`, by the id of a run's parameter.

        A location is the stacked parameter that the run's is a view of, and the run's index in it.
        """
        self.stacks = [stack for pack in packs for _, stack in pack.stacks]
        self.locations: dict[int, tuple[nn.Parameter, int]] = {}
        for stack in self.stacks:
            for i, adapter in enumerate(stack.run_adapters):
                for name, parameter in adapter.named_parameters():
                    self.locations[id(parameter)] = stack.adapter.get_parameter(name), i

    def _groups(self, modules: Sequence[LoRAModule]) -> list[dict[str, Any]]:
        """The parameter groups: one for each setting (with LoRA+ two), and its schedule."""
        groups = []
        for setting, module in {optimizer_settings(m): m for m in modules}.items():
            stacks = [stack for stack in self.stacks if stack.setting == setting]
            adapters = [stack.adapter for stack in stacks if isinstance(stack, Stack)]
            in_full = [stack.adapter.value for stack in stacks if isinstance(stack, FullStack)]
            config = module.optimizer
            decay = config.arguments.get("weight_decay", 0.0)
            in_setting = groups_of(adapters, config.lr, module.lr_ratio, decay)
            if in_full:  # the last group, as in `parameter_groups`
                in_setting.append({"params": in_full, "lr": config.lr, "weight_decay": decay})
            for group in in_setting:
                is_constant = config.schedule == "constant" and not config.warmup
                schedule = None if is_constant else (group["lr"], config.schedule, config.warmup)
                groups.append({**config.arguments, **group, "schedule": schedule})
        return groups

    def restack(self, modules: Sequence[LoRAModule], packs: list[Pack], step: int) -> None:
        """Goes on with these runs in new stacks, as after one has failed; each keeps its state."""
        states = [self.run_state(module, step) for module in modules]
        self.torch_optimizer.param_groups.clear()
        self.torch_optimizer.state.clear()
        self._locate(packs)
        for group in self._groups(modules):
            self.torch_optimizer.add_param_group(group)
        self.load_run_states(modules, states)

    def set_learning_rates(self, step: int) -> None:
        """Sets each group's learning rate for the step that follows `step` others."""
        for group in self.torch_optimizer.param_groups:
            if group["schedule"]:
                group["lr"] = self._learning_rate(group["schedule"], step)

    def _learning_rate(self, schedule: Schedule, step: int) -> float:
        (initial_rate, kind, warmup), total = schedule, self.total_steps
        return initial_rate * lr_factor(kind, warmup_steps(warmup, total), total, step)

    def run_state(self, module: LoRAModule, step: int) -> dict[str, Any]:
        """The state_dict that a run's optimizer would hold after `step` steps outside of a pack."""
        parameters, groups = [], []
        for group in module.optimizer_groups():
            first, parameters = len(parameters), [*parameters, *group["params"]]
            settings = self._group_settings(group["params"][0], step)
            groups.append({**settings, "params": list(range(first, len(parameters)))})
        states = enumerate(map(self._parameter_state, parameters))
        return {"state": {n: state for n, state in states if state}, "param_groups": groups}

    def _parameter_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer remembers of one run's parameter: its part of the stacked moments."""
        stacked, i = self.locations[id(parameter)]
        return {
            # Copied, and in the memory layout that it has outside of a pack.
            key: Stack.view_of_run(value, i, parameter).clone(memory_format=torch.contiguous_format)
            if is_elementwise(value, stacked.shape)
            else value
            for key, value in self.torch_optimizer.state.get(stacked, {}).items()
        }

    def _group_settings(self, parameter: nn.Parameter, step: int) -> dict[str, Any]:
        """The settings of the group that a run's parameter is in, as a LambdaLR leaves them."""
        group = self._group_of(parameter)
        settings = {k: v for k, v in group.items() if k not in ("params", "schedule")}
        if schedule := group["schedule"]:
            # A LambdaLR has set the rate of the coming step by now; a pack sets it in that step.
            settings |= {"initial_lr": schedule[0], "lr": self._learning_rate(schedule, step)}
        return settings

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter group that a run's parameter is in."""
        stacked, _ = self.locations[id(parameter)]
        groups = self.torch_optimizer.param_groups
        return next(g for g in groups if any(p is stacked for p in g["params"]))

    def learning_rate(self, module: LoRAModule) -> float:
        """The learning rate of a run in the newest step: that of its first parameter group."""
        return self._group_of(module.optimizer_groups()[0]["params"][0])["lr"]

    def load_run_states(self, modules: Sequence[LoRAModule], states: list[dict[str, Any]]) -> None:
        """Writes each run's optimizer state, from a pack or from a run by itself, to the stacks."""
        for module, state in zip(modules, states, strict=True):
            parameters = [p for group in module.optimizer_groups() for p in group["params"]]
            for number, values in state["state"].items():
                stacked, i = self.locations[id(parameters[number])]
                stacked_values = self.torch_optimizer.state[stacked]
                for key, value in values.items():
                    if not is_elementwise(value, parameters[number].shape):
                        stacked_values[key] = value
                        continue
                    if key not in stacked_values:
                        stacked_values[key] = torch.zeros_like(stacked, dtype=value.dtype)
                    Stack.view_of_run(stacked_values[key], i, value).copy_(value)

    def scheduler_states(self, module: LoRAModule, step: int) -> list[dict[str, Any]]:
        """The state_dicts of the LambdaLR that a run would have outside of a pack; [] of none."""
        config = module.optimizer
        if config.schedule == "constant" and not config.warmup:
            return []
        initial_rates = [group["lr"] for group in module.optimizer_groups()]
        schedules = [(rate, config.schedule, config.warmup) for rate in initial_rates]
        return [
            {
                **{"base_lrs": initial_rates, "last_epoch": step, "_step_count": step + 1},
                **{"_is_initial": False, "_get_lr_called_within_step": False},
                "_last_lr": [self._learning_rate(schedule, step) for schedule in schedules],
                "lr_lambdas": [None] * len(initial_rates),
            }
        ]


def optimizer_settings(module: LoRAModule) -> str:
    """Optimizer settings as one string: runs of equal ones can be in one parameter group."""
    return json.dumps([module.optimizer.model_dump(), module.lr_ratio])


def is_elementwise(value: Any, shape: torch.Size) -> bool:
    """Whether a value of an optimizer's state has an entry for each number of a parameter.

    Moments do; the count of steps, a scalar, does not.
    """
    return isinstance(value, Tensor) and value.shape == shape
