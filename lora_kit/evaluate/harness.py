"""Evaluation with lm-eval, quietly and with every item kept.

`evaluate` wraps a model that is already loaded, runs tasks through lm-eval's own code and returns
scores with their uncertainty. lm-eval takes seconds to import, so it is imported when first used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import random
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError
from lora_kit.evaluate.results import EvalResult, ItemScore, TaskScore
from lora_kit.evaluate.statistics import Estimate, estimate
from lora_kit.evaluate.tasks import TaskPlan, plan_tasks


def evaluate(
    model,
    tokenizer,
    tasks: str | Dataset | Sequence[str | Dataset],
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat_template: bool = False,
    adapter: bool = True,
    name: str | None = None,
) -> EvalResult:
    """Score a model on tasks.

    Args:
        model: a transformers or peft model; left in the mode it was in.
        tokenizer: its tokenizer; left as it was.
        tasks: names ("hellaswag", "gsm8k", any of lm-eval's), or Datasets of generated rows, or a
            list of both. Names are read from LORA_KIT_DATA where it has them, else from the hub.
        limit: the first so many items of each task; None for all.
        num_fewshot: worked examples before each question; None for the task's own number.
        batch_size: rows at once; log-probabilities take batch × tokens × vocabulary × 4 bytes.
        seed: draws the shots and the bootstrap. The global random states are left as they were.
        chat_template: wrap each prompt as a user's turn of the tokenizer's chat template.
        adapter: False scores a peft model with its adapters disabled: its base.
        name: what to call the model in the result.

    Returns:
        Per task: version, shots, template, source of the rows, every item's score, and each
        metric with standard error and 95 % interval.

    Raises:
        BadInputError: limit, num_fewshot or batch_size out of range, adapter=False without an
            adapter, a tokenizer that cannot be this model's; and what `plan_tasks` raises.
    """
    _check(model, tokenizer, limit, num_fewshot, batch_size, chat_template, adapter)
    start = time.perf_counter()
    with _quiet_lm_eval() as heard, _kept_state(model, tokenizer):
        plans = plan_tasks(tasks, limit, num_fewshot)
        with _adapters(model, adapter):
            found = _run(
                model, tokenizer, plans, limit, num_fewshot, batch_size, seed, chat_template
            )
        template = _template_name(tokenizer) if chat_template else "none"
        scores = {
            plan.task.task_name: _task_score(plan, found, limit, template, seed) for plan in plans
        }
    return EvalResult(
        tasks=scores,
        model=name or _model_name(model, adapter),
        harness=version("lm_eval"),
        seed=seed,
        seconds=time.perf_counter() - start,
        truncated=sum("Truncating" in message for message in heard),
    )


def _run(
    model, tokenizer, plans: list[TaskPlan], limit, num_fewshot, batch_size, seed, chat_template
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` does, without its look at the machine.

    simple_evaluate also runs git, which complains outside a repository, and gathers a report on the
    environment at each call; a test holds the two to the same results.
    """
    import lm_eval
    import numpy as np
    import torch
    from lm_eval.models.huggingface import HFLM

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tasks = {plan.task.task_name: plan.task for plan in plans}
    for task in tasks.values():
        if num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return lm_eval.evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        {"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=True,  # simple_evaluate's default, not evaluate's
        log_samples=True,
    )


def _task_score(
    plan: TaskPlan, found: dict[str, Any], limit: int | None, template: str, seed: int
) -> TaskScore:
    name = plan.task.task_name
    samples, printed = found["samples"][name], found["results"][name]
    items = _items(samples)
    metrics = {}
    for key, value in printed.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr"):
            continue
        if all(key in item.scores for item in items):
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
    # A request's response is a text, a likelihood, or a pair (likelihood, was it the greedy one).
    responses = [r[0] for r in first["resps"]]
    generated = isinstance(responses[0], str)
    likelihoods = () if generated else tuple(float(_first(r)) for r in responses)
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


def _whole_set(value, stderr, n: int) -> Estimate:
    """A metric of the set as a whole, such as perplexity: lm-eval's error, a normal interval."""
    value = float(value)
    if not isinstance(stderr, (int, float)):
        return Estimate(value, None, value, value, n)
    return Estimate(value, float(stderr), value - 1.96 * stderr, value + 1.96 * stderr, n)


def _check(model, tokenizer, limit, num_fewshot, batch_size, chat_template, adapter) -> None:
    for what, value, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is None and what != "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadInputError(f"{what} must be a whole number from {least}, not {value!r}.")
    if not adapter and not hasattr(model, "disable_adapter"):
        raise BadInputError("adapter=False needs a peft model; this one has no adapter to disable.")
    if chat_template and not tokenizer.chat_template:
        raise BadInputError("This tokenizer has no chat template; leave chat_template=False.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise BadInputError(
            f"This tokenizer has {len(tokenizer):,} tokens and the model embeds {vocabulary:,}: "
            "they do not belong together."
        )


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[list[str]]:
    """Keep lm-eval's notices and progress bars out of sight; yield its warnings as a list."""
    from datasets.utils import logging as bars

    from lora_kit.models import quiet_libraries

    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = False, [listener]
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        # lm-eval's own progress bars have no switch that reaches all of them; they go to stderr.
        with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
            yield heard
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1], before[2]
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _kept_state(model, tokenizer) -> Iterator[None]:
    """Give back what lm-eval changes: the global random states, the model's mode, the padding."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    training, side, pad = model.training, tokenizer.padding_side, tokenizer.pad_token
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.train(training)
        tokenizer.padding_side = side
        if tokenizer.pad_token != pad:
            tokenizer.pad_token = pad


def _adapters(model, wanted: bool):
    return contextlib.nullcontext() if wanted else model.disable_adapter()


def _template_name(tokenizer) -> str:
    return "chat " + hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]


def _model_name(model, adapter: bool) -> str:
    base = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    base = base.rstrip("/").rsplit("/", 1)[-1]
    if adapter and hasattr(model, "disable_adapter"):
        return f"{base} + {model.active_adapter}"
    return base
