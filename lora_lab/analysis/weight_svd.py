"""The SVD of a base's weight, computed once and kept on disk for all runs over that base."""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lora_lab.adapters.weights_hash import weights_hash
from lora_lab.analysis.spectra import SVD, svd_of_matrix
from lora_lab.runs import write_atomic

log = logging.getLogger(__name__)


def svd_of_weight(W: Tensor, directory: Path) -> SVD:
    """The thin SVD of a weight as a matrix (out × rest), in float64, on the weight's device.

    It is read from `directory`/svd, where its file is named by the weight's shape and content. A
    file that is missing is written, and one that is damaged is written anew, and the log says so;
    it says too where none can be written.
    """
    content = W.detach().cpu().contiguous().numpy().tobytes()
    name = f"{'x'.join(map(str, W.shape))}-{hashlib.sha256(content).hexdigest()[:16]}"
    path = directory / "svd" / f"{name}.safetensors"
    if path.exists():
        try:
            tensors = _read(path)
            return SVD(*(tensors[key].to(W.device, torch.float64) for key in ("U", "S", "Vh")))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("the SVD in %s is damaged (%s): computing it again", path, error)
    svd = svd_of_matrix(W)
    tensors = {k: t.cpu().contiguous() for k, t in vars(svd).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, {"sha256": weights_hash(tensors)}))
    except OSError as error:  # the folder is read-only
        log.info("the SVD of a weight is not kept in %s: %s", path.parent, error.strerror)
    return svd


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a stored SVD. Raises ValueError where they are not those of its checksum.

    Files of earlier versions have no checksum.
    """
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    if about is not None and about.get("sha256") != weights_hash(tensors):
        raise ValueError("its checksum is another one")
    return tensors
