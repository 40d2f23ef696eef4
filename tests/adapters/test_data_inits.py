"""Inits that start from data: EVA, CorDA and LoRA-GA.

The truth is the papers' equations written out for a plain layer with the inputs that it is given,
in float64; PEFT's own preprocessing on the same batches; and torch's gradients of the full weights.
Run: make test ARGS=tests/adapters/test_data_inits.py
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Calibration, calibration, data_inits
from tests.adapters.cases import seeded, the_adapter

R, SITES = 3, ("0", "2")


def mlp() -> Any:
    seeded(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 7))


def batches(count: int = 2, rows: int = 40) -> list[Tensor]:
    """Inputs whose directions are of clearly different sizes, about a mean that is not zero."""
    seeded(1)
    sizes = 1.5 ** -torch.arange(10.0)
    turn = torch.linalg.qr(torch.randn(10, 10)).Q
    return [torch.randn(rows, 10) * sizes @ turn + 0.3 for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(3).sum()


def attached(init: str, model: nn.Module, inputs: list[Tensor], **how: Any) -> dict[str, Any]:
    data = Calibration(inputs, loss if init == "lora_ga" else None)
    adapters.attach(model, r=R, alpha=6, init=init, calibration=data, **how)
    return adapters.attached(model)


def span(columns: Tensor) -> Tensor:
    """The projection onto the span of columns."""
    Q = torch.linalg.qr(columns.double()).Q
    return Q @ Q.T


def inputs_of(model: nn.Sequential, site: str, inputs: list[Tensor]) -> Tensor:
    return model[: int(site)](torch.cat(inputs))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_the_factors_are_those_of_the_papers_equations(init: str):
    plain, inputs = mlp().double(), [x.double() for x in batches()]
    total: Any = sum(loss(plain, x) for x in inputs)
    grads = torch.autograd.grad(total, [plain[0].weight, plain[2].weight])
    for (site, adapter), G in zip(
        attached(init, copy.deepcopy(plain), inputs).items(), grads, strict=True
    ):
        x, W = inputs_of(plain, site, inputs).detach(), plain.get_submodule(site).weight.detach()
        A, B, scale = adapter.A.detach(), adapter.B.detach(), adapter.scale
        if init == "eva":
            V = torch.linalg.svd(x - x.mean(0))[2][:R].T
            torch.testing.assert_close(A @ A.T, torch.eye(R).double())
            torch.testing.assert_close(span(A.T), span(V))
            assert not B.any()
        elif init == "corda":
            C = x.T @ x / len(x)
            C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
            U, S, Vh = torch.linalg.svd(W @ C)
            torch.testing.assert_close(scale * B @ A, U[:, :R] * S[:R] @ Vh[:R] @ C.inverse())
            # The paper's split gives both factors √S, of a C whose size is a convention.
            torch.testing.assert_close(B.T @ B, (B.T @ B).diag().diag())
        else:
            U, _, Vh = torch.linalg.svd(G)
            size = len(W) ** 0.25 / 16**0.5
            torch.testing.assert_close(A @ A.T, size**2 * torch.eye(R).double())
            torch.testing.assert_close(span(A.T), span(Vh[:R].T))
            torch.testing.assert_close(span(B), span(U[:, R : 2 * R]))
            torch.testing.assert_close(B.T @ B, size**2 * torch.eye(R).double())


def test_corda_of_white_inputs_is_pissa():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    white = torch.linalg.qr(torch.randn(30, 6).double()).Q * 7
    adapter = attached("corda", copy.deepcopy(model), [white])["0"]
    adapters.attach(model, r=R, alpha=6, init="pissa")
    pissa = the_adapter(model)
    damped = 1 + data_inits.DAMPING
    torch.testing.assert_close(adapter.B @ adapter.A, pissa.B @ pissa.A)
    torch.testing.assert_close(adapter.B.norm(), pissa.B.norm() * damped**0.5)


def test_a_first_step_of_lora_ga_goes_where_full_fine_tuning_does():
    """‖ΔW / c + G‖ is least where A and B are LoRA-GA's: against 50 random orthonormal pairs."""
    model = mlp().double()
    inputs = [x.double() for x in batches()]
    total: Any = sum(loss(model, x) for x in inputs)
    (G,) = torch.autograd.grad(total, [model[0].weight])
    adapter = attached("lora_ga", model, inputs)["0"]

    def distance(A: Tensor, B: Tensor) -> float:
        """How far the step B Bᵀ G + G Aᵀ A, in its best length, is from G."""
        step = B @ B.T @ G + G @ A.T @ A
        best = (step * G).sum() / step.square().sum()
        return (best * step - G).norm().item()

    A, B = (t.detach() for t in (adapter.A, adapter.B))
    random = [
        (
            torch.linalg.qr(torch.randn(10, R).double()).Q.T,
            torch.linalg.qr(torch.randn(8, R).double()).Q,
        )
        for _ in range(50)
    ]
    assert distance(A, B) < min(distance(*pair) for pair in random)


