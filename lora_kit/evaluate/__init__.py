"""Evaluation: scores with their uncertainty, and two models compared on the same items."""

from lora_kit.evaluate.harness import evaluate
from lora_kit.evaluate.items import everyday_items
from lora_kit.evaluate.results import Comparison, EvalResult, ItemScore, TaskScore, compare
from lora_kit.evaluate.statistics import Estimate, estimate

__all__ = [
    "Comparison",
    "Estimate",
    "EvalResult",
    "ItemScore",
    "TaskScore",
    "compare",
    "estimate",
    "evaluate",
    "everyday_items",
]
