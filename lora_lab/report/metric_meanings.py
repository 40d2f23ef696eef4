"""What each number means that a run logs: its name, its unit, and when it is logged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Metric:
    """A metric, or all that have a name of one form: <site>, <metric>, <k> … stand for any."""

    name: str
    unit: str
    meaning: str
    when: str = ""

    def matches(self, name: str) -> bool:
        """Whether a logged name is of this form: val/<metric> has val/accuracy."""
        forms = {"<metric>": one_of(TASK_METRICS), "<measure>": one_of(MEASURES), "<k>": r"\d+"}
        forms |= {"<text metric>": "exact_match|bleu|rouge[12L]"}
        pattern = "".join(
            f"(?:{forms.get(part, '.+')})" if part.startswith("<") else re.escape(part)
            for part in re.split(r"(<[^>]+>)", self.name)
        )
        return re.fullmatch(pattern, name) is not None


def one_of(metrics: "Sequence[Metric]") -> str:
    """A regular expression for the names of these."""
    return "|".join(re.escape(metric.name) for metric in metrics)


@cache
def metric_of(name: str) -> Metric | None:
    """What is known of a logged name; None for an unknown one."""
    return next((metric for metric in METRICS if metric.matches(name)), None)


TASK_METRICS = (
    Metric("loss", "nats; of regression squared error", "the mean over all targets that count"),
    Metric("accuracy", "share", "rows, tokens or pairs whose largest output is the right one"),
    Metric("f1", "0 to 1", "F1 of class 1 of two; of more classes the mean of each class's"),
    Metric("matthews", "−1 to 1", "the correlation of classes and predictions (Matthews 1975)"),
    Metric("pearson", "−1 to 1", "the linear correlation of outputs and targets"),
    Metric("spearman", "−1 to 1", "the correlation of the ranks of outputs and targets"),
    Metric("perplexity", "", "exp(loss) of a language model"),
)
"""The metrics of tasks (`data.metrics` chooses among those of the data's task)."""

MEASURES = (
    *(
        Metric(
            f"sigma_{i}", "of W", f"singular value {i} of ΔW, the largest first; 0 past the last"
        )
        for i in range(1, 5)
    ),
    Metric("effective_rank", "", "exp(−Σ p ln p) with p = σ/Σσ: how many directions share ΔW"),
    Metric("stable_rank", "", "Σσ²/σ₁²"),
    Metric("participation_ratio", "", "(Σσ²)²/Σσ⁴"),
    Metric("energy_90", "", "the least k whose σ₁² … σ_k² hold 90% of Σσ²"),
    Metric("energy_99", "", "the least k whose σ₁² … σ_k² hold 99% of Σσ²"),
    Metric("numerical_rank", "", "how many σ are above rounding, σ₁ · max(out, in) · eps"),
    Metric("frobenius", "of W", "√Σσ², the size of ΔW"),
    Metric("nuclear", "of W", "Σσ"),
)
"""The measures of one ΔW (analysis/spectra.py)."""

VALIDATED = "at each validation, the first before any step"

METRICS = (
    Metric("step", "", "optimizer steps that were taken", "in each row"),
    Metric("epoch", "", "epochs, with a fraction within one", "in most rows"),
    Metric("train/loss", "as loss", "the mean over an epoch, while it trains", "after each epoch"),
    Metric(
        "train/loss_step",
        "as loss",
        "of one optimizer step",
        "each trainer.log_every_n_steps steps",
    ),
    Metric("lr", "", "the learning rate of that step", "each trainer.log_every_n_steps steps"),
    Metric("val/<metric>", "below", "on the validation rows", VALIDATED),
    Metric("test/<metric>", "below", "on data.test, by the run's result", "once, at the end"),
    Metric("base/train/loss", "as loss", "of the base", "after each epoch of the base"),
    Metric("base/val/<metric>", "below", "of the base, on its phase's data", "as the base trains"),
    Metric("merged/val/<metric>", "below", "of the model with ΔW added to W", "at the end"),
    Metric("merged/forget/<metric>", "below", "the same, on what the base knew", "at the end"),
    Metric("forget/increase", "as loss", "forget/loss at the end less that at first", "at the end"),
    Metric("forget/<metric>", "below", "on what the base knew", VALIDATED),
    Metric(
        "best/<name>",
        "",
        "the selected validation: its metric, step and epoch",
        'at the end, with select="best …" or early_stopping',
    ),
    Metric(
        "generate/<text metric>",
        "share; BLEU and ROUGE 0 to 100",
        "of generated texts",
        "at the end, and each generate.every_n_steps steps",
    ),
    Metric(
        "spectra/<site>/<measure>",
        "below",
        "of a site's ΔW; of experts the mean of theirs",
        "as spectra.every_n_epochs says, at first and at last",
    ),
    Metric(
        "spectra_of/<group>/<measure>",
        "below",
        "of all sites together, of a kind/… or of a depth/…: the block-diagonal matrix of ΔW",
        "with spectra/…",
    ),
    Metric(
        "spectra/<site>/directions",
        "",
        "directions of ΔW that the next four are about",
        "at the end, with spectra.against_base",
    ),
    Metric(
        "spectra/<site>/projection", "of W", "‖UᵀWV‖, what W has in ΔW's directions", "likewise"
    ),
    Metric("spectra/<site>/amplification", "", "‖ΔW‖ over the projection", "likewise"),
    Metric(
        "spectra/<site>/intruders", "", "intruder dimensions among the first of W + ΔW", "likewise"
    ),
    Metric("spectra/<site>/intruders_among", "", "how many were looked at, 10 at most", "likewise"),
    Metric(
        "spectra/<site>/allocated_rank",
        "",
        "the rank that a site got of AdaLoRA or EVA",
        "at the end; of AdaLoRA at each allocation",
    ),
    Metric(
        "advice/loss",
        "as loss",
        "validation loss with ΔW cut to the advised ranks",
        "at the end, with spectra.truncation=sites, if ΔW gains",
    ),
    Metric("advice/share", "share", "of the gain that these ranks keep", "likewise"),
    Metric(
        "first_step/gradient_ratio",
        "",
        "‖∇_B‖/‖G‖, G the gradient of the full weights",
        "after the first step, with spectra.first_step",
    ),
    Metric(
        "first_step/descent", "", "⟨−G, ΔW⟩/(η Σ‖G_o‖), how far the first step goes", "likewise"
    ),
    Metric(
        "theory/<metric of the run>",
        "its",
        "what a closed form says of the run's end",
        "before training, of data that know it",
    ),
    Metric(
        "theory_error/<metric of the run>",
        "its",
        "the closed form's standard error; 0: exact",
        "likewise",
    ),
    Metric("parameters/trainable", "", "numbers that train, also_train included", "at the end"),
    Metric("parameters/base", "", "numbers of the base", "at the end"),
    Metric("bytes/adapter", "bytes", "of the adapter's tensors", "at the end"),
    Metric("bytes/also_trained", "bytes", "of what also_train names", "at the end"),
    Metric(
        "bytes/optimizer",
        "bytes",
        "of Adam's two moments of what trains; of full fine-tuning what the optimizer holds",
        "at the end",
    ),
    Metric(
        "bytes/full_optimizer", "bytes", "of Adam's moments if all parameters trained", "at the end"
    ),
    Metric(
        "cut/<k>/<metric of the run>",
        "its",
        "of the adapter cut to rank k (adapter.cut)",
        "at the end",
    ),
    Metric(
        "healed/<k>/<metric of the run>",
        "its",
        "the same after adapter.heal more steps",
        "at the end; train/loss as it trains",
    ),
    Metric(
        "cost/seconds_per_step",
        "s",
        "the median of a step: forward, backward, optimizer",
        "at the end, in cost.json and W&B",
    ),
    Metric("cost/rows_per_second", "1/s", "rows of a step over its seconds", "likewise"),
    Metric("cost/tokens_per_second", "1/s", "tokens of a step over its seconds", "likewise"),
    Metric("cost/flops_per_step", "FLOP", "of forward and backward of the first step", "likewise"),
    Metric("cost/peak_memory_bytes", "bytes", "of the GPU, or of the process", "likewise"),
)
"""All that a run logs, the more special form before the more general."""
