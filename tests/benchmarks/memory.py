"""Peak memory of a run over a pretrained base of 400M parameters, beside the size of its weights.

The base is a random Llama, written to a folder. The peak (Linux's VmHWM) is that of a process of
its own, less that of a run over a tiny base. A batch is 4 rows of 8 tokens, so that activations
are few. Wanted: below 1.3 × the weights.

Run: python -m tests.benchmarks.memory
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lora_lab.cli import main as cli
from tests.tiny_models import tiny_model

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 22}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 16000}

SETTINGS = [
    *("name=memory", "data=digits", "data._target_=tests.words.Words", "data.batch_size=4"),
    *("model=pretrained", "model.head=classification", "base=pretrained", "target=linear"),
    *("target.linear.match=[*.q_proj,*.v_proj]", "also_train=[score]", "trainer.max_epochs=1"),
    *("trainer.accelerator=cpu", "tracking=off", "figures=false", "+trainer.limit_train_batches=1"),
    *("+trainer.limit_val_batches=1", "spectra.truncation=none", "spectra.against_base=false"),
]


def peak(*settings: str) -> float:
    """The peak memory in bytes of `lora-lab train` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", *settings]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def main() -> None:
    """Prints the peaks beside the weights, and exits with 1 where a run takes too much."""
    if len(sys.argv) > 1:
        sys.argv[1:] = ["train", *sys.argv[1:]]
        cli.main()
        # Not getrusage's ru_maxrss, in which a process begins with the peak of its parent.
        status = Path("/proc/self/status").read_text().split()
        print(1024 * int(status[status.index("VmHWM:") + 1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model("llama", folder / "large", "language", **SIZES)
        tiny_model("llama", folder / "small", "language")
        weights = (folder / "large/model.safetensors").stat().st_size
        places = [f"runs_dir={folder}/runs", f"bases_dir={folder}/bases"]
        started = time.time()
        peaks = {
            model: peak(*SETTINGS, *places, f"model.path={folder}/{model}")
            for model in ("small", "large")
        }
    taken = peaks["large"] - peaks["small"]
    print(f"weights {weights / 1e9:.2f} GB; a run takes {taken / 1e9:.2f} GB more than one over a")
    print(f"tiny base ({peaks['small'] / 1e9:.2f} GB): {taken / weights:.2f} × the weights")
    print(f"{time.time() - started:.0f} s for both runs")
    sys.exit(taken > 1.3 * weights)


if __name__ == "__main__":
    main()
