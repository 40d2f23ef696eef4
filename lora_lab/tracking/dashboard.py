"""W&B's workspace and report for a rank ablation, as code: the `lora-lab dashboard` command."""

import json
from dataclasses import dataclass
from typing import Any

import wandb
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import interface as wr

from lora_lab.report.cost import FLOPS, MEMORY, SECONDS
from lora_lab.report.tables import Rows

TITLE = "Rank ablation"

LOSS = wr.SummaryMetric("val/loss")
EFFECTIVE_RANK = wr.SummaryMetric("spectra_of/all/effective_rank")
FORGETTING = wr.SummaryMetric("forget/increase")
RANK = wr.Config("adapter.r")

MAX_CELLS = 100
"""How many cells a panel shows, at most; the default of W&B is 10."""

COLUMNS = (
    *("config:adapter.value.r", "config:adapter.value.alpha", "config:optimizer.value.lr"),
    *("summary:val/loss", "summary:merged/val/loss", "summary:parameters/trainable"),
    *("summary:spectra_of/all/effective_rank", "summary:spectra_of/all/numerical_rank"),
    *("summary:advice/loss", f"summary:{FLOPS}", f"summary:{SECONDS}", f"summary:{MEMORY}"),
)
"""Columns of the table of runs, by the keys that W&B gives them."""

# Runs are grouped by cell, which is their Group in W&B: seeds are averaged.
MEAN: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
LINES: dict[str, Any] = {"x": "epoch", "log_y": True, "max_runs_to_show": MAX_CELLS, **MEAN}


@dataclass(frozen=True)
class Section:
    """A section of the workspace and of the report: a question, and the panels that answer it."""

    name: str
    question: str
    panels: list[Any]


def sections() -> list[Section]:
    """All sections, in their order on the page."""
    return [
        Section(
            "Loss",
            "How well does each cell learn? Lines are means over its seeds, bands one standard "
            "deviation.",
            _loss_panels(),
        ),
        Section("Rank", "What does each rank buy, and at what cost?", _rank_panels()),
        Section("Cost", "What does a step take of time and memory?", _cost_panels()),
        Section(
            "ΔW",
            "What does the learned update look like? Where its effective rank stays well below r, "
            "a smaller r may do.",
            _delta_panels(),
        ),
        Section("Settings", "Which settings matter?", _settings_panels()),
    ]


def _loss_panels() -> list[Any]:
    """Losses over epochs, by cell and by r."""
    return [
        wr.LinePlot("validation loss", y=["val/loss"], groupby="Group", **LINES),
        wr.LinePlot("validation loss by r", y=["val/loss"], groupby=RANK, **LINES),
        wr.LinePlot("training loss", y=["train/loss"], groupby="Group", **LINES),
        wr.LinePlot("loss on what the base knew", y=["forget/loss"], groupby="Group", **LINES),
    ]


def _rank_panels() -> list[Any]:
    """The final loss against r and against trainable parameters, and the truncation curves."""
    trainable = wr.SummaryMetric("parameters/trainable")
    log: dict[str, Any] = {"log_x": True, "log_y": True}
    bars: dict[str, Any] = {"groupby": RANK, "max_bars_to_show": MAX_CELLS, **MEAN}
    return [
        wr.ScatterPlot("loss against r", x=RANK, y=LOSS, **log),
        wr.BarPlot("loss by r", ["val/loss"], "v", **bars),
        wr.ScatterPlot("loss against trainable parameters", x=trainable, y=LOSS, **log),
        wr.ScatterPlot("loss against forgetting", x=FORGETTING, y=LOSS),
        _truncation_chart(),
    ]


def _cost_panels() -> list[Any]:
    """The final loss against the FLOPs and the seconds of a step, and the peak memory by r."""
    flops, seconds = wr.SummaryMetric(FLOPS), wr.SummaryMetric(SECONDS)
    bars: dict[str, Any] = {"groupby": RANK, "max_bars_to_show": MAX_CELLS, **MEAN}
    return [
        wr.ScatterPlot("loss against FLOPs a step", x=flops, y=LOSS, log_x=True, log_y=True),
        wr.ScatterPlot("loss against seconds a step", x=seconds, y=LOSS, log_x=True, log_y=True),
        wr.BarPlot("peak memory in training by r", [MEMORY], "v", **bars),
    ]


def _delta_panels() -> list[Any]:
    """The effective rank and the first singular values of ΔW."""
    ranks, values = "^spectra/.*/effective_rank$", "^spectra/.*/sigma_[1-4]$"
    titles = "effective rank of each site's ΔW", "first singular values of each site's ΔW"
    return [
        wr.ScatterPlot("effective rank of ΔW against r", x=RANK, y=EFFECTIVE_RANK),
        wr.LinePlot(titles[0], metric_regex=ranks, groupby="Group", **{**LINES, "log_y": False}),
        wr.LinePlot(titles[1], metric_regex=values, groupby="Group", **LINES),
    ]


