"""Adapters on quantized layers: bitsandbytes' 4 and 8 bits, and torchao's tensors.

The truth is a plain model of dense weights: W is what the quantized layer itself gives for the
identity matrix. And PEFT's own QLoRA, in both directions.

Run: make test ARGS=tests/adapters/test_quantized.py
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lab import adapters
from lora_lab.adapters import AdapterError, Calibration
from lora_lab.adapters.pack import Pack, copy_sharing_weights
from lora_lab.adapters.peft import load_peft, save_peft
from lora_lab.adapters.quantized import dense_weight
from lora_lab.analysis.updates import Updates
from tests.quantized import QUANTIZED, int8, nf4, quantized_libraries, torchao

SITES = ("first", "second", "head")


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    with quantized_libraries():
        yield


class Model(nn.Module):
    """Two quantized layers, and a head that is none."""

    def __init__(self, quantize: Any = lambda layer: layer):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(32, 5)
        self.first, self.second, self.head = (*map(quantize, layers[:2]), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def x(rows: int = 6) -> Tensor:
    return torch.randn(rows, 7, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def dense_copy(model: Model) -> Model:
    """The model with nn.Linear of the weights that its layers multiply by."""
    twin = Model()
    for site in SITES:
        layer, plain = model.get_submodule(site), twin.get_submodule(site)
        plain.bias.copy_(layer.bias)  # pyright: ignore
        plain.weight.copy_((layer(torch.eye(plain.in_features)) - layer.bias).T)  # pyright: ignore
    return twin


def held_bytes(model: nn.Module) -> dict[str, bytes]:
    """All that a state dict holds, of tensors made of others too."""
    parts: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        names = value.__tensor_flatten__()[0] if hasattr(value, "qdata") else [""]
        parts |= {f"{key}.{name}": getattr(value, name) if name else value for name in names}
    return {key: t.reshape(-1).view(torch.uint8).numpy().tobytes() for key, t in parts.items()}


@torch.no_grad()
def trained(model: nn.Module, **settings: Any) -> list[adapters.Site]:
    """Attaches adapters whose tensors are moved, as by training."""
    sites = adapters.attach(model, r=4, alpha=6, **settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sites


@pytest.mark.parametrize(
    "settings", [{}, {"dora": True}, {"init": "pissa"}, {"form": "lokr"}], ids=str
)
@pytest.mark.parametrize("name", QUANTIZED)
def test_outputs_and_gradients_are_those_of_dense_weights(name: str, settings: dict[str, Any]):
    model = Model(QUANTIZED[name])
    plain, before, at_first = dense_copy(model), held_bytes(model), model(x())
    adapters.attach(model, r=4, alpha=6, **settings)
    assert torch.allclose(model(x()), at_first, atol=1e-6)
    adapters.detach(model)
    sites = trained(model, **settings)
    assert [(s.name, s.kind, s.shape) for s in sites] == [
        *(("first", "linear", (96, 64)), ("second", "linear", (32, 96))),
        ("head", "linear", (5, 32)),
    ]
    trained(plain, **settings)
    if "init" in settings:  # the SVD of W in the last digits another: so the same factors
        for site, adapter in adapters.attached(plain).items():
            adapter.fill(
                {k: t.clone() for k, t in adapters.attached(model)[site].tensors().items()}
            )
    inputs = [x().requires_grad_(), x().requires_grad_()]
    outputs = [one(input) for one, input in zip((model, plain), inputs, strict=True)]
    assert torch.allclose(*outputs, atol=3e-6)
    assert (outputs[0] - at_first).abs().max() > 0.05
    for output in outputs:
        output.square().sum().backward()
    gradients = [
        {"x": input.grad} | {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        for one, input in zip((model, plain), inputs, strict=True)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        assert gradient is not None
        assert expected is not None
        atol = 2e-5 * float(expected.abs().max())
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=atol), key
    for site, delta in adapters.deltas(model).items():
        assert torch.allclose(delta, adapters.deltas(plain)[site], atol=1e-6)
    adapters.detach(model)
    assert held_bytes(model) == before
    assert torch.equal(model(x()), at_first)


@pytest.mark.parametrize("name", QUANTIZED)
def test_merged_saved_packed_and_cut(name: str, tmp_path: Path):
    model = Model(QUANTIZED[name])
    plain = dense_copy(model)
    sites = trained(model)
    output, cost = model(x()), adapters.count(model)
    assert cost.frozen == sum(p.numel() for p in plain.parameters())
    packed_bytes = {"nf4": 0.5, "nf4-in-fp16": 0.5, "torchao-int4": 1}.get(name, 1) * 96 * (64 + 32)
    assert packed_bytes <= cost.full_bytes - 4 * (96 + 32 + 33 * 5) <= packed_bytes + 4 * 288
    with pytest.raises(AdapterError, match=r"'first': its weight is quantized.*'second'"):
        adapters.merge(model)
    assert torch.equal(model(x()), output)
    merged = adapters.merged(model)
    assert [type(layer) for layer in merged.children()] == [nn.Linear] * 3
    assert torch.allclose(merged(x()), output, atol=1e-6)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    adapters.save(model, tmp_path)
    other = Model(QUANTIZED[name])
    adapters.load(other, tmp_path)
    assert torch.equal(other(x()), output)
    updates = Updates(model, model.state_dict(), sites)
    for site in SITES:
        W = plain.get_submodule(site).weight
        assert torch.allclose(updates.base_matrix(site), W, atol=1e-6)  # pyright: ignore
    base = Model(QUANTIZED[name])
    with torch.no_grad():
        for adapter in adapters.attached(other).values():
            adapter.B.mul_(1.5)
    outputs = Pack(base, [adapters.attached(model), adapters.attached(other)])(x())
    for one, packed in zip((model, other), outputs, strict=True):
        assert torch.allclose(packed, one(x()), atol=1e-6)
    svds = {site: updates.svd(site) for site in SITES}
    bases = {site: updates.base_matrix(site).clone() for site in SITES}
    with updates.cut_weights(svds) as cut:
        for ranks in ({"first": 1, "second": 3, "head": 2}, {"first": 4, "second": 0, "head": 4}):
            cut(ranks)
            with torch.no_grad():
                for site in SITES:
                    W = bases[site] + svds[site].cut(ranks[site])
                    plain.get_submodule(site).weight.copy_(W)  # pyright: ignore
            assert torch.allclose(model(x()), plain(x()), atol=3e-6)
    assert torch.equal(model(x()), output)


# Not DoRA on 8 bits: with it PEFT 0.21 fails on a CPU in the second call.
@pytest.mark.parametrize(("quantize", "dora"), [(nf4, False), (nf4, True), (int8, False)])
def test_peft_gives_the_same_outputs(quantize: Any, dora: bool, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, bases = Model(quantize), [Model(quantize) for _ in range(3)]
    for base in bases:
        # So transformers marks what it loads, and PEFT knows its layers by it.
        vars(base)[f"is_loaded_in_{4 if quantize is nf4 else 8}bit"] = True
        vars(base)["config"] = {}
    trained(model, dora=dora)
    save_peft(model, tmp_path / "ours")
    loaded: Any = PeftModel.from_pretrained(bases[0], tmp_path / "ours")  # pyright: ignore
    assert type(loaded.base_model.model.first).__module__ == "peft.tuners.lora.bnb"
    # In train mode: in eval mode bitsandbytes' 8 bits quantize the layer's input too.
    assert torch.allclose(loaded.train()(x()), model(x()), atol=1e-6)
    config = LoraConfig(r=4, target_modules=["first", "second"], use_dora=dora)
    theirs: Any = get_peft_model(bases[1], config)  # pyright: ignore
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_B" in key or "magnitude" in key:
                parameter += 0.1 * torch.rand_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    load_peft(bases[2], tmp_path / "theirs")
    assert torch.allclose(theirs(x()), bases[2](x()), atol=1e-6)
    assert not torch.allclose(theirs(x()), Model(quantize)(x()), atol=1e-3)


def test_a_weight_that_is_read_is_the_adapted_one():
    model = Model(QUANTIZED["torchao-int8"])
    plain = dense_copy(model)
    trained(model)
    expected = plain.first.weight + adapters.deltas(model)["first"]
    assert torch.allclose(model.first.weight, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao-int8"])
def test_merged_is_of_one_dtype_after_a_cast(name: str):
    """A cast leaves quantized weights as they are: W then takes the others' dtype."""
    model = Model(QUANTIZED[name]).to(torch.bfloat16)
    trained(model)
    merged = adapters.merged(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.allclose(merged(x().bfloat16()), model(x().bfloat16()), atol=0.05)


@pytest.mark.parametrize(
    ("name", "is_cast"), [("nf4", True), ("int8", False)], ids=["nf4-cast", "int8-autocast"]
)
@pytest.mark.parametrize("also_train", [(), ("bias",)], ids=str)
def test_a_bias_is_not_cast_in_place(
    name: str, is_cast: bool, also_train: tuple[str, ...], tmp_path: Path
):
    """Else the adapter would belong to another base as soon as its model has been called."""

    def make() -> Model:
        model = Model(QUANTIZED[name])
        return model.to(torch.bfloat16) if is_cast else model

    def output(model: Model) -> Tensor:
        inputs = x().bfloat16() if is_cast else x()
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_cast):
            return model(inputs)

    model = make()
    trained(model, also_train=also_train)
    output(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapters.save(model, tmp_path)
    other = make()
    adapters.load(other, tmp_path)
    assert torch.equal(output(other), output(model))
    with pytest.raises(RuntimeError):
        model.first(x()[..., :5].bfloat16())
    held, before = held_bytes(model), held_bytes(make())
    assert {key: value for key, value in held.items() if key in before} == before
    adapters.detach(model)
    assert [*model.first._forward_hooks, *model.first._forward_pre_hooks] == []


def test_models_that_share_8_bits_are_called_in_any_order():
    """As those of a pack's runs, which are copied before the first call."""
    model = Model(int8)
    copies = [copy_sharing_weights(model) for _ in range(2)]
    for one in copies:
        trained(one)
    alone = Model(int8)
    trained(alone)
    for one in copies:
        assert torch.equal(one(x()), alone(x()))
    pack = Pack(model, [adapters.attached(one) for one in copies])
    assert torch.allclose(pack(x()), alone(x()), atol=1e-6)


def test_what_cannot_be_is_refused():
    dynamic = Model(lambda layer: torchao(layer, "Int8DynamicActivationInt8WeightConfig"))
    with pytest.raises(AdapterError, match=r"'first', 'second' cannot be adapted: .* no gradient"):
        adapters.attach(dynamic, r=4)
    for quantize in (nf4, int8, QUANTIZED["torchao-int8"]):
        with pytest.raises(AdapterError, match=r"'first.weight' is quantized, and cannot train"):
            adapters.attach(Model(quantize), r=4, also_train="first")
        calibration = Calibration([x()], lambda model, batch: model(batch).square().sum())
        with pytest.raises(AdapterError, match=r"init=lora_ga: 'first', 'second' is quantized"):
            adapters.attach(Model(quantize), r=2, init="lora_ga", calibration=calibration)


def test_4_bits_are_not_repacked_while_an_adapter_sits_on_them():
    model = Model(nf4)
    layers: list[Any] = [model.first, model.second]
    output = model(x())
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on a CPU with bf16 instructions
    adapters.attach(model, r=4)
    with torch.no_grad():
        assert torch.equal(model.eval()(x()), output)
    assert not any(hasattr(layer.weight.quant_state, "original_dtype") for layer in layers)
    copied = copy.deepcopy(model)
    adapters.detach(copied)
    assert copied.second.support_avx512bf16_for_cpu
    with torch.no_grad(), contextlib.suppress(RuntimeError, NotImplementedError):
        copied.first(torch.ones(2, 64))  # such a CPU's kernel may not be here
    assert copied.first.weight.quant_state.packing_format_for_cpu  # pyright: ignore
    with pytest.raises(AdapterError, match=r"'first' cannot be adapted: a call in eval"):
        adapters.attach(copied, r=4)


def test_dense_weight_is_what_the_layer_multiplies_by():
    for name, quantize in QUANTIZED.items():
        model = Model(quantize)
        before_a_call = dense_weight(model.first)
        W = dense_copy(model).first.weight
        assert torch.allclose(before_a_call, W, atol=1e-6), name
        assert torch.equal(dense_weight(model.first), before_a_call), name
        assert dense_weight(model.head) is model.head.weight


# Not 8 bits: their inputs are rounded, and a last digit moves an output by 0.004.
@pytest.mark.parametrize(
    ("name", "form", "says"),
    [
        ("nf4", "vera", None),
        ("nf4", "loha", "'first': its weight has 4 bits, and PEFT's LOHA takes their shape"),
        ("torchao-int8", "lokr", None),
        ("torchao-int8", "vera", "'first': its weight is torchao's, on which PEFT's VERA raises"),
    ],
)
def test_forms_in_peft(name: str, form: str, says: str | None, tmp_path: Path):
    from peft import PeftModel

    base, model = Model(QUANTIZED[name]), Model(QUANTIZED[name])
    trained(model, form=form)
    if says is not None:
        with pytest.raises(AdapterError, match=says):
            save_peft(model, tmp_path)
        return
    save_peft(model, tmp_path)
    theirs: Any = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.allclose(theirs(x()), model(x()), atol=1e-6)
