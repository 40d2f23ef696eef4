"""A mixture of 64 experts with adapters on them, against PEFT's target_parameters and the base.

A step is forward, backward and zero_grad of Qwen3-MoE's block (router and experts) whose input
takes a gradient. All contenders hold the same weights and factors and take turns in one process;
a ratio is of two neighbours in time, and the table shows the median and the quartiles of all
rounds. The rows are transformers' ways to compute experts, for some numbers of tokens.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from lora_lab import adapters
from tests.benchmarks.adapters import Step, race

R, ALPHA = 8, 12.0
HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 256, 128, 64, 8
ROWS = [
    *(("eager", tokens) for tokens in (32, 512)),
    *(("grouped_mm", tokens) for tokens in (32, 512)),
    ("batched_mm", 32),
]
"""The implementation, and the number of tokens. batched_mm copies a matrix for each token."""


class Block(nn.Module):
    """The block, and of what it gives the tokens alone."""

    def __init__(self, implementation: str):
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            num_experts=EXPERTS,
            num_experts_per_tok=PER_TOKEN,
        )
        config._experts_implementation = implementation
        self.mlp = Qwen3MoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.06)
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden) → the same."""
        output = self.mlp(x)
        return output[0] if isinstance(output, tuple) else output


def steps(implementation: str, tokens: int) -> dict[str, Step]:
    """The same block and input with every contender; those with adapters give the same output."""
    torch.manual_seed(0)
    base, x = Block(implementation), torch.randn(1, tokens, HIDDEN, requires_grad=True)
    ours = copy.deepcopy(base)
    adapters.attach(ours, "experts", r=R, alpha=ALPHA)
    names = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=R, lora_alpha=int(ALPHA), target_modules=[], target_parameters=names)
    peft: Any = inject_adapter_in_model(config, copy.deepcopy(base))
    outer: Any = peft.mlp.experts  # a wrapper for each parameter, one in the other
    wrappers = {wrapper.parameter_name: wrapper for wrapper in (outer, outer.base_layer)}
    for site, adapter in adapters.attached(ours).items():
        nn.init.normal_(adapter.B, std=0.1)
        theirs = wrappers[site.rpartition(".")[2]]
        theirs.lora_A["default"].weight.data = adapter.A.detach().flatten(0, 1)
        # (E, out, r) → (out, r · E)
        theirs.lora_B["default"].weight.data = adapter.B.detach().permute(1, 2, 0).flatten(1)
    output = ours(x)
    torch.testing.assert_close(peft(x), output, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(x), output, rtol=0.1)
    gradient = torch.randn_like(x)
    models = {"ours": ours, "PEFT": peft, "base": base}
    return {name: Step(model, x, gradient) for name, model in models.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.experts")
    parser.add_argument("--seconds", type=float, default=8, help="for each row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table(title=f"ours / theirs, {EXPERTS} experts, threads: {options.threads}")
    for heading in ("experts", "theirs", "step time [quartiles]", "peak"):
        table.add_column(Text(heading), no_wrap=True)
    for implementation, tokens in ROWS:
        contenders = steps(implementation, tokens)
        ratios = race(contenders, options.seconds)
        peaks = {name: step.peak() for name, step in contenders.items()}
        for i, (other, values) in enumerate(ratios.items()):
            low, middle, high = statistics.quantiles(values, n=4)
            table.add_row(
                "" if i else f"{implementation}, {tokens} tokens",
                other,
                Text(f"{middle:.3f} [{low:.3f}, {high:.3f}]"),
                f"{peaks['ours'] / peaks[other]:.3f}",
                end_section=i == len(ratios) - 1,
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
