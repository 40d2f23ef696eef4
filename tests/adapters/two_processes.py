"""Half a batch in each of two gloo processes, by DDP and then by FSDP."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_lab import adapters
from tests.adapters.cases import move, trained
from tests.all_layer_kinds import AllLayerKinds

WAYS: dict[str, Any] = {
    "ddp": "all",
    "fsdp": {"some": adapters.Target(match=["conv", "fc", "head", "embed"])},
}
"""Way → what it targets."""


def everything(targets: Any = "all") -> AllLayerKinds:
    torch.manual_seed(0)
    model = AllLayerKinds(5, 3).double()
    adapters.attach(model, targets, r=2, alpha=2)
    move(model)
    return model


def step(model: nn.Module, parameters: list[nn.Parameter], rows: Tensor) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    """Process 0 leaves {way}.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for way, of in (("ddp", _ddp), ("fsdp", _fsdp)):
        model = everything(WAYS[way])
        torch.manual_seed(1)
        state = of(model, torch.randn(4, 5).double()[2 * rank :][:2])
        if rank == 0:
            torch.save(state, f"{folder}/{way}.pt")
    gc.collect()  # DDP's reducer has threads, and must go before the group
    dist.barrier()  # and no process before the other has all it was sent
    dist.destroy_process_group()


def _ddp(model: AllLayerKinds, rows: Tensor) -> dict[str, Tensor]:
    step(DistributedDataParallel(model), trained(model), rows)
    return adapters.adapter_state_dict(model)


def _fsdp(model: AllLayerKinds, rows: Tensor) -> dict[str, Any]:
    for child in (model.conv, model.fc, model.head):
        fully_shard(child)
    fully_shard(model)
    step(model, trained(model), rows)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {key: value for key, value in state.items() if ".lora." in key}
