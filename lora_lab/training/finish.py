"""What follows a run's last step: the result's weights, test, merge check, analysis and cuts."""

import json
import logging
from dataclasses import asdict
from functools import partial

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

from lora_lab import adapters
from lora_lab.adapters import AdapterError
from lora_lab.adapters.files import is_adapter_key
from lora_lab.adapters.memory import full_tensor
from lora_lab.adapters.quantized import is_quantized
from lora_lab.adapters.slots import layer_of, merged_adapters
from lora_lab.analysis import findings
from lora_lab.analysis.updates import Updates
from lora_lab.config.schema import Lora
from lora_lab.data.language import Language
from lora_lab.data.prompts import prompts
from lora_lab.run_files import COST, GENERATED
from lora_lab.runs import process_rank, write_atomic
from lora_lab.training import precision
from lora_lab.training.base_weights import BaseWeights
from lora_lab.training.cuts import losses_of_cuts
from lora_lab.training.forgetting import log_increase
from lora_lab.training.generation import as_lines, generate
from lora_lab.training.heal import cut_and_heal
from lora_lab.training.plan import Plan
from lora_lab.training.result_files import save_weights
from lora_lab.training.trial import Trial

log = logging.getLogger(__name__)


def finish_run(trial: Trial, console: Console) -> None:
    """What follows the last step: tests and saves the result, checks that ΔW merges, generates
    texts, analyzes and cuts ΔW.

    Where several processes trained the run, the first does this on one device.
    """
    plan, module, tracking = trial.plan, trial.module, trial.tracking
    if not process_rank():
        # From here on a failure keeps the checkpoint: run_record.can_continue.
        trial.run.update_status(training_ended=True)
    change = {}
    if isinstance(module.model, FSDPModule):
        _gather(trial)
        change = {"accelerator": "cpu"}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if process_rank():
        return
    if plan.cfg.trains:
        _save_cost(trial)
        _select(trial)
    else:
        base_size = adapters.count(module.model).frozen
        tracking.log({"parameters/trainable": 0, "parameters/base": base_size}, 0)
    log_increase(tracking)
    trainer = partial(plan.single_device_trainer, callbacks=[], **change)
    if trial.data.has_test:
        trainer(tracking).test(module, trial.data, verbose=False)
    if plan.cfg.trains:
        _save_trained(trainer(tracking), trial)
    _generate(trainer(None), trial)
    if plan.cfg.trains:
        _analyze(trainer(None), trial, console)
        cut_and_heal(trainer, trial, console)


def _generate(trainer: pl.Trainer, trial: Trial) -> None:
    """Generates texts by the run's result: writes generated.jsonl, logs their metrics and a table.

    `trainer` has the device and the precision. Nothing is done without `generate` in the config.
    """
    cfg, data = trial.plan.cfg, trial.data
    if (settings := cfg.generate) is None:
        return
    assert isinstance(data, Language)
    chosen = prompts(data, settings.split, settings.rows)
    texts, metrics = generate(trainer, trial.module.model, data, chosen, settings)
    trial.run.replace_files({GENERATED: as_lines(texts)})
    trial.tracking.log_texts([asdict(text) for text in texts])
    row = {f"generate/{name}": value for name, value in metrics.items()}
    place = trial.module.step_and_epoch() if cfg.trains else {"step": 0, "epoch": 0.0}
    trial.tracking.log({**row, "epoch": place["epoch"]}, int(place["step"]))


def _gather(trial: Trial) -> None:
    """Puts a new model in CPU memory in the place of the one that FSDP split over the processes.

    All processes must call this.
    """
    plan, module = trial.plan, trial.module
    state = {key: full_tensor(value).cpu() for key, value in module.model.state_dict().items()}
    model = plan.model()
    if plan.cfg.freezes_base:
        # The base first: some inits read its weights and outputs, though all tensors are set below.
        model.load_state_dict({key: v for key, v in state.items() if not is_adapter_key(key)})
        plan.attach(model)
    module.model = model
    precision.cast(module, plan.cfg.trainer)
    model.load_state_dict(state)
    if isinstance(trial.base, BaseWeights):
        trial.base = BaseWeights(model, trial.base.digests)
    trial.spectra_callback.updates = Updates(model, trial.base, plan.sites)


def _analyze(trainer: pl.Trainer, trial: Trial, console: Console) -> None:
    """Stores the spectra of ΔW, and what is asked of the finished ΔW. `trainer` logs nothing."""
    plan, run, module = trial.plan, trial.run, trial.module
    updates, arrays = trial.spectra_callback.updates, trial.spectra_callback.arrays()
    # Written now too, so that the spectra are stored even if the analysis fails.
    run.replace_files(findings.files(arrays, None))
    if not plan.sites:
        return  # nothing but parameters of also_train, which have no ΔW to analyze
    module.prefix = ""
    losses = losses_of_cuts(trainer, module, trial.data, updates)
    learned = findings.analyze(updates, losses, plan.cfg.spectra, plan.cfg.bases_dir, console)
    run.replace_files(findings.files({**arrays, **learned.arrays}, learned.advice))
    assert module.final_step is not None
    trial.tracking.log_findings(learned.metrics, learned.arrays, int(module.final_step["step"]))


