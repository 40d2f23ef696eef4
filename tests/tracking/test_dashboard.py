"""The dashboard: all panels arrive, and show only keys that runs log.

Truth: what a loopback server receives, against the run's metrics.jsonl and its W&B run.

Run: make test ARGS=tests/tracking/test_dashboard.py
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from wandb_workspaces.workspaces.internal import View

from lora_lab.runs import Run
from lora_lab.tracking import dashboard
from tests.conftest import Lab, command, only_run
from tests.tracking.test_tracking import use_server
from tests.wandb_server import ServedRun, WandbServer

PANELS = {
    "Run History Line Plot": 6,
    "Scatter Plot": 6,
    "Bar Chart": 2,
    "Vega2": 1,
    "Parallel Coordinates Plot": 1,
    "Parameter Importance": 1,
    "Run Comparer": 1,
}


def nodes(spec: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in it, at any depth."""
    if isinstance(spec, dict):
        yield spec
    for child in (
        spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    ):
        yield from nodes(child)


def strings(spec: Any) -> Iterator[str]:
    if isinstance(spec, str):
        yield spec
    for node in nodes(spec):
        for key, value in node.items():
            yield key
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one


def panels(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in nodes(spec) if "viewType" in node]


def of_config(served: ServedRun, path: str) -> Any:
    """W&B's config wraps each top-level key: `adapter.value.r` is adapter.r."""
    first, value, *rest = path.split(".")
    assert value == "value", path
    node = served.config[first]
    for key in rest:
        node = node[key]
    return node


def check_keys(spec: dict[str, Any], run: Run, served: ServedRun) -> None:
    """All that a view names of a run exists: in metrics.jsonl or cost.json, and in W&B."""
    logged = {key for row in run.rows() for key in row}
    logged |= json.loads((run.path / "cost.json").read_text()).keys()
    history = {key for row in served.history for key in row}
    keys = {n for panel in panels(spec) for n in panel["config"].get("metrics", [])}
    keys |= {s.partition(":")[2] for s in strings(spec) if s.startswith("summary:")}
    keys |= {
        panel["config"]["targetKey"] for panel in panels(spec) if "targetKey" in panel["config"]
    }
    keys |= {panel["config"]["xAxis"] for panel in panels(spec) if "Line Plot" in panel["viewType"]}
    assert keys >= {"val/loss", "train/loss", "epoch", "parameters/trainable"}
    for key in keys:
        assert key in logged, key
        assert key in history, key
        assert key in served.summary, key
    settings = {s.partition(":")[2] for s in strings(spec) if s.startswith("config:")}
    grouped = {panel["config"].get("groupBy") for panel in panels(spec)} - {None, "group"}
    assert settings | grouped >= {"adapter.value.r", "adapter.value.alpha", "optimizer.value.lr"}
    for path in settings | grouped:
        assert isinstance(of_config(served, path), int | float), path
    regexes = [p["config"]["metricRegex"] for p in panels(spec) if "metricRegex" in p["config"]]
    assert len(regexes) == 2
    for regex in regexes:
        matching = [key for key in logged if re.search(regex, key)]
        assert {key.split("/")[1] for key in matching} == set(
            json.loads((run.path / "adapter" / "adapter.json").read_text())["sites"]
        )


