"""The data is what the model reads, and a short run trains. Run: python -m pytest"""

import subprocess
import sys
from pathlib import Path

from my_project.data import TurnedDigits
from my_project.model import Net

PROJECT = Path(__file__).parents[1]


def test_the_model_reads_the_data():
    data = TurnedDigits("adapt", batch_size=64, seed=0)
    train, val = data.draw()
    inputs, targets = train[:5]
    assert Net(**data.sizes, width=8)(inputs).shape == (5, 10)
    assert targets.min() >= 0
    assert len(train) + len(val) == 1797


def test_a_short_run(tmp_path: Path):
    settings = ["base.epochs=1", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
    settings += ["tracking=off", "figures=false", f"runs_dir={tmp_path}", f"bases_dir={tmp_path}"]
    command = [sys.executable, "-m", "lora_lab.cli", "train", "experiment=my_project", *settings]
    subprocess.run(command, cwd=PROJECT, check=True)
    assert [*tmp_path.glob("my_project/*/report/table.md")]