def peft_model(init: str, model: nn.Module, inputs: Tensor, rho: float = 1.0, **change: Any) -> Any:
    """PEFT's model after its preprocessing on one batch."""
    configs: dict[str, Any] = {
        "eva": {"eva_config": EvaConfig(rho=rho)},
        "corda": {"corda_config": CordaConfig(corda_method="ipm")},
        "lora_ga": {"lora_ga_config": LoraGAConfig(direction="ArB2r", scale="stable")},
    }
    settings = {"r": R, "target_modules": [*SITES], "init_lora_weights": init} | configs[init]
    config = LoraConfig(lora_alpha=6, **{**settings, **change})
    if init == "corda":
        preprocess_corda(model, config, run_model=lambda: model(inputs))
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: loss(model, inputs).backward())
    wrapped = get_peft_model(model, config)
    if init == "eva":
        initialize_lora_eva_weights(
            wrapped,
            [inputs],
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_the_start_is_pefts(init: str):
    """The same subspaces and, of CorDA, the same B A. PEFT's LoRA-GA scales B by singular values,

    and its CorDA the inputs by their largest, where the paper does not: so sizes are not compared.
    """
    (inputs,) = batches(count=1, rows=400)
    theirs = peft_model(init, mlp(), inputs)
    for site, ours in attached(init, mlp(), [inputs]).items():
        layer = theirs.get_submodule(f"base_model.model.{site}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(span(ours.A.T), span(A.T), rtol=0, atol=1e-3)
        if init == "eva":
            assert not ours.B.any()
            assert not B.any()
        else:
            torch.testing.assert_close(span(ours.B), span(B), rtol=0, atol=1e-3)
        if init == "corda":
            torch.testing.assert_close(ours.B @ ours.A, B @ A, rtol=1e-3, atol=1e-4)


class Unlike(nn.Module):
    """Layers with inputs of unlike spectra: `one` and `same` read one, `flat` white noise."""

    def __init__(self):
        super().__init__()
        seeded(2)
        self.one, self.same = nn.Linear(10, 9), nn.Linear(10, 9)
        self.flat, self.last = nn.Linear(14, 9), nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, noise = x[:, :10].contiguous(), x[:, 10:].contiguous()
        return self.last(self.one(x).tanh() * self.same(x) + self.flat(noise) / 9)

    @staticmethod
    def inputs() -> Tensor:
        (x,) = batches(count=1, rows=400)
        noise = torch.randn(400, 14)
        return torch.cat([x, torch.linalg.qr(noise - noise.mean(0)).Q * 20], 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("r", "rho"), [(2, 1.0), (2, 2.0), (1, 3.0), (3, 1.5)])
def test_redistributed_ranks_scales_and_directions_are_pefts(
    r: int, rho: float, caplog: pytest.LogCaptureFixture
):
    x, model = Unlike.inputs(), Unlike()
    sites = ["one", "same", "flat", "last"]
    theirs = peft_model("eva", Unlike(), x, rho, r=r, target_modules=sites)
    layers = {site: theirs.get_submodule(f"base_model.model.{site}") for site in sites}
    layers = {site: layer for site, layer in layers.items() if hasattr(layer, "lora_A")}
    attached_sites = adapters.attach(model, r=r, alpha=6, init="eva", calibration=[x], rho=rho)
    ours = adapters.attached(model)
    ranks = {site: len(layer.lora_A["default"].weight) for site, layer in layers.items()}
    assert {site: adapter.r for site, adapter in ours.items()} == ranks
    assert sum(ranks.values()) == 4 * r
    assert (set(ranks.values()) == {r}) == (rho == 1)
    assert ("'flat' gets no rank by init=eva with rho=" in caplog.text) == ("flat" not in ranks)
    assert ("flat" in ranks) == (rho < 2)
    assert [(site.name, site.recipe) for site in attached_sites] == [
        (name, adapter.recipe) for name, adapter in ours.items()
    ]
    for site, layer in layers.items():
        A = layer.lora_A["default"].weight
        assert ours[site].scale == layer.scaling["default"] == 6 / r
        cosines = (A * ours[site].A).sum(1).abs()
        if site != "flat":  # which has no directions that are larger than others
            torch.testing.assert_close(cosines, torch.ones(len(A)), rtol=0, atol=1e-4)


def test_ranks_are_those_of_the_largest_shares_of_variance():
    """In float64, where ranks and scales differ by site, and another init keeps its rank."""
    x, model = Unlike.inputs().double(), Unlike().double()
    first, last = x[:, :10], model.get_submodule("last")
    seen = []
    hook = last.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model(x)
    hook.remove()

    def shares(inputs: Tensor) -> list[float]:
        values = torch.linalg.svdvals((inputs - inputs.mean(0)).detach()) ** 2
        return (values / values.sum()).tolist()

    # round(1.6 · 3) = 5 of `one`, 2 of `last`, which has r = 1; 4 are taken
    candidates = [(share, "one") for share in shares(first)[:5]]
    candidates += [(share, "last") for share in shares(seen[0])[:2]]
    taken = [site for _, site in sorted(candidates, reverse=True)[:4]]
    targets = {
        "eva": adapters.Target(match=["one", "last"]),
        "other": adapters.Target(match="flat", init="gaussian", r=5),
    }
    how: dict[str, Any] = {"rank_pattern": {"last": 1}, "scaling": "alpha/sqrt(r)"}
    data = [x[:150], x[150:]]
    adapters.attach(model, targets, r=3, alpha=6, init="eva", calibration=data, rho=1.6, **how)
    ours = adapters.attached(model)
    assert {s: a.r for s, a in ours.items()} == {
        "one": taken.count("one"), "flat": 5, "last": taken.count("last")
    }  # fmt: skip
    assert taken.count("last") == 2
    expected = {"one": 6 / 3**0.5, "flat": 6 / 5**0.5, "last": 6.0}
    assert {site: adapter.scale for site, adapter in ours.items()} == pytest.approx(expected)


CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (5, 4, 9)),
    "conv2d": (
        nn.Conv2d(3, 6, 3, dilation=2, padding=2, padding_mode="circular", bias=False),
        (4, 3, 6, 5),
    ),
    "grouped": (nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), (4, 4, 5, 4)),
    "unbatched": (nn.Conv2d(3, 4, 2, bias=False), (3, 6, 6)),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolutions_rows_are_what_its_matrix_is_multiplied_by(name: str):
    """W rows is the layer's output, so that Σ rows rowsᵀ is right."""
    layer, shape = CONVS[name]
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape).double()
    (site,) = adapters.find_sites(nn.Sequential(layer), {"all": adapters.Target()})
    rows = calibration._rows(site, layer, x, None)
    W: Any = layer.weight
    per_group = (W.flatten(1) @ rows.T).T.reshape(*([1] if name == "unbatched" else []), -1, len(W))
    output = layer(x)
    # rows come as (batch, groups, positions): of each group only its own outputs are its rows.
    groups: Any = layer.groups
    batch = output if name != "unbatched" else output[None]
    expected = batch.flatten(2).unflatten(1, (groups, len(W) // groups)).movedim(2, -1)
    ours = per_group.reshape(len(batch), groups, -1, len(W)).unflatten(-1, (groups, -1))
    own = torch.stack([ours[:, g, :, g] for g in range(groups)], 1)
    torch.testing.assert_close(own, expected)


def test_padding_is_not_read():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.fc(x)

    x = torch.randn(4, 5, 6)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 2, 4])[:, None]
    torch.manual_seed(0)
    model = Tokens()
    adapters.attach(model, r=2, init="eva", calibration=[{"x": x, "attention_mask": mask.long()}])
    V = torch.linalg.svd(x[mask] - x[mask].mean(0))[2][:2]
    torch.testing.assert_close(span(the_adapter(model).A.T), span(V.T), rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_the_model_is_left_as_it_was_and_the_groups_do_not_matter(
    init: str, monkeypatch: pytest.MonkeyPatch
):
    model = nn.Sequential(*mlp(), nn.Dropout(0.5), nn.BatchNorm1d(7))
    model[1].eval()
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    inputs, stream = batches(), torch.random.get_rng_state()
    first = {site: a.tensors() for site, a in attached(init, model, inputs).items()}
    assert torch.equal(stream, torch.random.get_rng_state())
    adapters.detach(model)
    for now, was in zip(model.modules(), before.modules(), strict=True):
        assert vars(now).keys() == vars(was).keys()
        assert (now.training, now._forward_pre_hooks) == (was.training, was._forward_pre_hooks)
    for now, was in zip(model.parameters(), before.parameters(), strict=True):
        assert (now.requires_grad, now.grad) == (was.requires_grad, None)
        assert torch.equal(now, was)
    assert all(map(torch.equal, model.buffers(), before.buffers()))
    monkeypatch.setattr(calibration, "MAX_NUMBERS", 1)  # each site in a pass of its own
    for site, adapter in attached(init, model, inputs).items():
        for name, tensor in adapter.tensors().items():
            assert torch.equal(tensor, first[site][name])


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_delta_starts_at_zero_and_the_adapter_goes_to_files_and_to_peft(init: str, tmp_path: Any):
    model, x = mlp(), batches()[0]
    base = model(x)
    attached(init, model, batches())
    torch.testing.assert_close(model(x), base)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn_like(parameter) / 10)
    adapters.save(model, tmp_path / "ours")
    adapters.save_peft(model, tmp_path / "peft")
    for load, folder in ((adapters.load, "ours"), (adapters.load_peft, "peft")):
        other = mlp()
        load(other, tmp_path / folder)
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_lora_ga_of_experts_and_of_weights_that_are_read():
    """Each expert's, and each block's, is that of its own matrix."""

    class TwoExperts(nn.Module):
        num_experts = 2

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 6, 6).double())
            self.attention = nn.MultiheadAttention(6, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x)[0]
            return torch.einsum("nti,eoi->neto", x, self.w)

    seeded(0)
    model, x = TwoExperts(), torch.randn(4, 3, 6).double()
    w, qkv = model.w, model.attention.in_proj_weight
    G, G_qkv = torch.autograd.grad(loss(model, x), [w, qkv])
    data = Calibration([x], loss)
    adapters.attach(model, "all", r=2, init="lora_ga", calibration=data)
    for site, adapter in adapters.attached(model).items():
        A = adapter.A if site == "w" else adapter.A[None]
        gradient = {"w": [*G], "attention.in_proj_weight_k": [G_qkv[6:12]]}.get(site, [])
        for a, g in zip(A, gradient, strict=bool(gradient)):
            torch.testing.assert_close(span(a.T), span(torch.linalg.svd(g)[2][:2].T))


