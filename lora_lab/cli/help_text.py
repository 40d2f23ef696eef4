"""Help texts of `lora-lab` and of its subcommands."""

from collections.abc import Sequence

from lora_lab.config.options import option_text, options

ABOUT = """\
Experiments with low-rank adaptation: which rank, which alpha, which layers, and what the learned \
update looks like."""

EPILOG = """\
examples:
  lora-lab train                              the `shift` experiment, to its table and figures
  lora-lab train adapter.r=4 seed=1           the same at rank 4, another seed
  lora-lab train -m adapter.r=1,2,4 seed=0,1  six runs, one after another
  lora-lab train --help                       everything that can be set
  lora-lab train data=text --help             and each key of data=text
  lora-lab sweep sweeps/rank.yaml             a W&B sweep file, run here with no account
  lora-lab report RUN                         a run's table and figures again
  lora-lab report runs/shift                  all its runs: tables, figures and a page, even while
                                              they go on
  lora-lab best runs/digits --metric val/accuracy    its best cells, and the command that repeats
  lora-lab best runs/digits --at best         the same, each run at its best epoch
  lora-lab diff RUN RUN                       what differs of their configs and results
  lora-lab analyze RUN                        its ΔW again: truncation, advice, against the base
  lora-lab analyze RUN RUN                    how the directions of their ΔW compare
  lora-lab export RUN DIR                     its adapter, as PEFT loads it
  lora-lab export RUN DIR --format merged     its model, ΔW in the weights
  lora-lab evaluate RUN --cut 8 --data FILE   texts that it generates, ΔW cut to rank 8
  lora-lab reproduce RUN                      the run again, every number beside the stored one
  lora-lab dashboard PROJECT                  a workspace and a report of its runs in W&B
  lora-lab spectra PATH                       ΔW of any adapter: PEFT's, ours, LyCORIS, kohya
  lora-lab spectra --before A --after B       ΔW of a full fine-tune, from two checkpoints
  lora-lab cut PATH --energy .95              an adapter at the rank that keeps 95% of ‖ΔW‖²
  lora-lab extract --before A --after B --rank 32    an adapter of a full fine-tune
  lora-lab new FOLDER                         a project: your own model, data and experiment
  lora-lab ls                                 every run: status, cell, seed, loss, time
  lora-lab ls --state failed                  those that failed
"""

AT = """With --at last a val/ metric is that of the last epoch (with select=best: of the selected
one, which is the run's result). With --at best each val/ metric is at its own best epoch after the
first step, the least or the largest as its name says. That epoch is chosen by looking at the value
itself, so that it is optimistic: what a model does on other data a test split tells (data.test).
All other metrics are at the end."""

PROJECT = "the folder with conf/ and lora_lab.yaml (the one that this folder is in)"

# argparse wraps the next eight texts to the width of the terminal.
REPORT = f"""Of a run: its tables and figures again. Of a folder: every metric as mean ± standard
deviation by cell, the best marked, figures, and what is not finished; as Markdown, CSV, LaTeX, PNG,
PDF and one page, report/index.html. Runs may go on meanwhile. {AT}"""

NEW = """Writes a small project into a new folder: lora_lab.yaml, which marks it, conf/ with an
experiment, a model and a data set, their Python files, a sweep file, a test, and a README with the
commands. In that folder, below it, and with --project FOLDER, all commands know its conf/ and its
modules. The files run as they are: change them into your own."""

REPRODUCE = """Runs a finished run again from its stored config, in a new directory, and prints the
stored numbers beside the new, with what differs of the environment. The same environment gives the
same bits; another machine, version, number of threads or of devices does not, and needs a
--tolerance, as 1e-5. The devices are as many as the run had, of the same kind; one where this
machine lacks those, and a line says so. Another line says where the last measurements of the stored
run move by more than the two runs differ.
Exits with 0: within the tolerance, 1: beyond it or failed, 2: no run to be reproduced."""

DASHBOARD = """Makes a saved workspace view and a report in a W&B project that has runs: losses by
cell with seeds averaged, against r and parameters, the truncation of ΔW, its effective ranks and
singular values, which settings matter. Each call makes new ones. Without a login it prints a table
of what it would make, with --dry-run the workspace's JSON, and exits with 0."""

BEST = f"""The best cells of each experiment, mean ± standard deviation over their seeds, and the
best run with the command that repeats it. `best epoch` tells whether the last was the best: 3 of 10
was not. {AT}"""

SPECTRA = """Singular values of ΔW, site by site, without a model or a run: of a PEFT folder, one of
ours, a run directory, a file of LyCORIS or kohya (LoRA, LoCon, LoHa, LoKr), or of two checkpoints
(--before, --after), read tensor by tensor. A table, figures, a page and spectra.npz. Of two or more
adapters: how far their directions overlap, φ. With --base also the amplification of W's directions
and the intruder dimensions, which take seconds for a weight of 2048 × 2048."""

