"""The tables of one run's report: its curves by epoch, facts about it, and theory's predictions."""

from collections import Counter
from typing import Any

import yaml

from lora_lab.report.cost import run_cost_table
from lora_lab.report.epochs import OPTIMISTIC, At, best_values, epoch_text
from lora_lab.report.matrices import (
    experts_of_run,
    means_by_site,
    singular_values_by_matrix,
    site_of,
)
from lora_lab.report.plotting import MAX_PANELS
from lora_lab.report.run_figures import largest_updates
from lora_lab.report.tables import Rows, format_number, format_unit
from lora_lab.report.theory import CHECK_COLUMNS, check_against_theory, check_row
from lora_lab.run_files import CUTS, HEALED
from lora_lab.runs import Run

TARGET_KEYS = ("r", "alpha", "dropout", "init")
"""The settings of the adapter that a target may set for its sites."""


def run_tables(run: Run, at: At = "last") -> dict[str, Rows]:
    """Makes a run's tables, by title, from the files in its directory alone.

    `facts` has (fact, value) rows, `cost` (cost, value) rows, `curves` the validation metrics by
    epoch. `theory` and `cost` are left out where the run has none. `at` is the epoch of the loss
    among the facts.
    """
    tables = {"facts": _facts(run, at), "curves": _curves(run)}
    if len(cost := run_cost_table(run)) > 1:
        tables["cost"] = cost
    if checks := check_against_theory(run):
        rows = [[check.metric, *check_row([check])] for check in checks]
        tables["theory"] = [CHECK_COLUMNS, *rows]
    return tables


def _curves(run: Run) -> Rows:
    """Validation metrics of the base and of the adapted model, a row for each epoch.

    Beside each loss is the published one, where the config has it.
    """
    published = run.config.get("published") or {}
    method = run.config["adapter"]["method"]
    columns: dict[str, dict[float, float]] = {}
    logged = dict.fromkeys(key for row in run.rows() for key in row)
    for prefix, label, paper in (("base/val/", "base", "base"), ("val/", method, "adapted")):
        for key in (key for key in logged if key.startswith(prefix)):
            columns[f"{label} {key.removeprefix(prefix)}"] = run.curve(key)
            if key.endswith("val/loss") and published.get(paper):
                columns[f"{label} published"] = published[paper]
    epochs = sorted({epoch for curve in columns.values() for epoch in curve})
    body = [
        [f"{e:g}", *(format_number(curve.get(e)) for curve in columns.values())] for e in epochs
    ]
    return [["epoch", *columns], *body]


def _facts(run: Run, at: At) -> Rows:
    """(fact, value) rows, titles included: adapter, losses, sizes, ΔW, advice on ranks, seeds."""
    config = run.config
    facts = [["fact", "value"], *_adapter_facts(config), *_loss_facts(run, at)]
    facts += [*_size_facts(run), *_allocation_facts(run)]
    seeds = f"{config['seed']}, {config['data'].get('seed', '–')}"
    return [*facts, *_update_facts(run), *_advice_facts(run), ["seed, data seed", seeds]]


def _adapter_facts(config: dict[str, Any]) -> Rows:
    """Rows on the adapter, and on a quantized base; none where the method is not LoRA."""
    adapter = config["adapter"]
    if adapter["method"] != "lora":
        return []
    parts = [f"r={adapter['r']}", f"alpha={adapter['alpha']:g}"]
    parts += [adapter["scaling"], adapter["init"]]
    parts += [f"budget {adapter['budget']:g}"] if adapter.get("budget") else []
    if restarts := adapter.get("restarts"):
        parts.append(f"begun anew every {restarts['every']:g}")
    parts += [f"rho {adapter['rho']:g}"] if adapter.get("rho", 1) != 1 else []
    parts += ["DoRA"] if adapter.get("dora") else []
    parts += [f"form {adapter['form']}"] if adapter.get("form", "lora") != "lora" else []
    trains, ratio = adapter.get("trains", "both"), adapter.get("lr_ratio", 1)
    parts += [f"trains {trains}"] if trains != "both" else []
    parts += [f"lr ratio {ratio:g}"] if ratio != 1 else []
    differ = any(target.get(key) for target in config["target"].values() for key in TARGET_KEYS)
    if differ or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        parts.append("but for sites with their own (adapter/adapter.json)")
    facts = [["adapter", ", ".join(parts)]]
    if quantization := config["model"].get("quantization"):
        facts.append(["base", f"in {quantization}: ΔW is against the quantized weights"])
    return facts


