"""`lora-lab spectra` of a PEFT folder for a model of 1B parameters, `extract` of 1 GB checkpoints.

The folder is random, with the layers of Llama-3.2-1B at r = 16 (112 sites). The checkpoints are
random too: two of 1.07 GB in float32, in three shards, 60 matrices of 2048 × 2048, an embedding and
vectors. Seconds and the peak memory (Linux's VmHWM) are those of whole processes, imports included.
Bounds: spectra 10 s and 1 GB; extract 1 GB.

Run: python -m tests.benchmarks.files
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from lora_lab.cli import main as cli

HIDDEN, GROUPED, INNER, LAYERS, R = 2048, 512, 8192, 16, 16
SITES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (GROUPED, HIDDEN),
    "self_attn.v_proj": (GROUPED, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BOUNDS = {"spectra": (10.0, 1.0), "extract": (float("inf"), 1.0)}
"""Command → seconds and gigabytes."""


def peft_folder(folder: Path) -> None:
    """Writes a random adapter in PEFT's format."""
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, rest) in SITES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(R, rest) / rest**0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(out, R)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_modules": [*SITES]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def checkpoints(before: Path, after: Path) -> None:
    """Writes W₀, and W₀ + a change of rank 8 and noise, in shards."""
    shapes = {"embed.weight": (8000, HIDDEN), **{f"norm.{i}": (HIDDEN,) for i in range(20)}}
    shapes |= {f"layers.{i}.fc.weight": (HIDDEN, HIDDEN) for i in range(60)}
    keys = [*shapes]
    weight_map = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(keys)}
    for folder in (before, after):
        folder.mkdir()
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    for file in sorted(set(weight_map.values())):
        old = {key: torch.randn(shapes[key]) for key in keys if weight_map[key] == file}
        save_file(old, before / file)
        for tensor in old.values():
            if tensor.dim() == 2:
                tensor += 0.01 * torch.randn(len(tensor), 8) @ torch.randn(8, tensor.shape[1])
            tensor += 1e-3 * torch.randn_like(tensor)
        save_file(old, after / file)


def measured(*arguments: str) -> tuple[float, float, float]:
    """Wall and processor seconds, and the peak memory in GB, of a `lora-lab` command."""
    command = [sys.executable, "-m", "tests.benchmarks.files", *arguments]
    before, started = os.times(), time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system
    return wall, cpu - before.children_user - before.children_system, int(output.split()[-1]) / 1e9


def main() -> None:
    """Prints the table, and exits with 1 where a command is beyond its bound."""
    if len(sys.argv) > 1:
        cli.main()
        status = Path("/proc/self/status").read_text().split()
        print(1024 * int(status[status.index("VmHWM:") + 1]))
        return
    table = Table(title="whole processes")
    for name in ("", "wall s", "processor s", "peak GB", "bounds s, GB"):
        table.add_column(name, justify="right" if name else "left")
    is_beyond = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peft_folder(folder / "peft")
        checkpoints(folder / "before", folder / "after")
        given = ("--before", f"{folder}/before", "--after", f"{folder}/after", "--rank", "32")
        commands = {"spectra": (f"{folder}/peft",), "extract": given}
        for command, arguments in commands.items():
            wall, cpu, peak = measured(command, *arguments, "--to", f"{folder}/{command}")
            seconds, gigabytes = BOUNDS[command]
            is_beyond |= wall > seconds or peak > gigabytes
            numbers = (f"{x:.2f}" for x in (wall, cpu, peak))
            table.add_row(f"lora-lab {command}", *numbers, f"{seconds:g}, {gigabytes:g}")
    Console().print(table)
    sys.exit(is_beyond)


if __name__ == "__main__":
    main()
