"""From lm-eval's log of samples to our scores: every item kept, every metric with its interval."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from lora_kit.errors import BadInputError
from lora_kit.evaluate.results import ItemScore, TaskScore
from lora_kit.evaluate.statistics import Estimate, estimate, ratio
from lora_kit.evaluate.tasks import TaskPlan

# Metrics of all texts together: f(Σℓ/Σw), of each text's log-likelihood ℓ and words or bytes w.
OF_TEXTS = {
    "word_perplexity": ("words", lambda x: math.exp(-x)),
    "byte_perplexity": ("bytes", lambda x: math.exp(-x)),
    "bits_per_byte": ("bytes", lambda x: -x / math.log(2)),
}


def task_score(
    plan: TaskPlan, found: dict[str, Any], limit: int | None, template: str, seed: int
) -> TaskScore:
    """A task's score from what `lm_eval.evaluate` returned."""
    name = plan.task.task_name
    samples, printed = found["samples"][name], found["results"][name]
    items = _items(samples)
    metrics = {}
    for key, value in printed.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr"):
            continue
        if metric in OF_TEXTS and all("loglikelihood" in item.scores for item in items):
            metrics[key] = _of_texts(metric, items, seed)
        elif all(key in item.scores for item in items):
            metrics[key] = estimate([item.scores[key] for item in items], seed=seed)
        else:
            metrics[key] = _whole_set(value, printed.get(f"{metric}_stderr,{kept}"), len(items))
    return TaskScore(
        task=name,
        version=str(found["versions"][name]),
        num_fewshot=int(found["n-shot"][name]),
        limit=limit,
        available=plan.available,
        template=template,
        data=plan.data,
        metrics=metrics,
        items=items,
    )


def _items(samples: list[dict]) -> tuple[ItemScore, ...]:
    """One ItemScore for each row; lm-eval logs a row once for each answer filter."""
    rows: dict[int, list[dict]] = {}
    for sample in samples:
        rows.setdefault(sample["doc_id"], []).append(sample)
    return tuple(_item(i, rows[i]) for i in sorted(rows))


def _item(i: int, logged: list[dict]) -> ItemScore:
    first = logged[0]
    scores = {
        f"{metric},{sample['filter']}": float(sample[metric])
        for sample in logged
        for metric in sample["metrics"]
        if isinstance(sample[metric], (int, float)) or hasattr(sample[metric], "item")
    }
    for metric, (unit, _) in OF_TEXTS.items():
        if isinstance(first.get(metric), (tuple, list)):
            scores |= {"loglikelihood": float(first[metric][0]), unit: float(first[metric][1])}
    # A request's response is a text, a likelihood, or a pair (likelihood, was it the greedy one).
    responses = [r[0] for r in first["resps"]]
    generated = isinstance(responses[0], str)
    likelihoods = () if generated else tuple(float(_first(r)) for r in responses)
    if not all(map(math.isfinite, likelihoods)):
        raise BadInputError(
            f"The model gives item {i} of {first['arguments'][0][0][-40:]!r} a log-likelihood that "
            "is no number; look for NaN or overflow in its weights or its adapter."
        )
    identity = f"{first['doc_hash']}/{first['prompt_hash']}/{first['target_hash']}"
    return ItemScore(
        id=i,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:16],
        prompt=str(first["arguments"][0][0]),
        target=str(first["target"]),
        scores=scores,
        loglikelihoods=likelihoods,
        answer=responses[0] if generated else None,
    )


def _first(response):
    return response[0] if isinstance(response, (tuple, list)) else response


def _of_texts(metric: str, items: Sequence[ItemScore], seed: int) -> Estimate:
    """A metric of OF_TEXTS. They fall where the likelihood rises: the bounds change places."""
    unit, measure = OF_TEXTS[metric]
    found = ratio(
        [item.scores["loglikelihood"] for item in items],
        [item.scores[unit] for item in items],
        seed=seed,
    )
    value, low, high = (measure(x) for x in (found.value, found.high, found.low))
    stderr = found.stderr and abs(measure(found.value + found.stderr) - value)
    return Estimate(value, stderr, low, high, found.n)


def _whole_set(value, stderr, n: int) -> Estimate:
    """A metric of the set as a whole, such as perplexity: lm-eval's error, a normal interval."""
    value = float(value)
    if not isinstance(stderr, (int, float)):
        return Estimate(value, None, value, value, n)
    return Estimate(value, float(stderr), value - 1.96 * stderr, value + 1.96 * stderr, n)
