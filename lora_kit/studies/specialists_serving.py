"""Three specialists over one base: who answers, what they weigh, and how long they take.

`run_route` asks the kit's router which specialist every item of every test should go to; what those
specialists score there, they scored in cells of their own (tests "all"), so that the routed score
of an item is the score its specialist had on it. `run_serve` holds three specialists in four ways
and times the same prompts: three whole models; one base with three adapters, switched; the same
with the router in front; one adapter for all. Bytes and seconds do not depend on the adapters'
values: they are random there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lora_kit.studies.specialists import TASKS_AT_HAND, Cell
from lora_kit.studies.specialists_cells import Found, heldout_prompts
from lora_kit.studies.specialists_tasks import AT_HAND, TESTS, missing_data

NOBODY = "-"  # the base answers
ROUTER_ROWS = 64
OWNER = {"gsm8k": "gsm8k", "words": "gsm8k", "humaneval": "code", "dialogue": "dialogue"}
SERVED, NEW_TOKENS, REPEATS = 8, 24, 3


def tasks_with_data(tasks: Sequence[str] = TASKS_AT_HAND) -> list[str]:
    """Those of the tasks whose training rows are at hand."""
    from lora_kit.studies.specialists_tasks import known_task

    return [task for task in tasks if not missing_data(known_task(task).needs)]


def fit_task_router(model, tokenizer, tasks: Sequence[str], seed: int, rows: int = ROUTER_ROWS):
    """The kit's router over the tasks' training prompts; layer, pooling and threshold are chosen on
    held-out prompts of the same tasks, never on a test's.

    Raises:
        BadInputError: fewer than two tasks.
    """
    from lora_kit.serve.router import fit_router

    prompts = {task: heldout_prompts(task, rows, seed) for task in tasks}
    fit, held = ({t: pair[i] for t, pair in prompts.items()} for i in (0, 1))
    return fit_router(model, tokenizer, fit, held)


def run_route(cell: Cell, say: Callable[[str], None]) -> Found:
    """Routes of every item of every test at hand, as a text of one letter an item in `routes`: the
    first letter of its task, or "-" for the base."""
    from lora_kit.models import load_model
    from lora_kit.studies.specialists_generations import fingerprint_items

    loaded = load_model(cell.model)
    router = fit_task_router(loaded.model, loaded.tokenizer, tasks_with_data(), cell.seed)
    best = router.choices[0]
    found = Found(model=loaded.record())
    found.parameters = {"layer": router.layer, "pooling": router.pooling, "groups": 3}
    found.metrics["heldout_right"] = best.right
    table = found.tables.setdefault("routes", [])
    asked, spent = 0, 0.0
    for name in AT_HAND:
        test = TESTS[name]
        if test.judge == "choice" or missing_data(test.needs):
            continue
        items = test.items()[: cell.limit or None]
        began = time.perf_counter()
        routes = router.route(loaded.model, loaded.tokenizer, [row["prompt"] for row in items])
        asked, spent = asked + len(items), spent + time.perf_counter() - began
        names = [r.adapter for r in routes]
        right = sum(n == OWNER[name] for n in names) / len(names)
        found.metrics[f"{name} routed right"] = right
        table.append(
            {
                "test": name,
                "n": len(items),
                "items": fingerprint_items(test, items),
                "routes": "".join(n[0] if n else NOBODY for n in names),
            }
        )
        say(f"{cell.name}: {name} routed right {right:.3f}")
    found.metrics["seconds_a_prompt"] = spent / asked
    return found


# ------------------------------------------------------------------ bytes and seconds


def run_serve(cell: Cell, say: Callable[[str], None]) -> Found:
    """Bytes held, and seconds for the same prompts, of the four ways in the module's text."""
    from lora_kit.lora import LoraSpec, add_lora, switch_lora
    from lora_kit.models import load_model

    loaded = load_model(cell.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = serving_prompts(tokenizer)
    names = list(prompts)
    found = Found(model=loaded.record(), parameters={"tasks": names, "rows_each": SERVED})
    base = held_bytes([model])
    found.metrics["bytes base"] = float(base)
    whole = _seconds(lambda: [_answers(model, tokenizer, prompts[n]) for n in names])
    found.metrics["seconds three models"] = whole
    router = fit_prompt_router(model, tokenizer, prompts)
    for number, name in enumerate(names):
        add_lora(model, LoraSpec(cell.rank, cell.alpha, cell.placement), name, seed=number)
    _fill(model)
    found.metrics["bytes three adapters"] = float(held_bytes([model]) - base)
    found.metrics["bytes one adapter"] = (held_bytes([model]) - base) / len(names)
    others = [load_model(cell.model).model for _ in names[1:]]
    found.metrics["bytes three models"] = float(base + held_bytes(others))
    del others

    def switched(groups: dict[str, list[str]]) -> None:
        for name, some in groups.items():
            switch_lora(model, name)
            _answers(model, tokenizer, some)

    def routed() -> None:
        flat = [p for some in prompts.values() for p in some]
        groups: dict[str, list[str]] = {}
        for prompt, route in zip(flat, router.route(model, tokenizer, flat), strict=True):
            groups.setdefault(route.nearest, []).append(prompt)
        switched(groups)

    found.metrics["seconds three adapters"] = _seconds(lambda: switched(prompts))
    found.metrics["seconds routed"] = _seconds(routed)
    flat = [p for some in prompts.values() for p in some]
    found.metrics["seconds one adapter for all"] = _seconds(lambda: switched({names[0]: flat}))
    found.metrics["seconds to switch"] = _seconds(
        lambda: [switch_lora(model, n) for n in names * 4], each=4 * len(names)
    )
    found.metrics["seconds to load a model"] = _seconds(lambda: load_model(cell.model), repeats=2)
    say(f"{cell.name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.metrics.items()))
    return found


def serving_prompts(tokenizer, each: int = SERVED) -> dict[str, list[str]]:
    """Prompts of three tasks to time: those at hand, filled up with generated ones."""
    from lora_kit.studies.specialists_tasks import draw_words
    from lora_kit.word_problems import PROMPT

    found = {t: heldout_prompts(t, 2 * each, 0)[0] for t in tasks_with_data()}
    spare = {
        "words": [row["prompt"] for row in draw_words("words", 2 * each, 0)],
        "sums": [row["prompt"] for row in draw_words("sums", 2 * each, 0)],
        "reversed": [PROMPT.format(question=f"Spell {n} backwards.") for n in range(2 * each)],
    }
    for name, prompts in spare.items():
        if len(found) < 3:
            found[name] = prompts
    return {name: prompts[:each] for name, prompts in list(found.items())[:3]}


def fit_prompt_router(model, tokenizer, prompts: dict[str, list[str]]):
    """A router for timing: half of the prompts fit it, half choose its layer."""
    from lora_kit.serve.router import fit_router

    half = {name: len(some) // 2 for name, some in prompts.items()}
    fit = {name: some[: half[name]] for name, some in prompts.items()}
    return fit_router(model, tokenizer, fit, {n: s[half[n] :] for n, s in prompts.items()})


def held_bytes(models: Sequence) -> int:
    """Bytes of the parameters and buffers of models, tensors that share storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _fill(model) -> None:
    """Give every adapter a B that is not zero, as a trained one has."""
    from lora_kit.lora import lora_layers

    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name in layer.specs:
                layer.lora_B[name].normal_(std=1e-3)


def _answers(model, tokenizer, prompts: Sequence[str]) -> None:
    """Answers of NEW_TOKENS tokens each, none of them cut short."""
    from lora_kit.evaluate import fast_generation
    from lora_kit.studies.specialists_measures import answering, encode_prompts

    weight = model.get_input_embeddings().weight
    how = replace(answering(model, tokenizer), end_ids=())
    half = weight.dtype != torch.float32
    with torch.autocast(weight.device.type, weight.dtype, enabled=half):
        ids = encode_prompts(model, tokenizer, prompts, NEW_TOKENS)
        fast_generation.answer(how, ids, (), NEW_TOKENS)


def _seconds(work: Callable[[], object], repeats: int = REPEATS, each: int = 1) -> float:
    """Median seconds of `work` after one call to warm up, over `each`."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / each)
    return statistics.median(times[1:])
