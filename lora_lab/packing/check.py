"""Whether runs can be trained as one pack, and how many of them in one pass: tried on a batch."""

import torch
from torch import Tensor

from lora_lab.adapters.model_call import Inputs, logits, take_rows
from lora_lab.packing.module import PackedModule
from lora_lab.packing.recorded_step import RELATIVE_TOLERANCE
from lora_lab.training.modules import Batch
from lora_lab.training.pack_losses import loss_sums_by_run

MAX_SAVED_BYTES_ON_CPU = 2**28
"""Bytes that one pass may save for backward on a CPU: with more, its caches thrash."""

MAX_RUN_BYTES_ON_CPU = 2**26
"""Bytes that one run may save for backward on a CPU, so that a pass holds at least four.

A run that saves more keeps the CPU busy by itself, and several in one pass are no quicker.
"""


class UnpackableError(RuntimeError):
    """Runs that cannot be a pack: vmap refuses the model, or a pack computes other outputs."""


def runs_per_pass(module: PackedModule, batch: Batch, on_gpu: bool) -> int:
    """How many runs one pass takes, so that what it saves for backward fits in memory.

    That is half of a GPU's free memory at most, or MAX_SAVED_BYTES_ON_CPU. Raises UnpackableError
    where the runs cannot be trained as a pack, or where on a CPU it would not be quicker.
    """
    if len(module.members) == 1:
        raise UnpackableError("it is one run")
    inputs, targets = batch
    try:
        with torch.random.fork_rng():
            run_bytes = saved_bytes_of_one_run(module, inputs, targets)
            packed, expected = outputs_both_ways(module, take_rows(inputs, slice(4)))
    except (RuntimeError, ValueError, TypeError) as error:
        cause = str(error).partition("\n")[0]
        raise UnpackableError(f"the model cannot be computed for many runs: {cause}") from error
    finally:
        module.unstack_runs()
        module.train()
    difference = (packed - expected).double().norm() / expected.double().norm().clamp(min=1e-30)
    if not difference <= RELATIVE_TOLERANCE.get(packed.dtype, 0.1):  # NaN is refused as well
        raise UnpackableError(f"outputs in a pack differ from those alone by {difference:.2g}")
    if not on_gpu and run_bytes > MAX_RUN_BYTES_ON_CPU:
        raise UnpackableError(
            f"a run keeps {run_bytes / 2**20:.0f} MB for backward: a CPU is quicker run by run"
        )
    max_bytes = torch.cuda.mem_get_info()[0] // 2 if on_gpu else MAX_SAVED_BYTES_ON_CPU
    return max(1, min(len(module.members), max_bytes // max(run_bytes, 1)))


def saved_bytes_of_one_run(module: PackedModule, inputs: Inputs, targets: Tensor) -> int:
    """The bytes that autograd saves for the backward of one run, the one of highest rank.

    Weights are left out: they are in memory anyway, and all runs share the base's.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    bytes_by_address: dict[int, int] = {}  # several saved tensors can be views of one storage

    def note_size(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        bytes_by_address[storage.data_ptr()] = storage.nbytes()
        return tensor

    pack = module.stack_runs(module.members[-1:]).train()
    # Autograd calls the first function with each tensor it saves, the second when it reads it.
    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        loss_sums_by_run(module.task.loss_sum, pack(inputs), targets).sum()
    return sum(size for address, size in bytes_by_address.items() if address not in weights)


def outputs_both_ways(module: PackedModule, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The outputs of all runs, by a pack and by each run's own model: (runs, rows, …)."""
    pack = module.stack_runs(module.members).eval()
    with torch.no_grad():
        models = [member.module.model.eval() for member in module.members]
        return pack(inputs), torch.stack([logits(model, inputs) for model in models])
