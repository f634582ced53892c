"""Fine-tuning: one function, `finetune`, whatever engine runs underneath."""

from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.heldout import heldout_loss
from lora_kit.train.recipes import RECIPES, recipe, skill_adapter, skill_rows
from lora_kit.train.spec import TrainSpec, choose_engine

__all__ = [
    "RECIPES",
    "TrainResult",
    "TrainSpec",
    "choose_engine",
    "finetune",
    "heldout_loss",
    "recipe",
    "skill_adapter",
    "skill_rows",
]
