"""Adapters on architectures of others: what holds on which, and which layers attention has.

Independent truth: as architecture_checks.py says, and layers counted by hand.

Run: make test ARGS=tests/adapters/test_zoo.py
"""

import pytest
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import Target
from lora_lab.adapters.sites import candidate_sites
from tests.adapters import zoo
from tests.adapters.architecture_checks import CHECKS, PAGE, result
from tests.adapters.peft_draws import Draws, outcome

pytest.importorskip("transformers")


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


QUICK = ("base at first", "W + ΔW, gradients", "merge and back", "cached generation")


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=[] if c in QUICK else pytest.mark.slow) for c in CHECKS]
)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_what_holds_on_all_architectures(name: str, check: str):
    """A reason why something is refused stands in docs/architectures.md."""
    assert "WRONG" not in (reason := result(name, check) or ""), reason


def test_the_table_in_docs_has_all_architectures_and_checks():
    header, *rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert header.split(" | ")[1:] == [*list(CHECKS)[:-1], f"{list(CHECKS)[-1]} |"]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*zoo.ARCHITECTURES]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_shortest_call_works(name: str):
    model, inputs = zoo.build(name)
    assert adapters.attach(model, r=8)
    assert outputs(model, inputs).isfinite().all()


FOUR, FUSED = 2 * 4, 2 * 2
"""Of two blocks: q, k, v and out; or the three in one, and out."""
ATTENTION = {
    "albert": 4,  # one block, used twice
    "bart": 2 * 4 + 2 * (4 + 4),  # the decoder's blocks read the encoder too
    **dict.fromkeys(["beit", "bert", "deberta-v2", "distilbert", "electra", "gemma2"], FOUR),
    **dict.fromkeys(["llama", "opt", "qwen3", "roberta", "swinv2", "vit"], FOUR),
    **dict.fromkeys(["gpt_oss", "granitemoe", "mixtral", "qwen3_moe"], FOUR),
    **dict.fromkeys(["bloom", "falcon", "gpt2", "gpt_neox", "phi3"], FUSED),
    "deepseek_v3": 2 * 5,  # queries by way of a lower rank, keys and values by way of one more
    "deberta-v2, relative": FOUR + 2 * 2,  # keys and queries of positions
    "longformer": FOUR + 2 * 3,  # q, k, v of the global attention
    "mobilevit": 9 * 4,  # 2 + 4 + 3 blocks
    "recurrent_gemma": 4,  # one block of three
    "segformer": 2 * (FOUR + 2),  # two stages; a convolution in each block
    "t5": 2 * 4 + 2 * (4 + 4),
    **{"mamba": 0, "resnet": 0},
}
"""Architecture → how many linear layers and convolutions its attention has, counted by hand."""


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_attention_has_the_layers_that_it_computes_with(name: str):
    model, _ = zoo.build(name)
    sites = [site for site in candidate_sites(model) if Target("attention")._is_for(site)]
    assert len(sites) == ATTENTION[name], [site.name for site in sites]


@pytest.mark.parametrize("count", [4, pytest.param(400, marks=pytest.mark.slow)])
def test_a_folder_of_peft_gives_its_outputs_or_is_refused(count: int):
    for seed in range(count):
        kind, details = outcome(Draws(seed), seed)
        assert kind != "WRONG", f"draw {seed}: {details}"
