"""GLoRA for PyTorch models: inject, train a supernet, search, merge.

>>> model = glora.inject(timm.create_model("vit_base_patch16_224", pretrained=True), rank=8)
"""

from . import peft
from .adapter_file import load_adapter, save_adapter
from .backbones import features, load_backbone
from .config import LayerShape, PathConfig, SearchSpace
from .conv import GLoRAConv2d
from .conv1d import GLoRAConv1D
from .distributed import sync_gradients
from .evaluation import Metrics, evaluate, evaluate_merged
from .evolution import evolve, search
from .graphed_step import GraphedStep
from .injection import inject
from .layer import GLoRALayer, GLoRALinear
from .lycoris import load_lycoris, save_lycoris
from .merging import MergeReport, merge, unmerge
from .model_summary import Summary, summary
from .modules import glora_layers
from .official import load_official, official_paths, save_official
from .parameters import count_parameters, drop_unread_gradients, trainable_parameters
from .paths import get_paths, sample_paths, set_paths, using_paths
from .presets import PRESETS, Preset, apply_preset, preset_path
from .quantised import GLoRAQuantisedLinear
from .recipe import Recipe
from .search_result import SearchResult
from .search_settings import SearchSettings
from .selection import Candidate
from .training import TrainSummary, train
from .version import __version__

__all__ = [
    "PRESETS",
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
    "SearchResult",
    "SearchSettings",
    "SearchSpace",
    "Summary",
    "TrainSummary",
    "__version__",
    "apply_preset",
    "count_parameters",
    "drop_unread_gradients",
    "evaluate",
    "evaluate_merged",
    "evolve",
    "features",
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
