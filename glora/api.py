"""The public names, of which ``glora`` is made when the first of them is used."""

from . import peft
from .backbones import features, load_backbone
from .balancing import Balance, balance, fold_scales
from .config import LayerShape, PathConfig, SearchSpace
from .distributed import sync_gradients
from .evaluation import Metrics, evaluate, evaluate_merged
from .evolution import Candidate, SearchResult, SearchSettings, evolve, search
from .formats import (
    load_adapter,
    load_lycoris,
    load_official,
    official_paths,
    save_adapter,
    save_lycoris,
    save_official,
)
from .graphs import GraphedStep
from .injection import inject
from .layers import GLoRAConv1D, GLoRAConv2d, GLoRALayer, GLoRALinear, GLoRAQuantisedLinear
from .merging import MergeReport, merge, unmerge
from .model_summary import Summary, print_trainable_parameters, summary
from .models import glora_layers
from .parameters import count_parameters, drop_unread_gradients, trainable_parameters
from .paths import disabled, get_paths, sample_paths, set_paths, using_paths
from .peft import export_lora
from .presets import PRESETS, Preset, apply_preset, preset_path
from .refitting import refit
from .scales import Scales
from .training import Recipe, TrainSummary, train
from .version import __version__

__all__ = [
    "PRESETS",
    "Balance",
    "Candidate",
    "GLoRAConv1D",
    "GLoRAConv2d",
    "GLoRALayer",
    "GLoRALinear",
    "GLoRAQuantisedLinear",
    "GraphedStep",
    "LayerShape",
    "MergeReport",
    "Metrics",
    "PathConfig",
    "Preset",
    "Recipe",
    "Scales",
    "SearchResult",
    "SearchSettings",
    "SearchSpace",
    "Summary",
    "TrainSummary",
    "__version__",
    "apply_preset",
    "balance",
    "count_parameters",
    "disabled",
    "drop_unread_gradients",
    "evaluate",
    "evaluate_merged",
    "evolve",
    "export_lora",
    "features",
    "fold_scales",
    "get_paths",
    "glora_layers",
    "inject",
    "load_adapter",
    "load_backbone",
    "load_lycoris",
    "load_official",
    "merge",
    "official_paths",
    "peft",
    "preset_path",
    "print_trainable_parameters",
    "refit",
    "sample_paths",
    "save_adapter",
    "save_lycoris",
    "save_official",
    "search",
    "set_paths",
    "summary",
    "sync_gradients",
    "train",
    "trainable_parameters",
    "unmerge",
    "using_paths",
]
