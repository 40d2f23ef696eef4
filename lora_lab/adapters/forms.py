"""The table of what an adapter can be made of."""

from lora_lab.adapters.adalora import AdaLoRA
from lora_lab.adapters.form import Form
from lora_lab.adapters.loha import LoHa
from lora_lab.adapters.lokr import LoKr
from lora_lab.adapters.relora import ReLoRA
from lora_lab.adapters.vera import VeRA

FORMS: dict[str, Form | None] = {
    "lora": None,
    "vera": VeRA(),
    "loha": LoHa(),
    "lokr": LoKr(),
    "lokr_both": LoKr(both=True),
    "adalora": AdaLoRA(),
    "relora": ReLoRA(),
}
"""All forms by name. "lora" is that of `Adapter` itself: two factors, or a core between them."""