class Partly(nn.Module):
    """A model that uses one of its three layers."""

    def __init__(self):
        super().__init__()
        self.used, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_cannot_start_from_data_is_refused_with_all_its_sites():
    x = [torch.randn(9, 4)]

    def refused(
        model: nn.Module, init: str, data: Any = None, target: Any = "all", **how: Any
    ) -> str:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterError) as error:
            adapters.attach(model, target, **{"r": 1, "init": init, "calibration": data, **how})
        assert model.state_dict().keys() == before.keys()
        return str(error.value)

    assert "init=eva reads data: calibration must have batches" in refused(Partly(), "eva")
    assert "init=corda reads data" in refused(Partly(), "corda", [])
    assert "calibration must have a loss" in refused(Partly(), "lora_ga", x)
    summed = Calibration(x, loss)
    for init in ("eva", "corda", "lora_ga"):
        assert "does not use 'one', 'other' on" in refused(Partly(), init, summed)
    rows = refused(Partly(), "eva", [torch.randn(3, 4)], {"": adapters.Target(match="used")}, r=3)
    assert rows == "'used': init=eva: 3 input rows have no 3 directions; more batches"
    used = {"": adapters.Target(match="used")}
    with_rho = {"rho": 1.5, "r": 2}
    rows = refused(Partly(), "eva", [torch.randn(3, 4)], used, **with_rho)
    assert rows == "'used': init=eva: 3 input rows have no 3 directions; more batches"
    assert "does not use 'one', 'other' on" in refused(Partly(), "eva", summed, **with_rho)
    assert "with init=eva: there is none" in refused(Partly(), "corda", summed, **with_rho)
    for rho in (0.5, torch.inf, True, "2"):
        assert "must be a number of at least 1" in refused(Partly(), "eva", summed, rho=rho)
    for init in ("eva", "corda"):
        assert "not finite" in refused(Partly(), init, [torch.full((9, 4), torch.nan)], used)
    zero = Calibration(x, lambda model, x: (model(x) * 0).sum())
    assert "its gradient is zero" in refused(Partly(), "lora_ga", zero, used)
    table = nn.Sequential(nn.Embedding(5, 4))
    assert "'0' is of kind embedding, it is for linear, conv;" in refused(table, "eva", x)
    assert "'0' is of kind embedding, it is for linear" in refused(table, "lora_ga", summed)
    narrow = refused(Partly(), "lora_ga", summed, used, r=3, over_rank="error")
    assert "r=3 exceeds 1/2 of the rank of 'used' (weight 4 × 4): at most 2" in narrow
    model = Partly()
    adapters.attach(model, used, r=3, init="lora_ga", calibration=summed)
    assert the_adapter(model).r == 2


def test_adapters_that_are_on_the_model_are_off_while_data_is_read():
    model, inputs = mlp(), batches()
    plain = {site: a.A for site, a in attached("eva", copy.deepcopy(model), inputs).items()}
    adapters.attach(model, r=2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_()
    for site, adapter in attached("eva", model, inputs, name="second").items():
        assert torch.equal(adapter.A, plain[site])


def test_the_loss_of_a_batch_may_be_of_inputs_and_targets():
    seeded(0)
    model: Any = nn.Sequential(nn.Linear(6, 4))
    x, y = torch.randn(20, 6), torch.randint(0, 4, (20,))

    def summed(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    (G,) = torch.autograd.grad(summed(model, (x, y)), [model[0].weight])
    halves = [(x[:15], y[:15]), (x[15:], y[15:])]
    adapters.attach(model, r=1, init="lora_ga", calibration=Calibration(halves, summed))
    V = torch.linalg.svd(G)[2][:1]
    torch.testing.assert_close(span(the_adapter(model).A.T), span(V.T), rtol=0, atol=1e-5)
