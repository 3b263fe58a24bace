"""The paper's protocols, and own data, end to end: recipes as data, and runs in folders, which can be interrupted.

>>> specs = plan_runs(load_recipe("vtab1k"), "data/vtab-1k", datasets=["cifar"], weights="ViT-B_16.npz")
>>> train_run(Path("runs/vtab1k"), specs[0], torch.device("cuda"))
"""

from .checks import check_runs
from .devices import choose_device, process_group
from .folder import RunFolder, find_runs
from .recipes import RunRecipe, change_recipe, known_recipes, load_own_recipe, load_recipe, recipe_from_dict
from .spec import RunSpec, plan_own_runs, plan_runs
from .stages import SearchPlan, merge_run, refit_run, refit_settings, search_run, search_settings, train_run, winners
from .testing import evaluate_run

__all__ = [
    "RunFolder",
    "RunRecipe",
    "RunSpec",
    "SearchPlan",
    "change_recipe",
    "check_runs",
    "choose_device",
    "evaluate_run",
    "find_runs",
    "known_recipes",
    "load_own_recipe",
    "load_recipe",
    "merge_run",
    "plan_own_runs",
    "plan_runs",
    "process_group",
    "recipe_from_dict",
    "refit_run",
    "refit_settings",
    "search_run",
    "search_settings",
    "train_run",
    "winners",
]