def _loss_facts(run: Run, at: At) -> Rows:
    """The validation loss before and after adaptation, that of the merged model, and the test."""
    facts, loss, selects = [], run.curve("val/loss"), [run.config.get("select", "last")]
    if loss:
        facts.append(["loss on the new data before adaptation", format_number(loss[min(loss)])])
    if len(loss) > 1:
        best = best_values(run.rows()).get("val/loss") if at == "best" else None
        where = epoch_text("val/loss", at if best else "last", selects)
        value = format_number(best.value if best else run.last("val/loss"))
        facts.append([f"loss on the new data after adaptation, {where}", value])
    if (merged := run.last("merged/val/loss")) is not None:
        where = epoch_text("val/loss", "last", selects)
        facts.append([f"loss of the merged model, {where}", format_number(merged)])
    tested = dict.fromkeys(key for row in run.rows() for key in row if key.startswith("test/"))
    facts += [
        [
            f"test {key.removeprefix('test/')}, looked at once, at the end",
            format_number(run.last(key)),
        ]
        for key in tested
    ]
    facts += [*_published_facts(run), *_generated_facts(run), *_forgetting_facts(run)]
    return [*facts, *_best_facts(run), *_cut_facts(run)]


def _published_facts(run: Run) -> Rows:
    """The published metrics of the run's cell, where its config has any."""
    published = run.config.get("published") or {}
    return [
        [f"{metric} as published ({published['source']})", format_number(value)]
        for metrics in published.get("cells", {}).values()
        for metric, value in metrics.items()
    ]


def _forgetting_facts(run: Run) -> Rows:
    """The loss on what the base knew, before and after adaptation; none where it was not measured.

    The one after is that of the result's weights.
    """
    if not (curve := run.curve("forget/loss")):
        return []
    facts = [["loss on what the base knew, before adaptation", format_number(curve[min(curve)])]]
    if (increase := run.last("forget/increase")) is not None and len(curve) > 1:
        value = f"{format_number(run.last('forget/loss'))} ({increase:+.5g})"
        facts.append(["loss on what the base knew, at the end", value])
    return facts


def _generated_facts(run: Run) -> Rows:
    """The metrics of the texts that the result has generated."""
    prefix, split = "generate/", (run.config.get("generate") or {}).get("split")
    logged = dict.fromkeys(key for row in run.rows() for key in row if key.startswith(prefix))
    names = {key: f"{key.removeprefix(prefix)} of texts generated from {split}" for key in logged}
    return [[name, format_number(run.last(key))] for key, name in names.items()]


def _cut_facts(run: Run) -> Rows:
    """The validation loss of the adapter cut to each rank of adapter.cut, and after healing."""
    adapter, facts = run.config["adapter"], []
    for k in adapter.get("cut", ()):
        healed = f"cut to rank {k}, and trained {adapter['heal']} steps more"
        for folder, fact in ((CUTS, f"cut to rank {k}"), (HEALED, healed)):
            if (loss := run.last(f"{folder}/{k}/val/loss")) is not None:
                facts.append([f"loss of the adapter {fact}", format_number(loss)])
            if (loss := run.last(f"{folder}/{k}/forget/loss")) is not None:
                facts.append([f"its loss on what the base knew, {fact}", format_number(loss)])
    return facts


def _best_facts(run: Run) -> Rows:
    """The best value of each validation metric, where the last is another one."""
    facts = []
    selects = str(run.config.get("select", "last")).removeprefix("best ")
    for key, best in best_values(run.rows()).items():
        curve = run.curve(key)
        last = curve[max(curve)]
        if len([epoch for epoch in curve if epoch]) > 1 and (key == selects or best.value != last):
            chosen = ", whose weights are the result" if key == selects else ""
            value = f"{format_number(best.value)} after epoch {best.epoch:g}{chosen}"
            value += f"; last {format_number(last)}"
            facts.append([f"best {key.removeprefix('val/')}", value])
    return [*facts, ["a best value", OPTIMISTIC]] if facts else []