@pytest.mark.parametrize("experiment", ["shift", "digits"])  # one site, and several
def test_the_saved_views_have_all_panels_of_keys_that_runs_log(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    experiment: str,
):
    with WandbServer() as server:
        use_server(monkeypatch, server)
        assert lab(experiment, "adapter.r=2", tracking="online") == 0
        (served,) = server.runs.values()
        capsys.readouterr()
        assert command(monkeypatch, "dashboard", "lora_lab") == 0
    printed = capsys.readouterr().out.split()
    report, view = server.views
    assert [report["type"], view["type"]] == ["runs", "project-view"]
    assert len(printed) == 2
    assert all(url.startswith(f"{server.url}/tester/lora_lab") for url in printed)
    for saved in (report, view):
        assert (saved["entityName"], saved["projectName"]) == ("tester", "lora_lab")
        spec = json.loads(saved["spec"])
        kinds = [panel["viewType"] for panel in panels(spec)]
        assert {kind: kinds.count(kind) for kind in kinds} == PANELS
        check_keys(spec, only_run(), served)
        for runset in (n for n in nodes(spec) if "grouping" in n):
            assert runset["grouping"] == [{"section": "run", "name": "group"}]
            assert runset["sort"]["keys"][0]["key"] == {"section": "summary", "name": "val/loss"}
    assert served.group == only_run().status["cell"]
    named = [
        section["name"]
        for section in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    ]
    assert named == ["Loss", "Rank", "Cost", "ΔW", "Settings"]
    lines = [p["config"] for p in panels(json.loads(view["spec"])) if "Line Plot" in p["viewType"]]
    assert all((p["groupAgg"], p["groupArea"]) == ("mean", "stddev") for p in lines)


def test_the_truncation_chart_is_that_which_runs_log(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    """As W&B's client asks of the server for the chart that each run logs."""
    charts: dict[str, Any] = {}
    with WandbServer() as server:
        use_server(monkeypatch, server)
        upsert = server._upsert_run

        def upsert_and_keep(**sent: Any) -> dict[str, Any]:
            about = json.loads(sent["config"] or "{}").get("_wandb", {}).get("value", {})
            charts.update(about.get("visualize", {}))
            return upsert(**sent)

        monkeypatch.setattr(server, "_upsert_run", upsert_and_keep)
        assert lab("shift", tracking="online") == 0
        (served,) = server.runs.values()
    logged = charts["truncation/chart"]["panel_config"]
    (ours,) = [
        p["config"] for p in panels(dashboard.workspace("p", "e")._spec) if p["viewType"] == "Vega2"
    ]
    for key in ("panelDefId", "fieldSettings", "stringSettings", "transform"):
        assert ours[key] == logged[key]

    def fields(config: dict[str, Any]) -> dict[str, Any]:
        (query,) = config["userQuery"]["queryFields"]
        return {field["name"]: field.get("args") for field in query["fields"]}

    assert {k: v or None for k, v in fields(ours).items()} == fields(logged)
    assert "truncation/chart_table" in served.summary


def test_without_a_login_it_says_what_it_would_make(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    dashboard.wandb.teardown()
    assert command(monkeypatch, "dashboard", "lora_lab") == 0
    printed = capsys.readouterr().out
    assert "`wandb login`" in printed
    assert len(dashboard.panel_table()) == 2 + sum(PANELS.values())
    for _, panel, shows in dashboard.panel_table()[1:-1]:
        assert f" {panel} " in printed
        assert shows in printed
    assert "spectra_of/all/effective_rank against adapter.r" in printed


@pytest.mark.parametrize("entity", [(), ("--entity", "tester")])
def test_a_dry_run_prints_what_the_librarys_own_model_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], entity: tuple[str, ...]
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    assert command(monkeypatch, "dashboard", "größe", "--dry-run", *entity) == 0
    printed = json.loads(capsys.readouterr().out)
    read = View.model_validate(printed)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == printed
    assert (read.project, read.entity) == ("größe", [*entity, "ENTITY"][-2 if entity else 0])
    kinds = [panel["viewType"] for panel in panels(printed)]
    assert {kind: kinds.count(kind) for kind in kinds} == PANELS


@pytest.mark.slow  # the client asks a missing server again and again
def test_what_cannot_be_made(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert command(monkeypatch, "dashboard", "team/lora_lab") == 2
    assert "lora_lab --entity team" in capsys.readouterr().err
    with WandbServer() as server:
        use_server(monkeypatch, server)
        assert command(monkeypatch, "dashboard", "nothing", "--entity", "tester") == 2
    assert "tester/nothing' not found" in capsys.readouterr().err
    assert not server.views
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    dashboard.wandb.teardown()
    assert command(monkeypatch, "dashboard", "lora_lab") == 1
    assert "W&B cannot be used" in capsys.readouterr().err
