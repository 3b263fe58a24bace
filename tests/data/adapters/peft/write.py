"""Writes this folder anew: a small adapter as PEFT itself saves it, and what the adapted model computes.

    python -m tests.data.adapters.peft.write

It is committed, and not to be written again without need: the test is to read what this version of PEFT wrote.
"""

from pathlib import Path

from safetensors.torch import save_file

from tests.glora.peft_toys import adapted, glora_config, tokens
from tests.glora.toys import mlp

FOLDER = Path(__file__).parent


def main() -> None:
    base, x = mlp().state_dict(), tokens()
    model = adapted(glora_config(modules_to_save=["head"]))
    model.base_model.model.head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink()
    expected = {"x": x, "y": model(x).detach(), **{f"base.{name}": tensor for name, tensor in base.items()}}
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
