"""The SVD of a base's weight, computed once and kept on disk for all runs over that base."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora_lab.analysis.spectra import SVD, svd_of_matrix
from lora_lab.runs import write_atomic


def svd_of_weight(W: Tensor, directory: Path) -> SVD:
    """The thin SVD of a weight as a matrix (out × rest), in float64, on the weight's device.

    It is read from `directory`/svd, where its file is named by the weight's shape and content. A
    file that is missing or cannot be read is written anew.
    """
    content = W.detach().cpu().contiguous().numpy().tobytes()
    name = f"{'x'.join(map(str, W.shape))}-{hashlib.sha256(content).hexdigest()[:16]}"
    path = directory / "svd" / f"{name}.safetensors"
    try:
        tensors = load_file(path)
        return SVD(*(tensors[key].to(W.device, torch.float64) for key in ("U", "S", "Vh")))
    except (OSError, KeyError, SafetensorError):
        svd = svd_of_matrix(W)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({k: t.cpu().contiguous() for k, t in vars(svd).items()}))
        return svd
