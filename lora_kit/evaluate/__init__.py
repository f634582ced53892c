"""Evaluation: scores with their uncertainty, and two models compared on the same items."""

from lora_kit.evaluate.code import check_answers, estimate_pass_at_k, pass_at_k, score_humaneval
from lora_kit.evaluate.generation_metrics import (
    TextScore,
    embedding_similarity,
    exact_matches,
    matching_similarity,
    rouge,
)
from lora_kit.evaluate.harness import evaluate
from lora_kit.evaluate.humaneval import load_problems
from lora_kit.evaluate.items import everyday_items
from lora_kit.evaluate.results import Comparison, EvalResult, ItemScore, TaskScore, compare
from lora_kit.evaluate.sandbox import Limits, Outcome, check_function, run_program
from lora_kit.evaluate.statistics import Estimate, estimate

__all__ = [
    "Comparison",
    "Estimate",
    "EvalResult",
    "ItemScore",
    "Limits",
    "Outcome",
    "TaskScore",
    "TextScore",
    "check_answers",
    "check_function",
    "compare",
    "embedding_similarity",
    "estimate",
    "estimate_pass_at_k",
    "evaluate",
    "everyday_items",
    "exact_matches",
    "load_problems",
    "matching_similarity",
    "pass_at_k",
    "rouge",
    "run_program",
    "score_humaneval",
]