CUT = """Writes an adapter at a lower rank, in the format it has; LoHa and LoKr become LoRA. Each
site's ΔW is cut to its best approximation of that rank, computed from the factors. The scale stays.
A site whose ΔW has a lower rank gets that. Ranks differ by site with --energy and --advice.
--scale-intruders F with --base multiplies the intruder dimensions of W + ΔW by F (Shuttleworth et
al. 2024, as PEFT's reduce_intruder_dimension), and keeps each site's rank."""

EXTRACT = """Writes a full fine-tune as an adapter: of each matrix the best approximation of W − W₀
of a rank, and what share of ‖W − W₀‖² that holds. What it cannot hold (biases, norms) is listed,
with the reason. The folder's config.json says what the layers are (transformers, timm); without one
their names do. A rank over that of a weight is the weight's. Experts that are one parameter have an
adapter for each matrix. The checkpoints are read tensor by tensor."""

EVALUATE = """\
Texts that a finished run's model generates, compared with references: by its `generate` settings,
or their defaults, and what KEY=VALUE changes of them (lora-lab train --help). Numbers and texts are
written to RUN/evaluations/, and the run stays what it is. The same question again replaces them.
--cut K cuts ΔW to rank K at each site first. --data takes other rows of the same columns.
--harness runs tasks of lm-eval-harness on the merged model (pip install 'lora_lab[harness]').
"""

EVALUATE_EXAMPLES = """\
examples:
  lora-lab evaluate RUN 'metrics=[bleu,rougeL]' num_beams=10 length_penalty=0.8
  lora-lab evaluate RUN --cut 8 --rows 200 --data test.jsonl
  lora-lab evaluate RUN --harness arc_easy,my_task.yaml --rows 100
"""

SWEEP = """\
Runs a W&B sweep file here, with no account. `wandb sweep FILE` and `wandb agent ID` run the same
file with one. The same command again goes on: finished runs are not repeated.

  method: grid    every combination, in W&B's order; run_cap or --count takes the first N
  method: random  --count or run_cap independent draws
  method: bayes   Optuna's TPE: ten random draws, then each is chosen by the runs before it; the
                  metric is a run's last value, as in W&B's summary. Its trials are kept in
                  runs/.sweeps/NAME-HASH/study.db

OVERRIDES are those of `lora-lab train`, and come before what the file says: one value fixes a
parameter, several (adapter.r=1,2) are swept instead of the file's. The file's tracking=online is
for W&B's agents: here runs are tracked offline unless you say tracking=online. A launcher runs
several at once: hydra/launcher=joblib, or packed. Every point of a grid, and of a distribution both
ends, is checked before anything runs.
"""

SWEEPS = """\
examples:
  lora-lab sweep sweeps/rank.yaml
  lora-lab sweep sweeps/rank.yaml --dry-run
  lora-lab sweep sweeps/rank.yaml adapter.r=1,2 seed=0 hydra/launcher=joblib
  lora-lab sweep sweeps/lr_search.yaml --count 20
"""

