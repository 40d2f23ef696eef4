"""The analysis of a trained ΔW: truncation curves, advice, comparison with the base, `analyze`.

Truth: plain loops with numpy's SVD over the weights read from the run's files.

Run: make test ARGS=tests/analysis/test_analysis.py
"""

import csv
import json
import shlex
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file

from lora_lab import adapters
from lora_lab.analysis.advice import Advice, advise
from lora_lab.analysis.directions import is_intruder
from lora_lab.analysis.spectra import svd_of_factors, svd_of_matrix
from lora_lab.analysis.truncation import Curve, Truncation, ranks_to_measure
from lora_lab.data.digits import Digits
from lora_lab.models.mlp import MLP
from lora_lab.report.run_tables import run_tables
from lora_lab.runs import Run, find_runs
from tests.conftest import Lab, command, only_run


def trained(run: Run) -> tuple[MLP, MLP, dict[str, torch.Tensor]]:
    """The base, the adapted model and ΔW of each site, from the run's files."""
    base, adapted = MLP(64, 10, [16]), MLP(64, 10, [16])
    (path,) = Path("bases").glob("*.safetensors")
    base.load_state_dict(load_file(path))
    adapted.load_state_dict(load_file(path))
    adapters.load(adapted, run.path / "adapter")
    return base, adapted, {s: d.detach().double() for s, d in adapters.deltas(adapted).items()}


def loss(model: torch.nn.Module) -> float:
    data = Digits("adapt", batch_size=64, seed=0)
    data.setup("fit")
    assert data.val is not None
    x, y = data.val.tensors
    return F.cross_entropy(model(x), y).item()


