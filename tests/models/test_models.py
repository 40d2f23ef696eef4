"""The models, and the loss and accuracy of the language task.

Truth: the same computation written out in plain torch.

Run: make test ARGS=tests/models/test_models.py
"""

import pytest
import torch
from torch import nn

from lora_lab.models.bigram import Bigram
from lora_lab.models.cnn import CNN
from lora_lab.models.transformer import Attention, Transformer
from lora_lab.training.tasks import TASKS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_later_token_changes_no_earlier_logits_but_its_own_and_later_ones():
    model = Transformer(11, 7, width=16, heads=4, layers=2, context=9)
    one = torch.randint(11, (3, 9))
    other = one.clone()
    other[:, 5] = (one[:, 5] + 1) % 11
    with torch.no_grad():
        before, after = model(one), model(other)
    assert before.shape == (3, 9, 7)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()
    torch.testing.assert_close(model(one[:, :4]), before[:, :4])  # a shorter text


def test_attention_is_torchs():
    ours, torchs = Attention(12, 3), nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        torchs.out_proj.weight.copy_(ours.o.weight)
    x = torch.randn(2, 5, 12)
    later = torch.ones(5, 5).triu(1).bool()
    torch.testing.assert_close(ours(x), torchs(x, x, x, attn_mask=later)[0])


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="heads=3: must divide width=16"):
        Transformer(11, 7, width=16, heads=3, layers=1)


def test_a_cnn_is_its_levels_vectors_and_patches():
    model = CNN(10, side=8, levels=17, channels=[3, 5, 4])
    levels = torch.randint(17, (6, 8, 8))
    with torch.no_grad():
        y = model.embed.weight[levels]  # (B, H, W, channels)
        for conv in ("body.conv1", "body.conv2"):
            B, side, _, _ = y.shape
            patches = y.view(B, side // 2, 2, side // 2, 2, -1)
            weight, bias = (model.get_parameter(f"{conv}.{part}") for part in ("weight", "bias"))
            y = (torch.einsum("bhiwjc,ocij->bhwo", patches, weight) + bias).relu()
        y = y.permute(0, 3, 1, 2).reshape(6, -1) @ model.head.weight.T + model.head.bias
        pixels = levels.flatten(1) / 16
        torch.testing.assert_close(model(pixels), y)
        assert torch.equal(model(pixels - 0.03), model(pixels))  # the nearest of the 17 levels


def test_a_bigram_looks_its_logits_up():
    model = Bigram(4, 3)
    assert not model.table.weight.any()
    model.table.weight.data = torch.arange(12.0).view(4, 3)
    assert model(torch.tensor([[1, 3]])).tolist() == [[[3, 4, 5], [9, 10, 11]]]


def test_language_is_scored_at_every_token():
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    p = logits.softmax(-1)
    nats = [-p[i, j, tokens[i, j]].log() for i in range(2) for j in range(5)]
    right = [logits[i, j].argmax() == tokens[i, j] for i in range(2) for j in range(5)]
    task = TASKS["language"]
    torch.testing.assert_close(task.loss(logits, tokens), torch.stack(nats).mean())
    accuracy = task.metrics["accuracy"](7)
    accuracy.update(logits, tokens)
    torch.testing.assert_close(accuracy.compute(), torch.stack(right).float().mean())
