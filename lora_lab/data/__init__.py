"""What is learned: a data set a file, each drawing what the base learns and what comes after."""

from lora_lab.data.module import Data, Phase

__all__ = ["Data", "Phase"]
