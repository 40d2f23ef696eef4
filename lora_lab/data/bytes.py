"""Text that comes with Python: the base learns the standard library's code, adapters its prose."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lora_lab import adapters
from lora_lab.analysis.theory import Prediction
from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase

FILES = (
    *("argparse", "ast", "bdb", "calendar", "codecs", "configparser", "contextlib", "dataclasses"),
    *("difflib", "dis", "doctest", "enum", "fractions", "functools", "inspect", "ipaddress"),
)
"""Single-file modules that all supported Python versions have: about 950 kB of code."""


class Bytes(Data):
    """Next-byte prediction on windows of `context` bytes.

    The base phase reads code of the standard library, the adapt phase the topics of `help()`, both
    of the Python that runs. A phase takes the first `size` bytes of its text, or all if it is
    shorter. `held_out` is the share of the windows, at the end, that is for validation; 0 validates
    on the training windows. `seed` draws only the order of the windows.
    """

    task = "language"
    eval_rows = 256

    def __init__(
        self,
        phase: Phase,
        size: PositiveInt,
        context: PositiveInt,
        held_out: Annotated[float, Field(ge=0, lt=1)],
        batch_size: PositiveInt,
        seed: Seed,
    ):
        super().__init__(phase, batch_size, seed)
        self.size, self.context, self.held_out = size, context, held_out
        self.check_batch(self._training_windows(size))
        if held_out and self._training_windows(size) == (size - 1) // context:
            raise ValueError(f"held_out={held_out}: not one window of {size} bytes is held out")

    def _training_windows(self, size: int) -> int:
        """How many windows of a text of `size` bytes are for training."""
        return round((1 - self.held_out) * ((size - 1) // self.context))

    @property
    def sizes(self) -> dict[str, int]:
        """256 tokens in and out, one for each byte, and the length of a window."""
        return {"in_features": 256, "out_features": 256, "context": self.context}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Disjoint windows (N, context), and the byte that follows each of their bytes."""
        if self.phase == "base":
            library = Path(sysconfig.get_path("stdlib"))
            text = b"".join((library / f"{name}.py").read_bytes() for name in FILES)
        else:
            text = "\n".join(topics[name] for name in sorted(topics)).encode()
        text = torch.frombuffer(bytearray(text[: self.size]), dtype=torch.uint8).long()
        end = (len(text) - 1) // self.context * self.context
        x, y = (t.view(-1, self.context) for t in (text[:end], text[1 : end + 1]))
        n = self._training_windows(len(text))
        train = TensorDataset(x[:n], y[:n])
        return train, TensorDataset(x[n:], y[n:]) if self.held_out else train

    def predicted_metrics(self, model: nn.Module) -> dict[str, Prediction]:
        """For a bigram model validated on its training windows: the conditional entropy H(y | x).

        It is the least loss that a table of logits can have, and exact where ΔW can be any table on
        the rows of the bytes that occur: r is at least their number, or the full table trains.
        """
        weights = [weight.shape for weight in adapters.base_state_dict(model).values()]
        if self.held_out or weights != [(256, 256)]:
            return {}
        assert self.train is not None
        counts = pair_counts(*self.train.tensors)
        occurring = int(counts.any(1).sum())
        recipes = [adapter.recipe for adapter in adapters.attached(model).values()]
        if any(
            r.r < occurring or r.trains != "both" or r.dropout or r.form != "lora" for r in recipes
        ):
            return {}
        return {"val/loss": Prediction(conditional_entropy(counts))}


def pair_counts(x: Tensor, y: Tensor) -> Tensor:
    """How often each byte x (row) is followed by each byte y (column): 256 × 256."""
    return (256 * x + y).flatten().bincount(minlength=256**2).view(256, 256)


def conditional_entropy(counts: Tensor) -> float:
    """H(column | row) in nats of a table of counts: Σ n_ij ln(n_i / n_ij) / n."""
    counts = counts.double()
    rows = counts.sum(1)
    return ((rows.xlogy(rows).sum() - counts.xlogy(counts).sum()) / counts.sum()).item()
