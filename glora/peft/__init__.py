"""Hugging Face PEFT: its layers made faster, its adapter folders read and written.

Importing this loads no PEFT; :func:`accelerate` does, the exchange of folders needs none.

>>> with accelerate(peft.get_peft_model(model, peft.GloraConfig(r=8))):
...     train()
"""

from .acceleration import Acceleration, accelerate
from .exporting import export_peft
from .importing import import_peft
from .lora_export import ExportedLayer, LoRAExport, export_lora

__all__ = ["Acceleration", "ExportedLayer", "LoRAExport", "accelerate", "export_lora", "export_peft", "import_peft"]