def _settings_panels() -> list[Any]:
    """The loss over all settings at once, their importance, and the settings that differ."""
    settings = (RANK, wr.Config("adapter.alpha"), wr.Config("optimizer.lr"), LOSS)
    columns = [wr.ParallelCoordinatesPlotColumn(metric=key, log=True) for key in settings]
    return [
        wr.ParallelCoordinatesPlot(columns, "settings and loss"),
        wr.ParameterImportancePlot("val/loss"),
        wr.RunComparer("split"),
    ]


def _truncation_chart() -> wr.CustomChart:
    """The lines that each run has logged as `truncation/chart`, for all runs shown together."""
    run_fields = dict.fromkeys(("id", "name", "_defaultColorIndex"))
    return wr.CustomChart(
        {**run_fields, "summaryTable": {"tableKey": "truncation/chart_table"}},
        "wandb/lineseries/v0",
        {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        {"title": "validation loss with ΔW cut to rank k", "xname": "k"},
    )


def workspace(project: str, entity: str) -> ws.Workspace:
    """The saved view: our sections on top, open, and below them W&B's automatic panels."""
    order = [expr.Ordering(expr.Summary("val/loss"), ascending=True)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=section.name, panels=section.panels, is_open=True, pinned=True)
            for section in sections()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=MAX_CELLS),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric("Group")], order=order, pinned_columns=list(COLUMNS)
        ),
        auto_generate_panels=True,
    )


def report(project: str, entity: str) -> wr.Report:
    """The report: heading, question and panels of each section, and last the table of runs."""
    blocks: list[Any] = [wr.TableOfContents()]
    order, columns = [wr.OrderBy(LOSS, ascending=True)], ["run:displayName", *COLUMNS]
    for section in sections():
        runs = wr.Runset(
            entity, project, "cells", groupby=["Group"], order=order, pinned_columns=columns
        )
        is_last = section.name == "Settings"
        grid = wr.PanelGrid(runsets=[runs], panels=section.panels, hide_run_sets=not is_last)
        blocks += [wr.H2(section.name), wr.P(section.question), grid]
    description = "Runs of lora_lab, grouped by cell: mean and standard deviation over seeds."
    return wr.Report(project, entity, TITLE, description, blocks, "fluid")


def workspace_json(project: str, entity: str | None) -> str:
    """The workspace as JSON, as it would be saved. No server is asked and no login is needed.

    The report has the same panels; its JSON needs the server, which knows a project by a number.
    `entity` None: only the server knows whose default that is, and ENTITY stands for it.
    """
    view = workspace(project, entity or "ENTITY")._to_model()
    return json.dumps(view.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2)


def panel_table() -> Rows:
    """A table of all panels, its head first: section, title, and the metrics that it shows."""
    rows: Rows = [["section", "panel", "shows"]]
    for section in sections():
        rows += [[section.name, *_title_and_metrics(panel)] for panel in section.panels]
    columns = [column.partition(":")[2].replace(".value", "") for column in COLUMNS]
    return [*rows, ["Table", "cells", ", ".join(columns)]]


def _title_and_metrics(panel: Any) -> list[str]:
    match panel:
        case wr.LinePlot():
            y = panel.metric_regex or ", ".join(map(_name, panel.y))
            return [str(panel.title), f"{y} against {_name(panel.x)}, by {_name(panel.groupby)}"]
        case wr.ScatterPlot():
            return [str(panel.title), f"{_name(panel.y)} against {_name(panel.x)}"]
        case wr.BarPlot():
            metrics = ", ".join(map(_name, panel.metrics))
            return [str(panel.title), f"{metrics} by {_name(panel.groupby)}"]
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
    """Whether W&B's client has a login for its server. The user is not asked for one."""
    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


class DashboardError(RuntimeError):
    """W&B's server cannot be used, or refused."""


def save_report_and_workspace(project: str, entity: str | None) -> list[str]:
    """Saves a new report and a new workspace on W&B's server and returns their two URLs.

    `entity` None: the default of the login. Raises ValueError where the project does not exist or
    no entity is known, DashboardError where the server cannot be used.
    """
    try:
        owner = entity or wandb.Api().default_entity
        if not owner:
            raise ValueError("--entity: must be given, the login has no default")
        return [report(project, owner).save().url, workspace(project, owner).save().url]
    except wandb.Error as error:
        raise DashboardError(f"W&B cannot be used: {error}") from error
