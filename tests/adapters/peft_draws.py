"""`python -m tests.adapters.peft_draws [--count N] [--seed S]`: PEFT folders drawn at random.

A draw is an architecture of zoo.py and a config of PEFT's LoRA: which layers and parameters, ranks
and alphas by pattern, rsLoRA, DoRA, biases, modules and tokens that train in full, tied weights,
the task. PEFT makes the adapter, its numbers are drawn, and PEFT saves it. Then it is loaded here,
and its outputs are those of PEFT, which loads it too; or it is refused, for a reason that is
printed with its share. Draws that PEFT itself refuses are counted apart.

Ends with 1 where outputs differ, or an error is not an AdapterError.
"""

import argparse
import copy
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab import adapters
from tests.adapters import zoo
from tests.adapters.architecture_checks import outputs

ADAPTABLE = ("Linear", "Conv1D", "Embedding", "Conv2d")
"""Classes of layers that PEFT's LoRA replaces."""

TASKS = {zoo.CAUSAL: "CAUSAL_LM", zoo.SEQUENCES: "SEQ_CLS", zoo.TWO_SEQUENCES: "SEQ_2_SEQ_LM"}
"""PEFT's word for what a model of the zoo computes."""

EXPERT_STACKS = ("experts.gate_up_proj", "experts.down_proj")


class Draws(random.Random):
    """Random choices of a config."""

    def some(self, values: Iterable[Any], most: int = 3) -> list[Any]:
        """One to `most` of the values."""
        pool = sorted(set(values))
        return self.sample(pool, k=min(len(pool), self.randint(1, most)))

    def happens(self, share: float) -> bool:
        """Whether an event of this probability happens."""
        return self.random() < share


def draw_config(draws: Draws, model: nn.Module, task: str) -> dict[str, Any]:
    """The arguments of a LoraConfig for this model, each option with a probability of its own."""
    layers = [n for n, m in model.named_modules() if type(m).__name__ in ADAPTABLE and n]
    last_names = sorted({name.rpartition(".")[2] for name in layers} - set("0123456789"))
    config: dict[str, Any] = {"r": draws.randint(1, 4), "lora_alpha": draws.choice([1, 4, 7.5])}
    config["target_modules"] = draws.choice(
        [
            "all-linear",
            draws.some(last_names),
            draws.some(layers),
            "|".join(re.escape(name) for name in draws.some(layers)),
        ]
    )
    if draws.happens(0.25):
        config["rank_pattern"] = {draws.choice(last_names): draws.randint(1, 6)}
    if draws.happens(0.25):
        config["alpha_pattern"] = {draws.choice(layers): draws.choice([2, 9])}
    config["use_rslora"], config["use_dora"] = draws.happens(0.3), draws.happens(0.25)
    config["lora_dropout"] = draws.choice([0.0, 0.0, 0.1])
    config["bias"] = draws.choice(["none", "none", "none", "all", "lora_only"])
    if draws.happens(0.1):
        config["lora_bias"] = True
    if draws.happens(0.1):
        config["exclude_modules"] = draws.some(last_names, 1)
    if draws.happens(0.2):
        names = [n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)]
        config["modules_to_save"] = draws.some({n.rpartition(".")[2] for n in names}, 1)
    stacks = [n for n, p in model.named_parameters() if n.endswith(EXPERT_STACKS) and p.ndim == 3]
    if stacks and draws.happens(0.7):
        config["target_parameters"] = draws.choice([draws.some(EXPERT_STACKS), draws.some(stacks)])
        if draws.happens(0.5):
            config["target_modules"] = []
    if "input_ids" in model.forward.__code__.co_varnames and draws.happens(0.1):
        config["trainable_token_indices"] = draws.sample(range(3, 40), k=3)
    if draws.happens(0.5):
        config["task_type"] = TASKS.get(task)
    config["init_lora_weights"] = draws.choice([True, True, True, "gaussian", "olora", "pissa"])
    return config


