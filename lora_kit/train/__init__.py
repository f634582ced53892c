"""Fine-tuning: one function, `finetune`, whatever engine runs underneath."""

from lora_kit.train.finetune import TrainResult, finetune
from lora_kit.train.recipes import RECIPES, recipe, skill_adapter
from lora_kit.train.spec import ATTENTION, MLP, TrainSpec, choose_engine, target_modules

__all__ = [
    "ATTENTION",
    "MLP",
    "RECIPES",
    "TrainResult",
    "TrainSpec",
    "choose_engine",
    "finetune",
    "recipe",
    "skill_adapter",
    "target_modules",
]