def _size_facts(run: Run) -> Rows:
    """Trainable parameters, and the bytes of the adapter's file and of the optimizer's state."""
    facts = []
    trainable, base = run.last("parameters/trainable"), run.last("parameters/base")
    if trainable and base:
        share = f"{format_number(trainable)} of {format_number(base)} ({trainable / base:.3%})"
        facts.append(["trainable parameters", share])
    if (size := run.last("bytes/adapter")) is not None:
        in_full = run.last("bytes/also_trained")
        beside = f", and {format_unit(in_full, 'B')} of weights trained in full" if in_full else ""
        facts.append(["adapter on disk", format_unit(size, "B") + beside])
    if (size := run.last("bytes/optimizer")) is not None:
        full = run.last("bytes/full_optimizer")
        is_full = run.config["adapter"]["method"] == "full"
        what = "Adam on all weights" if is_full else "full fine-tuning"
        beside = f", {format_unit(full, 'B')} for {what}" if full and full != size else ""
        facts.append(["optimizer state", f"{format_unit(size, 'B')}{beside}"])
    return facts


def _update_facts(run: Run) -> Rows:
    """What was measured of ΔW, for the sites where its norm is largest; of experts the means."""
    facts: Rows = []
    by_matrix, experts = singular_values_by_matrix(run), experts_of_run(run)
    count = Counter(site_of(matrix, experts) for matrix in by_matrix)
    spectra = means_by_site(by_matrix, experts)
    for name, singular_values in largest_updates(spectra).items():  # (times, k)
        largest = ", ".join(format_number(value) for value in singular_values[-1][:4])
        more = ", …" if singular_values.shape[1] > 4 else ""
        site = f"{name} (mean of {count[name]} experts)" if name in experts else name
        effective_rank = run.last(f"spectra/{name}/effective_rank")
        facts.append([f"ΔW of {site}: singular values", f"{largest}{more}"])
        facts.append([f"ΔW of {site}: effective rank", format_number(effective_rank)])
        if (amplification := run.last(f"spectra/{name}/amplification")) is not None:
            fact = f"ΔW of {site}: ‖ΔW‖ over what W has of its directions"
            facts.append([fact, format_number(amplification)])
        if (intruders := run.last(f"spectra/{name}/intruders")) is not None:
            among = run.last(f"spectra/{name}/intruders_among")
            of_all = f" of {format_number(among)}" if among else ""
            fact = f"W + ΔW of {site}: first directions that W has not"
            facts.append([fact, format_number(intruders) + of_all])
    if (others := len(spectra) - MAX_PANELS) > 0:
        facts.append([f"and {others} sites more", "with a smaller ΔW, in spectra.npz"])
    return facts


def _allocation_facts(run: Run) -> Rows:
    """One row with the ranks of sites that AdaLoRA has left, or EVA given; none of other runs."""
    end = "/allocated_rank"
    keys = dict.fromkeys(key for row in run.rows() for key in row if key.endswith(end))
    if not keys:
        return []
    ranks = {key[len("spectra/") : -len(end)]: int(run.last(key) or 0) for key in keys}
    shown = ", ".join(f"{site} {k}" for site, k in list(ranks.items())[:MAX_PANELS])
    more = ", …" if len(ranks) > MAX_PANELS else ""
    by = "AdaLoRA left" if run.config["adapter"].get("form") == "adalora" else "EVA gave"
    return [[f"ranks that {by}, {sum(ranks.values())} in all", shown + more]]


def _advice_facts(run: Run) -> Rows:
    """One row with the ranks that advice.yaml recommends; none without that file."""
    if not (run.path / "advice.yaml").exists():
        return []
    advice = yaml.safe_load((run.path / "advice.yaml").read_text())
    ranks = advice["adapter"]["rank_pattern"].items()
    shown = ", ".join(f"{site} {k}" for site, k in list(ranks)[:MAX_PANELS])
    more = ", …" if len(ranks) > MAX_PANELS else ""
    gain = f"≥ {100 * advice['keep']:.4g}% of the gain ({advice['share']:.1%})"
    return [[f"ranks that keep {gain}", shown + more]]
