"""What is learned: one data set per file, each with a phase for the base and one to adapt to."""

from lora_lab.data.module import Data, Phase

__all__ = ["Data", "Phase"]