def cut_by_hand(base: MLP, deltas: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    model = MLP(64, 10, [16])
    state = {key: value.clone() for key, value in base.state_dict().items()}
    for site, delta in deltas.items():
        U, S, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
        k = ranks[site]
        state[f"{site}.weight"] += torch.from_numpy((U[:, :k] * S[:k]) @ Vh[:k]).float()
    model.load_state_dict(state)
    return loss(model)


@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa"])
def test_the_truncation_curve_is_that_of_a_plain_loop(lab: Lab, adapter: str):
    assert lab("digits", f"adapter={adapter}", "adapter.r=3") == 0
    run = only_run()
    base, _, deltas = trained(run)
    with np.load(run.path / "spectra.npz") as arrays:
        ranks = arrays["truncation/ranks"].tolist()
        for k, value in zip(ranks, arrays["truncation/loss"], strict=True):
            by_hand = cut_by_hand(base, deltas, dict.fromkeys(deltas, int(k)))
            assert value == pytest.approx(by_hand, rel=1e-5)
        for site in deltas:
            curve = arrays[f"{site}/truncation/ranks"], arrays[f"{site}/truncation/loss"]
            for k, value in zip(*curve, strict=True):
                by_hand = cut_by_hand(base, deltas, {**dict.fromkeys(deltas, 99), site: int(k)})
                assert value == pytest.approx(by_hand, rel=1e-5)
        assert "one rank after another" not in (run.path / "log.txt").read_text()
        assert ranks[0] == 0
        assert arrays["truncation/loss"][0] == pytest.approx(run.curve("val/loss")[0], rel=1e-5)
        assert arrays["truncation/loss"][-1] == pytest.approx(run.last("val/loss"), rel=1e-5)


def test_a_cut_leaves_what_trained_in_full(lab: Lab):
    assert lab("digits", "adapter.r=3", "also_train=[bias]") == 0
    run = only_run()
    _, adapted, deltas = trained(run)
    in_full = {key: p.value for key, p in adapters.also_trained(adapted).items()}
    assert set(in_full) == {"body.fc1.bias", "head.bias"}
    with np.load(run.path / "spectra.npz") as arrays:
        curve = dict(zip(arrays["truncation/ranks"], arrays["truncation/loss"], strict=True))
    assert "one rank after another" not in (run.path / "log.txt").read_text()
    base = MLP(64, 10, [16])
    base.load_state_dict({**adapters.base_state_dict(adapted), **in_full})
    for k, value in curve.items():
        by_hand = cut_by_hand(base, deltas, dict.fromkeys(deltas, int(k)))
        assert value == pytest.approx(by_hand, rel=1e-5)
    assert curve[max(curve)] == pytest.approx(run.last("val/loss"), rel=1e-5)


def test_the_advised_ranks_keep_their_share_and_train(lab: Lab):
    assert lab("digits", "adapter.r=4", "spectra.keep=0.9", "trainer.max_epochs=6") == 0
    run = only_run()
    advice = yaml.safe_load((run.path / "advice.yaml").read_text())
    base, _, deltas = trained(run)
    ranks = advice["adapter"]["rank_pattern"]
    assert set(ranks) == set(deltas), "all sites are named, so that no r of a target comes before"
    assert advice["adapter"]["r"] == max(ranks.values())
    without, *_, uncut = run.curve("val/loss").values()
    kept_share = (without - cut_by_hand(base, deltas, ranks)) / (without - uncut)
    assert kept_share >= advice["keep"] == 0.9
    assert advice["share"] == pytest.approx(kept_share, rel=1e-4)
    assert run.last("advice/share") == pytest.approx(kept_share, rel=1e-4)
    assert min(ranks.values()) < 4, "a share of the gain costs less than all ranks"
    settings = ("target.linear.r=3", "+trainer.limit_train_batches=1")
    assert lab("digits", *settings, *overrides(run)) == 0
    (other,) = [other for other in find_runs(Path("runs")) if other.path != run.path]
    tensors = load_file(other.path / "adapter" / "adapter.safetensors")
    assert {key[:-2]: A.shape[0] for key, A in tensors.items() if key.endswith(".A")} == ranks


def overrides(run: Run) -> list[str]:
    """The advice as advice.yaml gives it for the command line."""
    line = (run.path / "advice.yaml").read_text().splitlines()[2]
    return shlex.split(line.removeprefix("#"))


@pytest.mark.parametrize("name", ["0", "1.10", "p[0]", "k-1:z", "a,b", "x*", "body.fc1", "null"])
def test_advice_names_its_site_alone_whatever_the_site_is_called(name: str):
    advice = Advice({name: 2, "other": 3}, 1.0, 1.0, 2.0, 0.99)
    adapter = yaml.safe_load(advice.text())["adapter"]
    parser = OverridesParser.create()
    pattern: Any = parser.parse_override(shlex.split(advice.overrides)[1]).value()
    for globs in (adapter["rank_pattern"], {str(key): k for key, k in pattern.items()}):
        assert [k for glob, k in globs.items() if fnmatchcase(name, glob)] == [2], globs
        assert len(globs) == 2


def test_advice_halves_the_loss_a_site_may_cost_until_all_together_are_within():
    curve = Curve([0, 1, 2, 3], [10.0, 1.05, 1.02, 1.0])
    sites, model = {"a": curve, "b": curve}, Curve([0, 1, 2, 3], [10.0, 1.3, 1.1, 1.0])

    def loss_of(ranks: Mapping[str, int]) -> float:
        return sum(curve.losses[k] for k in ranks.values()) - 1.0 + 0.05 * (min(ranks.values()) < 2)

    advice = advise(Truncation(model, sites, loss_of), 0.99)  # 9 won: 0.09 may be lost
    assert advice is not None
    assert advice.ranks == {"a": 2, "b": 2}
    assert advice.share == pytest.approx((10 - 1.04) / 9)
    assert advise(Truncation(Curve([0, 3], [1.0, 1.0]), sites, loss_of), 0.99) is None, (
        "nothing was won"
    )
    # What may be lost is met exactly, at rank 0: an adapter has at least rank 1.
    flat = Curve([0, 1, 2], [1.25, 1.25, 1.0])
    all_at_once = Curve([0, 2], [1.25, 1.0])
    least = advise(Truncation(all_at_once, {"a": flat}, lambda ranks: flat.losses[ranks["a"]]), 0.0)
    assert least is not None
    assert least.ranks == {"a": 1}
    # Where not even a 2048th of the loss a site may cost will do together, nothing is cut.
    hopeless = advise(Truncation(model, sites, lambda ranks: 5.0), 0.99)
    assert hopeless is not None
    assert (hopeless.ranks, hopeless.share) == ({"a": 3, "b": 3}, 1.0)


def test_curves_are_measured_at_every_low_rank_and_sparser_above():
    assert ranks_to_measure(4) == [0, 1, 2, 3, 4]
    assert ranks_to_measure(20) == [*range(21)]
    assert ranks_to_measure(300) == [*range(33), 45, 64, 91, 128, 181, 256, 300]
    assert ranks_to_measure(1000)[-1] == 1000
    assert len(ranks_to_measure(1000)) < 50


def test_comparison_with_the_base_is_that_of_numpy(lab: Lab):
    assert lab("digits", "adapter.r=2", "trainer.max_epochs=8", "optimizer.lr=0.05") == 0
    run = only_run()
    base, _, deltas = trained(run)
    for site, delta in deltas.items():
        W = base.get_parameter(f"{site}.weight").detach().double().numpy()
        U, S, Vh = np.linalg.svd(delta.numpy())
        inside = np.linalg.norm(U[:, :2].T @ W @ Vh[:2].T)
        assert run.last(f"spectra/{site}/projection") == pytest.approx(inside, rel=1e-5)
        amplified = np.linalg.norm(S[:2]) / inside
        assert run.last(f"spectra/{site}/amplification") == pytest.approx(amplified, rel=1e-5)
        assert run.last(f"spectra/{site}/directions") == 2
        U0 = np.linalg.svd(W, full_matrices=False)[0]
        U1 = np.linalg.svd(W + delta.numpy(), full_matrices=False)[0][:, :10]
        new = (np.abs(U0.T @ U1).max(0) < 0.5).sum()
        assert run.last(f"spectra/{site}/intruders") == new
        assert run.last(f"spectra/{site}/intruders_among") == 10
        with np.load(run.path / "spectra.npz") as arrays:
            phi = arrays[f"{site}/phi_base"]
        for i, j in ((1, 1), (2, 1), (1, 5), (2, 9)):
            expected = np.linalg.norm(U[:, :i].T @ U0[:, :j]) ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(expected, abs=1e-5)
    stored = list(Path("bases/svd").iterdir())
    assert len(stored) == len(deltas)
    dates = [path.stat().st_mtime_ns for path in stored]
    assert lab("digits", "adapter.r=1") == 0
    assert [path.stat().st_mtime_ns for path in stored] == dates, "a base's SVD is computed once"


def test_what_is_not_asked_for_is_not_done(lab: Lab):
    assert lab("digits", "spectra.truncation=none", "spectra.against_base=false") == 0
    run = only_run()
    with np.load(run.path / "spectra.npz") as arrays:
        assert not any("truncation" in key or "phi" in key for key in arrays.files)
    assert not (run.path / "advice.yaml").exists()
    assert not Path("bases/svd").exists()
    assert run.last("spectra/head/intruders") is None


@pytest.mark.parametrize(("every", "epochs"), [(3, [0, 0.375, 0.75]), (8, [0, 1, 2, 3, 4])])
def test_spectra_are_measured_by_steps_too(lab: Lab, every: int, epochs: list[float]):
    assert lab("shift", f"spectra.every_n_steps={every}") == 0
    with np.load(only_run().path / "spectra.npz") as arrays:
        measured = arrays["epochs"].tolist()
        assert len(arrays["linear/singular_values"]) == len(measured)
    assert measured[: len(epochs)] == epochs
    assert measured == sorted(set(measured))
    assert {2, 4} <= set(measured)


@pytest.mark.slow
def test_a_run_that_changed_nothing_is_analyzed_all_the_same(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    assert lab("digits", "optimizer=sgd", "optimizer.lr=1e-30", "trainer.max_epochs=1") == 0
    run = only_run()
    assert run.last("spectra/head/amplification") == pytest.approx(0, abs=1e-20)
    assert not (run.path / "advice.yaml").exists()
    assert lab("digits", "optimizer=sgd", "optimizer.lr=1e-30", "trainer.max_epochs=2") == 0
    paths = [str(run.path) for run in find_runs(Path("runs"))]
    assert command(monkeypatch, "report", *paths[:1]) == 0
    assert command(monkeypatch, "analyze", *paths) == 0


def test_the_base_must_be_the_file_it_was(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save_file(MLP(64, 10, [16]).state_dict(), "base.safetensors")
    assert lab("digits", "base=checkpoint", "base.path=base.safetensors", "adapter=full") == 0
    torch.manual_seed(1)
    save_file(MLP(64, 10, [16]).state_dict(), "base.safetensors")
    assert command(monkeypatch, "analyze", str(only_run().path)) == 2
    assert "is not the file that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "adapter"),
    [
        ("bf16-true", "lora"),
        pytest.param("64-true", "full", marks=pytest.mark.slow),
        pytest.param("64-true", "lora", marks=pytest.mark.slow),
        pytest.param("bf16-true", "full", marks=pytest.mark.slow),
    ],
)
def test_other_precisions_start_at_no_update_and_are_analyzed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, precision: str, adapter: str
):
    save_file(MLP(64, 10, [16]).state_dict(), "base.safetensors")
    base = ("base=checkpoint", "base.path=base.safetensors", f"adapter={adapter}")
    assert lab("digits", *base, f"trainer.precision={precision}") == 0
    run = only_run()
    assert run.curve("spectra/head/sigma_1")[0] == 0
    assert run.curve("spectra/head/sigma_1")[2] > 0
    assert command(monkeypatch, "analyze", str(run.path)) == 0


def test_directions_of_rounding_do_not_count():
    W = torch.zeros(12, 16, dtype=torch.float64)
    assert len(svd_of_matrix(W).above_rounding().S) == 0
    torch.manual_seed(0)
    delta = svd_of_factors(torch.randn(4, 16), torch.randn(12, 4))
    after = svd_of_matrix(W + delta.cut(4)).above_rounding()
    assert is_intruder(svd_of_matrix(W).above_rounding().U, after.U).sum() == 4
    W[0, 0] = 1.0
    assert len(svd_of_matrix(W).above_rounding().S) == 1


def test_several_sites_are_measured_as_one_too(lab: Lab):
    assert lab("digits") == 0
    run = only_run()
    with np.load(run.path / "spectra.npz") as arrays:
        sigma = [arrays[f"{site}/singular_values"][-1] for site in ("body.fc1", "head")]
    norm = np.linalg.norm(np.concatenate(sigma))
    for group in ("all", "kind/linear"):
        assert run.last(f"spectra_of/{group}/frobenius") == pytest.approx(norm)
    assert run.last("spectra_of/depth/0/frobenius") is None


def test_one_site_is_all_sites(lab: Lab):
    assert lab("shift", "adapter.r=2") == 0
    run = only_run()
    measures = {k.rpartition("/")[2] for row in run.rows() for k in row if k.startswith("spectra_")}
    assert measures >= {"effective_rank", "sigma_1", "frobenius"}
    for measure in measures:
        of_all = run.curve(f"spectra_of/all/{measure}")
        assert of_all == run.curve(f"spectra/linear/{measure}")
        assert list(of_all) == [0, 2, 4]
    assert run.last("spectra_of/kind/linear/frobenius") is None


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_analyze_repeats_the_analysis_of_the_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: str
):
    assert lab("digits", f"adapter={adapter}") == 0
    run = only_run()
    with np.load(run.path / "spectra.npz") as arrays:
        before = dict(arrays)
    run.replace_files({"advice.yaml": None})
    assert command(monkeypatch, "analyze", str(run.path)) == 0
    with np.load(run.path / "spectra.npz") as arrays:
        assert set(arrays.files) == set(before)
        for key, value in before.items():
            np.testing.assert_allclose(arrays[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    capsys.readouterr()
    for keep in (0.5, 1.0):
        assert command(monkeypatch, "analyze", str(run.path), f"--keep={keep}") == 0
        shown = " ".join(capsys.readouterr().out.split())
        advice = yaml.safe_load((run.path / "advice.yaml").read_text())
        assert advice["keep"] == keep
        assert advice["share"] >= keep
        assert run.last("advice/share") == advice["share"]
        gain = f"≥ {100 * keep:.4g}% of the gain ({advice['share']:.1%})"
        assert f"ranks that keep {gain}" in shown
        assert f"adapter.r={advice['adapter']['r']} " in shown
    assert advice["share"] >= 0.999, "a loss cut at all ranks is the loss"
    for wrong in ("--keep=0", "--keep=nan", "--keep=1.5"):
        assert command(monkeypatch, "analyze", str(run.path), wrong) == 2
        assert "must be more than 0 and at most 1" in capsys.readouterr().err
    assert command(monkeypatch, "analyze", str(run.path), "--truncation=none") == 0
    assert not (run.path / "advice.yaml").exists()
    assert "ranks that keep" not in (run.path / "report" / "table.md").read_text()
    next(Path("bases").glob("*.safetensors")).unlink()
    assert command(monkeypatch, "analyze", str(run.path)) == 2
    assert "the base that" in capsys.readouterr().err


def test_analyze_compares_runs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert lab("digits", "adapter.r=3") == 0
    assert lab("digits", "adapter.r=2", "seed=1") == 0
    runs = find_runs(Path("runs"))
    assert command(monkeypatch, "analyze", *(str(run.path) for run in runs), "--to=compared") == 0
    assert "run 1, run 2" in capsys.readouterr().out
    with np.load("compared/phi.npz") as arrays:
        assert len(arrays.files) == 2 * 3
        _, _, one = trained(runs[0])
        _, _, other = trained(runs[1])
        V = [np.linalg.svd(deltas["head"].numpy())[2].T for deltas in (one, other)]
        phi = arrays[f"{runs[0].path}|{runs[1].path}|head|input"]
        i, j = phi.shape
        expected = np.linalg.norm(V[0][:, :i].T @ V[1][:, :j]) ** 2 / min(i, j)
        assert phi[-1, -1] == pytest.approx(expected, abs=1e-5)
        with open("compared/pairs.csv") as file:
            rows = list(csv.DictReader(file))
        row = next(r for r in rows if (r["site"], r["side"]) == ("head", "input"))
        overlap = np.linalg.svd(V[0][:, :2].T @ V[1][:, :2])[1].clip(max=1)
        distance = np.linalg.norm(np.arccos(overlap))
        assert float(row["distance"]) == pytest.approx(distance, abs=1e-4)
        assert float(row["random"]) == pytest.approx(3 / 16, abs=1e-4)
    assert command(monkeypatch, "analyze", str(runs[0].path), str(runs[0].path)) == 2
    assert "compared with itself" in capsys.readouterr().err
    assert {path.name for path in Path("compared").glob("*.png")} == {
        *("phi_A.png", "phi_input.png", "phi_output.png")
    }
    assert lab("shift") == 0
    shift = next(run for run in find_runs(Path("runs/shift")))
    assert command(monkeypatch, "analyze", str(shift.path), str(runs[0].path)) == 2
    assert "share no site" in capsys.readouterr().err


def test_each_expert_is_measured_and_their_mean_is_reported(lab: Lab):
    model = "model._target_=tests.all_layer_kinds.AllLayerKinds"
    settings = ("target=[experts,linear]", "adapter.r=2", "spectra.truncation=sites")
    assert lab("shift", model, *settings, "spectra.against_base=true", "trainer.max_epochs=2") == 0
    run, site = only_run(), "experts.up_proj"
    stored = load_file(run.path / "adapter" / "adapter.safetensors")
    about = json.loads((run.path / "adapter" / "adapter.json").read_text())["sites"][site]
    deltas = about["scale"] * (stored[f"{site}.B"] @ stored[f"{site}.A"]).numpy()  # (2, 8, 8)
    with np.load(run.path / "spectra.npz") as arrays:
        assert arrays["experts"].tolist() == [site]
        assert f"{site}/S" not in arrays
        for expert, delta in enumerate(deltas):
            S = np.linalg.svd(delta, compute_uv=False)
            name = f"{site}.{expert}"
            np.testing.assert_allclose(arrays[f"{name}/S"], S[:2], rtol=1e-4)
            np.testing.assert_allclose(arrays[f"{name}/singular_values"][-1], S[:2], rtol=1e-4)
            np.testing.assert_allclose(arrays[f"{name}/delta"], delta, rtol=1e-4, atol=1e-7)
            product = arrays[f"{name}/U"] * S[:2] @ arrays[f"{name}/Vh"]
            np.testing.assert_allclose(product, delta, rtol=1e-3, atol=1e-5)
        curve = arrays[f"{site}/truncation/loss"]
        assert curve[-1] == pytest.approx(run.last("val/loss"), rel=1e-5)
        assert curve[0] != pytest.approx(curve[-1], rel=1e-5)
    norms = [np.linalg.norm(delta) for delta in deltas]
    assert run.last(f"spectra/{site}/frobenius") == pytest.approx(np.mean(norms), rel=1e-4)
    energy = run.last("spectra_of/kind/experts/frobenius")
    assert energy == pytest.approx(np.linalg.norm(norms), rel=1e-4)
    assert run.last(f"spectra/{site}/amplification") is not None
    assert run.last(f"spectra/{site}.0/frobenius") is None
    facts = dict(run_tables(run)["facts"][1:])
    assert f"ΔW of {site} (mean of 2 experts): effective rank" in facts
    advice = yaml.safe_load((run.path / "advice.yaml").read_text())
    assert set(advice["adapter"]["rank_pattern"]) == {site, "fc", "head"}
