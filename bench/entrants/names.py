"""Who takes part, and the path on which ours computes what a peer does."""

from glora import PathConfig

FROZEN = "frozen"
LORA = "PEFT LoRA"
HIRA = "PEFT HiRA"
GLORA = "PEFT GLoRA"
LYCORIS = "LyCORIS GLoRA"
LYCORIS_BYPASS = "LyCORIS GLoRA, bypass"
ASSEMBLED = "assemble + F.linear"
OFFICIAL = "official formula"
OURS = "ours"
OURS_MATMUL = "ours, matmul"


def lora(rank: int) -> PathConfig:
    """The path of PEFT's LoRA at alpha = rank."""
    return PathConfig(B=f"lora_{rank}")


def hira(rank: int) -> PathConfig:
    """The path of PEFT's HiRA."""
    return PathConfig(A=f"lora_{rank}")


def all_low_rank(rank: int) -> PathConfig:
    """The path of PEFT's GLoRA with config_A_B and config_C "lora" and config_D_E "vector"."""
    return PathConfig(f"lora_{rank}", f"lora_{rank}", f"lora_{rank}", "vector", "vector")


def lycoris(rank: int) -> PathConfig:
    """The path of LyCORIS' glora (matmul product) at alpha = rank."""
    return PathConfig(f"lora_{rank}", f"lora_{rank}")
