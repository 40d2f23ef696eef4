"""The `lora-lab dashboard` command: W&B's workspace and report for a rank ablation, as code."""

from typing import Any

import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import interface as wr

from lora_lab.report.tables import Rows

TITLE = "Rank ablation"

LOSS = wr.SummaryMetric("val/loss")
EFFECTIVE_RANK = wr.SummaryMetric("spectra_of/all/effective_rank")
R = wr.Config("adapter.r")

RUNS = 100
"""Cells that a panel shows at most; W&B's own limit is 10."""

COLUMNS = (
    "config:adapter.value.r",
    "config:adapter.value.alpha",
    "config:optimizer.value.lr",
    "summary:val/loss",
    "summary:merged/val/loss",
    "summary:parameters/trainable",
    "summary:spectra_of/all/effective_rank",
    "summary:spectra_of/all/numerical_rank",
    "summary:advice/loss",
)
"""Of the table of runs, in W&B's words for them."""


def sections() -> dict[str, tuple[str, list[Any]]]:
    """Section → what it asks, and its panels. Runs are grouped by cell: seeds are averaged."""
    mean: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    over: dict[str, Any] = {"x": "epoch", "log_y": True, "max_runs_to_show": RUNS, **mean}
    settings = (R, wr.Config("adapter.alpha"), wr.Config("optimizer.lr"), LOSS)
    columns = [wr.ParallelCoordinatesPlotColumn(metric=key, log=True) for key in settings]
    return {
        "Loss": (
            "How well does each cell learn? Lines are means over its seeds, bands one standard "
            "deviation.",
            [
                wr.LinePlot("validation loss", y=["val/loss"], groupby="Group", **over),
                wr.LinePlot("validation loss by r", y=["val/loss"], groupby=R, **over),
                wr.LinePlot("training loss", y=["train/loss"], groupby="Group", **over),
            ],
        ),
        "Rank": (
            "What does each rank buy, and at what cost?",
            [
                wr.ScatterPlot("loss against r", x=R, y=LOSS, log_x=True, log_y=True),
                wr.BarPlot(
                    "loss by r", ["val/loss"], "v", groupby=R, max_bars_to_show=RUNS, **mean
                ),
                wr.ScatterPlot(
                    "loss against trainable parameters",
                    x=wr.SummaryMetric("parameters/trainable"),
                    y=LOSS,
                    log_x=True,
                    log_y=True,
                ),
                _truncation(),
            ],
        ),
        "ΔW": (
            "What does the learned update look like? Where its effective rank stays well below r, "
            "a smaller r may do.",
            [
                wr.ScatterPlot("effective rank of ΔW against r", x=R, y=EFFECTIVE_RANK),
                wr.LinePlot(
                    "effective rank of each site's ΔW",
                    metric_regex="^spectra/.*/effective_rank$",
                    groupby="Group",
                    **{**over, "log_y": False},
                ),
                wr.LinePlot(
                    "first singular values of each site's ΔW",
                    metric_regex="^spectra/.*/sigma_[1-4]$",
                    groupby="Group",
                    **over,
                ),
            ],
        ),
        "Settings": (
            "Which settings matter?",
            [
                wr.ParallelCoordinatesPlot(columns, "settings and loss"),
                wr.ParameterImportancePlot("val/loss"),
                wr.RunComparer("split"),
            ],
        ),
    }


def _truncation() -> wr.CustomChart:
    """The chart that every run has under `truncation/chart`, of all that are shown."""
    of_each_run = dict.fromkeys(("id", "name", "_defaultColorIndex"))
    return wr.CustomChart(
        {**of_each_run, "summaryTable": {"tableKey": "truncation/chart_table"}},
        "wandb/lineseries/v0",
        {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        {"title": "validation loss with ΔW cut to rank k", "xname": "k"},
    )


def workspace(project: str, entity: str) -> ws.Workspace:
    """The saved view: our sections open on top, below them W&B's own of all that is logged."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True, pinned=True)
            for name, (_, panels) in sections().items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=RUNS),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric("Group")],
            order=[expr.Ordering(expr.Summary("val/loss"), ascending=True)],
            pinned_columns=list(COLUMNS),
        ),
        auto_generate_panels=True,
    )


def report(project: str, entity: str) -> wr.Report:
    """The report: a heading, a question and the panels of every section; last the table of runs."""
    blocks: list[Any] = [wr.TableOfContents()]
    for name, (question, panels) in sections().items():
        runs = wr.Runset(
            entity=entity,
            project=project,
            name="cells",
            groupby=["Group"],
            order=[wr.OrderBy(LOSS, ascending=True)],
            pinned_columns=["run:displayName", *COLUMNS],
        )
        last = name == "Settings"
        grid = wr.PanelGrid(runsets=[runs], panels=panels, hide_run_sets=not last)
        blocks += [wr.H2(name), wr.P(question), grid]
    description = "Runs of lora_lab, grouped by cell: mean and standard deviation over seeds."
    return wr.Report(project, entity, TITLE, description, blocks, "fluid")


def panel_table() -> Rows:
    """Section, panel and what this shows of the runs, a row for each panel."""
    rows: Rows = [["section", "panel", "shows"]]
    for name, (_, panels) in sections().items():
        rows += [[name, *_described(panel)] for panel in panels]
    columns = [column.partition(":")[2].replace(".value", "") for column in COLUMNS]
    return [*rows, ["Table", "cells", ", ".join(columns)]]


def _described(panel: Any) -> list[str]:
    match panel:
        case wr.LinePlot():
            what = panel.metric_regex or ", ".join(map(_name, panel.y))
            return [str(panel.title), f"{what} against {_name(panel.x)}, by {_name(panel.groupby)}"]
        case wr.ScatterPlot():
            return [str(panel.title), f"{_name(panel.y)} against {_name(panel.x)}"]
        case wr.BarPlot():
            return [
                str(panel.title),
                f"{', '.join(map(_name, panel.metrics))} by {_name(panel.groupby)}",
            ]
        case wr.CustomChart():
            return [panel.chart_strings["title"], panel.query["summaryTable"]["tableKey"]]
        case wr.ParallelCoordinatesPlot():
            return [str(panel.title), ", ".join(_name(column.metric) for column in panel.columns)]
        case wr.ParameterImportancePlot():
            return ["parameter importance", f"every setting, for {panel.with_respect_to}"]
    return ["run comparer", "settings that differ"]


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key.name


def has_login() -> bool:
    """Whether W&B's client has a login for its server; it is not asked for."""
    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


class DashboardError(RuntimeError):
    """W&B's server could not be used."""


def save_report_and_workspace(project: str, entity: str | None) -> list[str]:
    """Makes both, new ones each time, and gives their addresses.

    Raises ValueError where the project is not there, DashboardError where the server cannot be
    used.
    """
    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise ValueError("--entity: must be given, the login has no default")
        return [report(project, owner).save().url, workspace(project, owner).save().url]
    except wandb.Error as error:
        raise DashboardError(f"W&B cannot be used: {error}") from error