def _save_trained(trainer: pl.Trainer, trial: Trial) -> None:
    """Saves the adapters or the model that was trained, and logs parameter and memory counts."""
    model, is_full = trial.module.model, not trial.plan.cfg.freezes_base
    cost = adapters.count(model)
    # A base that runs of a pack share may have been thawed where another run's cuts were measured.
    trained = (p for name, p in model.named_parameters() if is_adapter_key(name) or is_full)
    trainable = sum(p.numel() for p in trained if p.requires_grad)
    costs: dict[str, float] = {"parameters/trainable": trainable, "parameters/base": cost.frozen}
    saved = save_weights(model, trial.run.path)
    if adapters.names(model):
        _check_merge(trainer, trial)
        costs["bytes/adapter"] = cost.adapter_bytes
        if cost.also_trained:
            costs["bytes/also_trained"] = cost.also_trained_bytes
        costs |= _redistributed_ranks(trial.plan)
        costs["bytes/optimizer"] = cost.optimizer_bytes
    costs["bytes/full_optimizer"] = cost.full_optimizer_bytes
    trial.tracking.store_artifact(saved, saved.name)
    trial.tracking.log(costs, int(trial.module.step_and_epoch()["step"]))


def _redistributed_ranks(plan: Plan) -> dict[str, float]:
    """The rank that EVA gave each site, where adapter.rho lets it; {} otherwise."""
    if not isinstance(plan.cfg.adapter, Lora) or plan.cfg.adapter.rho == 1:
        return {}
    ranks = {site.name: site.recipe.r for site in plan.sites if site.recipe is not None}
    return {f"spectra/{site}/allocated_rank": rank for site, rank in ranks.items()}


def _save_cost(trial: Trial) -> None:
    """Writes what the training cost to cost.json, and logs it to W&B."""
    if cost := trial.cost.measured:
        write_atomic(trial.run.path / COST, json.dumps(cost, indent=2) + "\n")
        trial.tracking.log_cost()


def _select(trial: Trial) -> None:
    """Logs the best validation. With select=best its weights become the run's result.

    The last weights are kept in adapter_last/ (or model_last/) then. The best validation's row is
    logged again: the last row of a metric is the result's, for all who read it.
    """
    selection, module, tracking = trial.selection, trial.module, trial.tracking
    assert module.final_step is not None
    if best := selection.best_row():
        tracking.log(best, int(module.final_step["step"]))
    if selection.best and not selection.best.row:
        log.warning("%s was NaN in each validation: the last weights stay", selection.best.metric)
    if not selection.weights:
        return
    assert selection.best is not None
    step, epoch = (selection.best.row[name] for name in ("step", "epoch"))
    if step != module.final_step["step"]:
        save_weights(module.model, trial.run.path, "_last")
        module.model.load_state_dict(selection.weights, strict=False)
        module.final_step = {"step": step, "epoch": epoch}
        trial.spectra_callback.end_at(epoch, int(step))
        row = {key: value for key, value in selection.best.row.items() if key != "step"}
        tracking.log(row, int(step))


def _check_merge(trainer: pl.Trainer, trial: Trial) -> None:
    """Logs the merged model's validation metrics, and checks that unmerging restores the base.

    Where a site's weight is quantized, nothing can be merged, and the log says so.

    ΔW that is too large for the weights' dtype, as float16, merges not: the log says so, and the
    run goes on without these metrics. Raises AdapterError unless each weight of the base is again
    what it was, bit for bit.
    """
    module = trial.module
    changed = adapters.attached(module.model)
    layers = [(layer_of(module.model, site, one), one.parameter) for site, one in changed.items()]
    if any(is_quantized(layer, parameter) for layer, parameter in layers):
        log.info("merging is not checked: the base is quantized, and cannot hold W + ΔW")
        return
    try:
        adapters.merge(module.model)
    except AdapterError as error:
        log.error("the adapter is stored, and cannot be merged: %s", error)
        return
    module.prefix = "merged/"
    trainer.validate(module, trial.data, verbose=False)
    adapters.unmerge(module.model)
    assert isinstance(trial.base, BaseWeights)
    if changed := [*merged_adapters(module.model), *trial.base.changed()]:
        raise AdapterError(f"'{changed[0]}' is not the base's any more after merge and unmerge")
