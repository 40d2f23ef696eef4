"""`shift` as one writes it without lora_lab: Hydra, Lightning, PEFT and W&B, in one file.

What the packed multirun is timed against. A job trains its base and then its adapter, both with the
sizes, steps, optimizer and validation of conf/experiment/shift.yaml, and saves the adapter. It does
less than a run of ours: no spectra, no merge check, no report; and nothing is on that costs time
and that such a script would not need (progress bar, Lightning's checkpoints).
"""

from dataclasses import asdict, dataclass
from typing import Any, cast

import hydra
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import wandb
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Config:
    """What can be set on the command line."""

    r: int = 1
    alpha: int = 1
    seed: int = 0
    data_seed: int = 0
    samples: int = 10_000
    in_features: int = 1001
    out_features: int = 1000
    batch_size: int = 128
    epochs: int = 100
    val_every: int = 10
    lr: float = 1e-3


ConfigStore.instance().store("usual", Config)


class Shift(pl.LightningDataModule):
    """y = x (θ + shift)."""

    def __init__(self, cfg: Config, shift: float):
        super().__init__()
        self.cfg = cfg
        draws = torch.Generator().manual_seed(cfg.data_seed)
        theta = torch.randn(cfg.in_features, cfg.out_features, generator=draws)
        x = torch.randn(cfg.samples, cfg.in_features, generator=draws)
        self.rows = TensorDataset(x, x @ (theta + shift))

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, all of them full."""
        return DataLoader(self.rows, batch_size=self.cfg.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """All rows."""
        return DataLoader(self.rows, batch_size=1024)


class Model(nn.Module):
    """One linear layer."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) → (B, out)."""
        return self.linear(x)


class Regression(pl.LightningModule):
    """A squared error, by Adam on whatever takes a gradient."""

    def __init__(self, model: nn.Module, lr: float, prefix: str = ""):
        super().__init__()
        self.model, self.lr, self.prefix = model, lr, prefix

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = F.mse_loss(self.model(x), y)
        self.log(f"{self.prefix}train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The mean loss of all rows."""
        x, y = batch
        self.log(f"{self.prefix}val/loss", F.mse_loss(self.model(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, fused as conf/optimizer/adam.yaml has it."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, self.lr, fused=True)


def trainer(cfg: Config, logger: WandbLogger) -> pl.Trainer:
    """As both phases have it."""
    return pl.Trainer(
        max_epochs=cfg.epochs,
        check_val_every_n_epoch=cfg.val_every,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


@hydra.main(version_base="1.3", config_path=None, config_name="usual")
def main(content: Any) -> None:
    """One job: base, adapter, files."""
    cfg = cast("Config", OmegaConf.to_object(content))
    folder = HydraConfig.get().runtime.output_dir
    logger = WandbLogger(
        project="usual", name=f"r{cfg.r}-seed{cfg.seed}", save_dir=folder, offline=True
    )
    logger.log_hyperparams(asdict(cfg))
    pl.seed_everything(cfg.seed, verbose=False)
    base = Model(cfg.in_features, cfg.out_features)
    trainer(cfg, logger).fit(Regression(base, cfg.lr, "base/"), Shift(cfg, shift=0))
    lora = LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, target_modules=["linear"])
    model = get_peft_model(cast("Any", base), lora)
    module, data, fit = Regression(model, cfg.lr), Shift(cfg, shift=1), trainer(cfg, logger)
    fit.validate(module, data, verbose=False)
    fit.fit(module, data)
    model.save_pretrained(f"{folder}/adapter")
    wandb.finish()


if __name__ == "__main__":
    main()
