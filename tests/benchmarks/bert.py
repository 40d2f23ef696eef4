"""A small BERT of Hugging Face's on random tokens: a model from outside, as a benchmark's case."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lora_lab.config.schema import Seed
from lora_lab.data import Data, Phase
from lora_lab.seeding import generator

TOKENS, CLASSES = 64, 4


class Tokens(Data):
    """Sequences of `length` random tokens; each token votes, and the most votes are the label.

    A token's votes for each class are standard normal, less their mean over the tokens; half of
    the tokens get new ones for the adaptation. An eighth as many rows again are held out.
    """

    task = "classification"

    def __init__(
        self,
        phase: Phase,
        batch_size: PositiveInt,
        seed: Seed,
        samples: PositiveInt = 2048,
        length: PositiveInt = 32,
    ):
        super().__init__(phase, batch_size, seed)
        self.check_batch(samples)
        self.samples, self.length = samples, length

    @property
    def sizes(self) -> dict[str, int]:
        """The vocabulary and the classes."""
        return {"in_features": TOKENS, "out_features": CLASSES}

    def draw(self) -> tuple[TensorDataset, TensorDataset]:
        """Training rows of the phase, and those held out."""
        votes = torch.randn(TOKENS, CLASSES, generator=generator(self.seed, "votes"))
        if self.phase == "adapt":
            half = (TOKENS // 2, CLASSES)
            votes[::2] = torch.randn(*half, generator=generator(self.seed, "new votes"))
        votes -= votes.mean(0)

        def rows(count: int, what: str) -> TensorDataset:
            draws = generator(self.seed, what, self.phase)
            x = torch.randint(TOKENS, (count, self.length), generator=draws)
            return TensorDataset(x, votes[x].sum(1).argmax(1))

        return rows(self.samples, "train"), rows(self.samples // 8, "val")


class Bert(nn.Module):
    """BERT-tiny's shape: 2 layers of width 128 with 2 heads; without dropout."""

    def __init__(self, in_features: PositiveInt, out_features: PositiveInt):
        super().__init__()
        config = BertConfig(
            vocab_size=in_features,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config.num_labels = out_features
        self.bert = BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, classes)."""
        return self.bert(x).logits