def build(draws: Draws) -> tuple[str, nn.Module, dict[str, Tensor], str]:
    """An architecture's name, its model, whose head is tied in some draws, inputs and its task."""
    name = draws.choice(sorted(zoo.ARCHITECTURES))
    task = zoo.ARCHITECTURES[name][1]
    if task in zoo.GENERATE and draws.happens(0.3):
        return f"{name}, tied", *zoo.build(name, tie_word_embeddings=True), task
    return name, *zoo.build(name), task


def train_two_steps(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> None:
    """Moves all numbers that a gradient reaches: first B, which starts at zero, and then A.

    PEFT ignores an adapter on a weight that a model reads without calling its layer, as Mamba's
    dt_proj: in training its B stays zero, and so it does here.
    """
    generator = torch.Generator().manual_seed(seed)
    moved: set[str] = set()
    for _ in range(2):
        outputs(model, inputs).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.any() and name not in moved:
                moved.add(name)
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def outcome(draws: Draws, seed: int) -> tuple[str, str]:
    """`equal`, `refused`, `PEFT` or `WRONG`, and the details."""
    from peft import LoraConfig, PeftModel, get_peft_model

    name, model, inputs, task = build(draws)
    config = draw_config(draws, model, task)
    if config["init_lora_weights"] in ("olora", "pissa"):  # PEFT decomposes no float64
        model = model.float()
        inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    for_peft, for_us = copy.deepcopy(model), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made: Any = get_peft_model(model, LoraConfig(**config)).eval()  # pyright: ignore
            train_two_steps(made, inputs, seed)
            made.save_pretrained(folder)
            theirs = PeftModel.from_pretrained(for_peft, folder).eval()
            expected = outputs(theirs, inputs).detach()
            same = torch.allclose(outputs(made, inputs), expected, rtol=1e-6, atol=1e-8)
        except Exception as error:
            return "PEFT", f"{type(error).__name__}: {first_sentence(error)}"
        described = f"{name}: {config}"
        try:
            adapters.load_peft(for_us, folder)
        except adapters.AdapterError as error:
            return "refused", first_sentence(error)
        except Exception as error:
            return "WRONG", f"{described}: {type(error).__name__}: {error}"
    got = outputs(for_us, inputs).detach()
    if torch.allclose(got, expected, rtol=1e-6, atol=1e-8):
        return "equal", "" if same else "though PEFT's own outputs before it was saved were others"
    moved = (expected - got).abs().max() / expected.abs().max()
    if torch.allclose(got, outputs(made, inputs), rtol=1e-6, atol=1e-8):
        return "equal", "to the model that was saved; PEFT gives others after loading"
    return "WRONG", f"{described}: off by {moved:.1e}"


def first_sentence(error: Exception) -> str:
    """What an error says, without names of files, layers and numbers, so that kinds are counted."""
    text = " ".join(str(error).split()).partition("; ")[0]
    text = re.sub(r"/tmp/\S+", "FOLDER", text)
    text = re.sub(r"'[\w.]*'|\{[^}]*\}|\[[^\]]*\]", "…", text)
    return re.sub(r"\d+", "N", text)[:150]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    tally: Counter[tuple[str, str]] = Counter()
    for i in range(arguments.seed, arguments.seed + arguments.count):
        torch.manual_seed(i)
        result = outcome(Draws(i), i)
        tally[result] += 1
        if result[0] == "WRONG":
            print(f"draw {i}: {result[1]}", flush=True)
    by_kind = Counter(kind for kind, count in tally.items() for kind in [kind[0]] * count)
    loadable = arguments.count - by_kind["PEFT"]
    print(f"{arguments.count} draws, of which PEFT itself makes and loads {loadable}:")
    for kind in ("equal", "refused", "WRONG"):
        print(f"  {kind}: {by_kind[kind]} ({by_kind[kind] / loadable:.1%})")
    for (kind, detail), count in tally.most_common():
        if kind != "WRONG" and detail:
            print(f"{count:5} {kind}: {detail}")
    return 1 if by_kind["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