TRAIN = """\
usage: lora-lab train [-m] [--project DIR] [KEY=VALUE ...]
       lora-lab train GROUP=OPTION ... --help    each key of these options

Trains (or finds) a base, adapts it, measures ΔW, and writes a run directory with a table and
figures. The same command again shows the finished run; -m takes lists of values and runs them all.

choices (GROUP=OPTION):
{groups}
settings:
  seed=0                 draws the adapters and their dropout
  data.seed=0            draws the data and its order
  base.seed=0            draws the base's first weights
  adapter.r=8            the rank, at most that of the smallest targeted weight; full: adapter=full,
                         none: adapter=none
  adapter.alpha=8        scale is alpha/r; adapter.scaling: alpha/r | alpha/sqrt(r) | alpha
                         | none
  adapter.init=kaiming   kaiming | gaussian | orthogonal | pissa | olora | svd | milora | mica; from
                         adapter.calibration=8 training batches: eva | corda | lora_ga
  adapter.rho=1.0        adapter=eva: 2 moves ranks between sites, up to 2 · r at each
  adapter.trains=both    both | zero | core: LoRA, LoRA-FA, LoRA-XS
  adapter.dora=false     true trains the norms of the weight's rows as well
  adapter.form=lora      lora | vera | loha | lokr | lokr_both: what ΔW is made of
  adapter.budget=4       adapter=adalora: the mean rank at the end of training, adapter.r at first
  adapter.lr_ratio=1.0   the learning rate of B over that of A (LoRA+)
  adapter.dropout=0.0    on what goes into A
  adapter.cut=[4,2]      ranks that the adapter is cut to after training, beside the result; with
                         adapter.heal=100 each trains as many steps more
  adapter.rank_pattern='{{body.*:4}}'    by a glob on sites; alpha_pattern alike
  target='*.fc1'         a glob on names; several as target=[linear,'*.proj']
  target.linear.match='body.*'    a named target, narrowed to a glob or a list of globs
  target.linear.exclude='head'    and its own r, alpha, dropout, init; tied=true: a shared weight
  optimizer.lr=0.001     optimizer.schedule: constant | linear | cosine; optimizer.warmup: a share
                         of all steps, or a number of them
  base.epochs=10         how long the base trains, where base=train
  base.path=FILE         its safetensors file, where base=checkpoint
  model.path=FOLDER      a folder or hub id of model=pretrained, with base=pretrained
  model.head=HEAD        classification | language | masked | seq2seq | tokens | image
  data.train=FILE        of data=text, words, language, images: a file, folder or hub id; data.val
                         data.test, on which the result is tested once, at its end
  data.text=COLUMN       data.label=COLUMN; words: data.words data.labels, columns of lists;
                         language: data.prompt data.completion | data.messages
  also_train=[head]      globs on what trains in full beside the adapters; bias: every bias
  label_smoothing=0.0    in training; val/loss is plain
  select=last            the run's result: last | "best val/accuracy"
  early_stopping=null    'early_stopping={{metric: val/loss, patience: 3}}'
  generate.rows=50       texts of the result from so many prompts (generate=null: none), as
                         'generate={{metrics: [exact_match, bleu, rougeL], num_beams: 4}}';
                         generate.answer=REGEX: what exact_match compares; every_n_steps=N
  spectra.every_n_epochs=10   when ΔW is measured in training; spectra.every_n_steps=N
  spectra.truncation=sites    the loss with ΔW cut to lower ranks: sites | model | none
  spectra.keep=0.99      the share of the gain that the advised ranks keep
  trainer.max_epochs=10  and every other argument of Lightning's Trainer, as max_steps,
                         val_check_interval (steps), accumulate_grad_batches, precision
  sweep.fail_fast=false  true ends a multirun with its first failure
  hydra.launcher.n_jobs=4    runs at once, with -m and hydra/launcher=joblib; hydra.launcher.KEY
                         sets what the launcher's YAML has. Without one (basic) they run one after
                         another in this process, and end with it if it is killed. packed: those
                         that differ in r, alpha, scaling, init, dropout, optimizer settings or
                         seed alone are trained together, in one pass over the base they share
  overwrite=false        true repeats a finished run
  checkpoint_every=60    seconds that an interrupted run may have to repeat; 0: less than an epoch
  figures=null           drawn after a single run; true: after each run of -m, which takes seconds;
                         false: never. `lora-lab report RUN` draws them at any time
  runs_dir=runs          where run directories go; bases_dir=bases: where bases are kept

examples:
  lora-lab train adapter.r=4 adapter.alpha=8 optimizer.lr=3e-4
  lora-lab train experiment=digits target='body.*' tracking=online
  lora-lab train -m experiment=digits adapter.r=1,2,4,8 seed=0,1,2
  lora-lab train -m adapter.r=1,2,4 seed=0,1 hydra/launcher=joblib
  lora-lab train -m adapter.r=1,2,4,8 seed=range(8) hydra/launcher=packed
  lora-lab train -m adapter.r=1,2,4 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  lora-lab train experiment=digits adapter=full
  lora-lab train name=mine model=pretrained model.path=FOLDER model.head=classification
    base=pretrained data=text data.train=train.jsonl data.val=val.jsonl data.text=text
    data.label=label 'also_train=[classifier]' target.linear.match='*.query'
"""


def train_help(arguments: Sequence[str] = ()) -> str:
    """The help of `lora-lab train`: the settings, and the groups of conf/ with their options.

    Behind it stands the YAML, with its comments, of each option that `arguments` choose.
    """
    lines, width = [], 1 + max(len(o) for choices in options().values() for o in choices)
    for group, choices in options().items():
        for i, (option, comment) in enumerate(choices.items()):
            lines.append(f"  {group + '=' if i == 0 else '':<16}{option:<{width}}{comment}")
    return TRAIN.format(groups="\n".join(lines) + "\n") + "".join(map(_chosen, arguments))


def _chosen(argument: str) -> str:
    """The keys of an option that is chosen, as data=text; empty for other arguments."""
    group, _, option = argument.partition("=")
    if option not in options().get(group, {}):
        return ""
    lines = option_text(group, option).splitlines()
    keys = "KEY" if "# @package _global_" in lines else f"{group.replace('/', '.')}.KEY"
    lines = [line for line in lines if not line.startswith("# @package")]
    return f"\n{argument} sets {keys}:\n" + "".join(f"  {line}\n" for line in lines)
