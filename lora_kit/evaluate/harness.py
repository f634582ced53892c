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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_kit.data import Dataset
from lora_kit.errors import BadInputError
from lora_kit.evaluate.code import score_humaneval
from lora_kit.evaluate.humaneval import STOPS
from lora_kit.evaluate.local_tasks import members
from lora_kit.evaluate.results import EvalResult, TaskScore
from lora_kit.evaluate.samples import task_score
from lora_kit.evaluate.tasks import TaskPlan, plan_tasks

HUMANEVAL = "humaneval"
CODE_TOKENS = 1024  # of an answer: lm-eval's number


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
    fast: bool = True,
    unsafe_code: bool = False,
    keep_answers: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Score a model on tasks.

    Args:
        model: a transformers or peft model; left in the mode it was in.
        tokenizer: its tokenizer; left as it was.
        tasks: names ("hellaswag", "gsm8k", "mmlu", "humaneval", "addition", any of lm-eval's), or
            Datasets of generated rows, or a list of both (`plan_tasks`). Benchmarks are read from
            LORA_KIT_DATA where it has them, else from the hub.
        limit: the first so many items of each task; None for all.
        num_fewshot: worked examples before each question; None for the task's own number.
        batch_size: rows at once where `fast` is not used; log-probabilities take batch × tokens ×
            vocabulary × 4 bytes.
        seed: draws the shots and the bootstrap. The global random states are left as they were.
        chat_template: wrap each prompt as a user's turn of the tokenizer's chat template.
        adapter: False scores a peft model with its adapters disabled: its base.
        name: what to call the model in the result.
        fast: read what requests share once (`fast_model`) where the model's architecture allows
            it; the same numbers, sooner. The result's `model_kind` says which was used.
        unsafe_code: run what the model writes for HumanEval even where it cannot be isolated.
        keep_answers: a file for the answers while they come; where it exists, answers in it are
            not asked for again. It belongs to one model, loaded in one way.
        on_progress: called with (done, asked) requests now and then; without `fast` only where
            answers are kept, and `asked` is 0: not known.

    Returns:
        Per task: version, shots, template, source of the rows, every item's score, and each
        metric with standard error and 95 % interval.

    Raises:
        BadInputError: limit, num_fewshot or batch_size out of range, adapter=False without an
            adapter, a tokenizer that cannot be this model's, a likelihood that is no number; and
            what `plan_tasks` raises.
    """
    _check(model, tokenizer, limit, num_fewshot, batch_size, chat_template, adapter)
    start = time.perf_counter()
    wanted = [tasks] if isinstance(tasks, (str, Dataset)) else list(tasks)
    code, wanted = [t for t in wanted if t == HUMANEVAL], [t for t in wanted if t != HUMANEVAL]
    if len(code) > 1 or (code and num_fewshot):
        raise BadInputError("humaneval is given once, and without shots.")
    with quiet_lm_eval() as heard, _kept_state(model, tokenizer):
        plans = plan_tasks(wanted, limit, num_fewshot) if wanted or not code else []
        template = _template_name(tokenizer) if chat_template else "none"
        scores: dict[str, TaskScore] = {}
        with _adapters(model, adapter):
            lm, kind = _language_model(model, tokenizer, batch_size, fast, on_progress)
            # HFLM tells nobody how far it is, except what keeps its answers.
            told = on_progress if kind == "lm-eval" else None
            asked = _keep(lm, keep_answers, told)
            try:
                if code:  # first: where there is no sandbox, that is said before hours of work
                    answer = partial(_answer_code, asked, chat_template)
                    scores[HUMANEVAL] = score_humaneval(
                        answer,
                        chat=chat_template,
                        template=template,
                        limit=limit,
                        insist=unsafe_code,
                        seed=seed,
                        say=None,
                    )
                if plans:
                    found = _run(asked, plans, limit, num_fewshot, seed, chat_template)
                    for plan in plans:
                        score = task_score(plan, found, limit, template, seed)
                        scores[score.task] = score
            finally:
                if keep_answers:
                    asked.dbdict.commit()
    return EvalResult(
        tasks=scores,
        model=name or _model_name(model, adapter),
        harness=version("lm_eval"),
        seed=seed,
        seconds=time.perf_counter() - start,
        truncated=sum("Truncating" in message for message in heard),
        model_kind=kind,
        groups=_groups(wanted, scores),
    )


def _language_model(model, tokenizer, batch_size, fast, on_progress):
    """lm-eval's object around the model, and which of the two it is."""
    from lm_eval.models.huggingface import HFLM

    from lora_kit.evaluate.fast_model import FastLM
    from lora_kit.evaluate.fast_sizes import why_not_fast

    if fast and why_not_fast(model) is None:
        return FastLM(model, tokenizer, batch_size=batch_size, on_progress=on_progress), "fast"
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), "lm-eval"


def _keep(lm, path: Path | None, on_progress):
    if path is None:
        return lm
    from lora_kit.evaluate.kept_answers import KeptAnswers

    return KeptAnswers(lm, Path(path), on_progress and (lambda count: on_progress(count, 0)))


def _answer_code(lm, chat: bool, prompts: list[str]) -> list[str]:
    """Answers to HumanEval's prompts, asked for as lm-eval's `humaneval` does."""
    from lm_eval.api.instance import Instance

    if chat:
        prompts = [lm.apply_chat_template([{"role": "user", "content": p}]) for p in prompts]
    options = {
        "until": [] if chat else list(STOPS),
        "max_gen_toks": min(CODE_TOKENS, lm.max_length // 2),
        "do_sample": False,
    }
    return lm.generate_until(
        [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
    )


def _groups(wanted, scores: Mapping[str, TaskScore]) -> dict[str, tuple[str, ...]]:
    """The names given that stand for several tasks."""
    found = {}
    for name in wanted:
        inside = tuple(members(name)) if isinstance(name, str) else ()
        if len(inside) > 1 and all(task in scores for task in inside):
            found[name] = inside
    return found


def _run(lm, plans: list[TaskPlan], limit, num_fewshot, seed, chat_template) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` does, without its look at the machine.

    simple_evaluate also runs git, which complains outside a repository, and gathers a report on the
    environment at each call; a test holds the two to the same results.
    """
    import lm_eval
    import numpy as np
    import torch

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
        lm,
        {"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=True,  # simple_evaluate's default, not evaluate's
        log_samples=True,
    )


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
def quiet_lm_eval() -> Iterator[list[str]]:
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
