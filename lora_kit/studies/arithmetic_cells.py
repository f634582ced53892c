"""Cells of the addition study: one setting of one method with one seed, from rows to a record.

    base               the model as it comes, `shots` solved sums before each question
    plain, reversed, both_reversed, scratchpad, hinted     LoRA on sums in a form of `arithmetic`
    self_improvement   LoRA on `form`, then rounds in which the model's own answers to sums one
                       digit longer, filtered without the true sums, join its training rows

Every method of a seed is asked the same held-out sums. A cell that was cut off carries on: adapters
have checkpoints, answers and rounds are files in the cell's folder.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.arithmetic import FORMS, find_form, in_form, operands
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, LoraKitError, unknown_name
from lora_kit.studies.arithmetic_asking import answer, kept_answers
from lora_kit.studies.records import Record, new_record

STUDY = "10_arithmetic"
LEAST_KEPT = 50  # answers of a round, below which nothing more is learnt from them
GRIDS = ("benchmarks/grids/arithmetic.yaml", "benchmarks/grids/arithmetic-cpu.yaml")
METHODS = ("base", *FORMS, "self_improvement")
DEFAULTS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "method": "plain",  # a name of METHODS
    "form": "reversed",  # of base and self_improvement
    "prompt": "bare",  # bare or instruct
    "shots": 0,  # solved sums before a question, for base
    "most_trained": 7,  # digits; every length from 1 equally often
    "most_tested": 14,  # digits
    "train_rows": 5500,  # of each length
    "test_rows": 500,  # of each length, as far as there are so many
    "steps": 300,  # 0 for one epoch
    "rows_a_step": 128,
    "learning_rate": 1e-3,
    "rank": 32,
    "dropout": 0.1,
    "targets": "all",
    "quantization": "nf4",  # nf4 or none
    "rounds": 7,  # of self_improvement, each a digit longer
    "round_rows": 2000,  # sums the model is asked in a round, before the filter
    "round_steps": 75,
}


def check_setting(values: Mapping[str, Any]) -> None:
    """Look at a whole setting before anything runs.

    Raises:
        UnknownNameError, BadInputError: says what is wrong.
    """
    from lora_kit.arithmetic import PROMPTS

    if values["method"] not in METHODS:
        raise unknown_name("method", values["method"], METHODS)
    form = find_form(form_of(values))
    if values["prompt"] not in PROMPTS:
        raise BadInputError(
            f"prompt must be one of {', '.join(PROMPTS)}, not {values['prompt']!r}."
        )
    if form.most_digits and values["most_tested"] > form.most_digits:
        raise BadInputError(f"{form.name} writes at most {form.most_digits} digits.")
    least = ("most_trained", "train_rows", "test_rows", "rows_a_step", "round_rows", "round_steps")
    if min(values[name] for name in least) < 1:
        raise BadInputError(f"{', '.join(least)} must be at least 1.")
    if min(values[name] for name in ("steps", "shots", "rounds")) < 0:
        raise BadInputError("steps (0: one epoch), shots and rounds must be 0 or more.")
    if values["most_tested"] < values["most_trained"]:
        raise BadInputError("most_tested must be most_trained or more.")
    if values["shots"] and values["method"] != "base":
        raise BadInputError("shots are for the method base: a tuned model is asked as it learnt.")


def form_of(values: Mapping[str, Any]) -> str:
    """The form a method's sums are written in."""
    free = values["method"] in ("base", "self_improvement")
    return values["form"] if free else values["method"]


def command(values: Mapping[str, Any]) -> str:
    """What a reader types to make such a record: the grid of the kit that has the setting."""
    from lora_kit.studies.sweep_grid import read_grid, settings_of

    for grid in GRIDS:
        try:
            settings = settings_of(read_grid(store.repository() / grid))
        except LoraKitError:
            continue  # installed without its checkout
        if any({**DEFAULTS, **setting} == dict(values) for setting in settings):
            return f"lora-kit sweep arithmetic --grid {grid}"
    return "lora-kit sweep arithmetic --grid GRID, a list with these parameters in GRID"


# ------------------------------------------------------------------ rows


def sums(values: Mapping[str, Any], seed: int) -> tuple[list[dict], list[dict]]:
    """(training, test) rows of plain sums; see `addition_lengths.addition_rows`. The test rows
    depend on lengths, `test_rows` and the seed alone, so methods can be paired item by item."""
    from lora_kit.studies.addition_lengths import addition_rows

    train, test = addition_rows(
        values["most_trained"],
        values["most_tested"],
        values["train_rows"],
        values["test_rows"],
        seed,
    )
    return list(train.rows), list(test.rows)


def examples(values: Mapping[str, Any], seed: int, test: Sequence[Mapping]) -> dict[int, list]:
    """For each length `shots` solved sums that are not asked."""
    from lora_kit.skills import draw_skill

    if not values["shots"]:
        return {}
    asked = [row["prompt"] for row in test]
    lengths = range(1, values["most_tested"] + 1)
    drawn = draw_skill("addition", lengths, values["shots"], seed + 1_000_003, exclude=asked)
    return {k: [row for row in drawn if row["digits"] == k] for k in lengths}


# ------------------------------------------------------------------ training


def tuning_spec(values: Mapping[str, Any], seed: int):
    """The paper's recipe with the setting's values. Checkpointing is off: it saves memory that a
    small model does not need, and rules out CUDA graphs beside dropout."""
    from lora_kit.train.recipes import recipe

    return recipe(
        "alwadhi",
        seed=seed,
        steps=values["steps"],
        batch_size=values["rows_a_step"],
        learning_rate=values["learning_rate"],
        rank=values["rank"],
        alpha=values["rank"],
        dropout=values["dropout"],
        targets=values["targets"],
        quantization=values["quantization"],
        checkpointing=False if "135m" in values["model"] else "auto",
    )


def tuned(values, seed: int, folder: Path, rows: Sequence[Mapping]):
    """(model with its adapter, tokenizer, TrainResult, the base's record): trained, or taken from
    the cell's folder."""
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model
    from lora_kit.train.finetune import finetune

    spec = tuning_spec(values, seed)
    pairs = tuple({"prompt": r["prompt"], "completion": r["completion"]} for r in rows)
    data = Dataset(f"addition-{form_of(values)}", "train", pairs, "generated", f"seed {seed}")
    made = finetune(values["model"], data, spec, output=folder / "adapter", engine="native")
    loaded = load_model(values["model"], quantization=values["quantization"])
    load_lora(loaded.model, made.adapter)
    return loaded, made


def check_answers(
    texts: Sequence[str], swapped: Sequence[str], digits: int, form: str
) -> list[bool]:
    """The filter of self-improvement, which never sees a true sum: which answers to questions of
    `digits` digits are worth learning from.

    One stays if (1) it is an answer and nothing else; (2) what it says has `digits` or
    `digits` + 1 places, no leading zero, and begins with 1 where it is longer, as every sum of two
    such numbers does; (3) the model says the same of b + a: one truth, but slips that hang on what
    stands where do not agree.
    """
    read, kept = find_form(form).read, []
    for text, other in zip(texts, swapped, strict=True):
        found = read(text)
        alone = re.fullmatch(r"[0-9a-z+=;]+", text.strip()) is not None
        fits = len(found) == digits or (len(found) == digits + 1 and found[0] == "1")
        leads = digits > 1 and found.startswith("0")
        kept.append(alone and fits and not leads and found == read(other))
    return kept


def improve(values, seed: int, folder: Path, loaded, rows: list[dict], say=print) -> list[dict]:
    """The rounds of self-improvement; changes the model in place, returns a row for each round.

    Round j asks `round_rows` new sums of most_trained + j digits, keeps what `check_answers` lets
    pass, and trains on as many true rows of the trained lengths as own answers (`round_rows`). How
    many of the kept answers are true is recorded, and used for nothing. The rounds end where fewer
    than LEAST_KEPT are kept.
    """
    from lora_kit.lora import load_lora, remove_lora, save_lora
    from lora_kit.skills import draw_skill
    from lora_kit.train import engines
    from lora_kit.train.finetune import encode_rows

    form, told, own = values["form"], [], {}
    asked_later = [row["prompt"] for row in sums(values, seed)[1]]
    places = [folder / f"round-{j:02d}" for j in range(1, values["rounds"] + 1)]
    done = sum((place / "round.json").exists() for place in places)
    if done:
        remove_lora(loaded.model)
        load_lora(loaded.model, places[done - 1])
    for number, place in enumerate(places, start=1):
        k = values["most_trained"] + number
        drawn = draw_skill("addition", k, values["round_rows"], seed + 7_000_003, asked_later)
        asked = in_form(drawn.rows, form, values["prompt"])
        if number <= done:
            texts = store.read_json(place / "round.json")["kept"]
        else:
            pairs = [operands(row) for row in drawn]
            back = [{**r, "prompt": f"{b}+{a}="} for r, (a, b) in zip(drawn, pairs, strict=True)]
            said = [
                answer(loaded.model, loaded.tokenizer, questions, form)
                for questions in (asked, in_form(back, form, values["prompt"]))
            ]
            good = check_answers(*said, k, form)
            texts = [text if fine else "" for text, fine in zip(said[0], good, strict=True)]
        mine = [(row, text) for row, text in zip(asked, texts, strict=True) if text]
        own[k] = [{"prompt": row["prompt"], "completion": text} for row, text in mine]
        right = sum(find_form(form).read(text) == row["sum"] for row, text in mine)
        told.append({"round": number, "digits": k, "asked": len(asked), "kept": len(mine)})
        told[-1]["true_among_kept"] = right
        say(f"round {number}: {len(mine)} of {len(asked)} answers of {k} digits kept")
        if len(mine) < LEAST_KEPT:
            break
        if number > done:
            spec = replace(tuning_spec(values, seed + number), steps=values["round_steps"])
            mixed = round_rows(rows, own, spec.steps * spec.batch_size, seed)
            encoded = encode_rows(mixed, loaded.tokenizer, spec)
            engines.train_native(loaded.model, loaded.tokenizer, encoded, spec, spec.steps)
            with store.new_folder(place) as part:
                save_lora(loaded.model, part)
                store.write_json(part / "round.json", {"kept": texts})
    return told


def round_rows(
    rows: Sequence[Mapping], longer: Mapping[int, Sequence[Mapping]], wanted: int, seed: int
) -> Dataset:
    """`wanted` rows of a round's training, drawn with replacement: half true ones, a quarter own
    answers of the newest length, a quarter of the older ones (while there are none, the newest)."""
    rng = random.Random(f"round/{seed}/{max(longer)}")
    newest = list(longer[max(longer)])
    older = [row for k, some in longer.items() if k != max(longer) for row in some]
    parts = [(rows, wanted // 2), (newest, wanted // 4), (older or newest, wanted // 4)]
    drawn = [
        {"prompt": r["prompt"], "completion": r["completion"]}
        for some, n in parts
        for r in rng.choices(some, k=n)
    ]
    return Dataset("addition-own-answers", "train", tuple(drawn), "generated", f"seed {seed}")


# ------------------------------------------------------------------ a cell


def run_cell(parameters: dict[str, Any], seed: int, folder: Path) -> Record:
    """Run one setting with one seed.

    Args:
        parameters: DEFAULTS with what differs.
        seed: of rows, adapter and order.
        folder: the cell's own; what is there already is not done again.

    Returns:
        A record of study STUDY: exact accuracy within and beyond the trained lengths; tables
        `lengths`, `places`, `carries`, `items` (see `arithmetic_scores`), `rounds` of
        self-improvement, and a few `answers` as they were written.
    """
    from lora_kit.hardware import PeakMemory
    from lora_kit.models import load_model

    values = {**DEFAULTS, **parameters}
    check_setting(values)
    started, folder = time.perf_counter(), Path(folder)
    train, test = sums(values, seed)
    form = form_of(values)
    shown = examples(values, seed, test)
    questions = in_form(test, form, values["prompt"], shown)
    made, rounds, data = None, [], None
    with PeakMemory() as memory:
        if values["method"] == "base":
            loaded = load_model(values["model"], quantization=values["quantization"])
        else:
            rows = in_form(train, form, values["prompt"])
            loaded, made = tuned(values, seed, folder, rows)
            data = made.data
            if values["method"] == "self_improvement":
                rounds = improve(values, seed, folder, loaded, rows)
        said = kept_answers(
            folder / "answers.json",
            lambda: answer(loaded.model, loaded.tokenizer, questions, form),
            {"parameters": values, "seed": seed},
        )
    return score_cell(
        values, seed, said, questions, test,
        seconds=time.perf_counter() - started,
        training=made,
        peak_memory_bytes=max(memory.peak, made.peak_memory if made else 0),
        model=loaded.record(),
        data=data,
        rounds=rounds,
    )  # fmt: skip


def score_cell(
    values, seed, said, questions, test, seconds, training=None, rounds=(), **facts
) -> Record:
    """The record of a cell's answers."""
    from lora_kit.evaluate.statistics import proportion
    from lora_kit.studies import arithmetic_scores as scores

    read = find_form(form_of(values)).read
    digits = [read(text) for text in said]
    lengths = scores.by_length(digits, questions)
    metrics: dict[str, Any] = {"edge": float(scores.edge(lengths))}
    for name, some in (
        ("within", [r for r in lengths if r["digits"] <= values["most_trained"]]),
        ("beyond", [r for r in lengths if r["digits"] > values["most_trained"]]),
    ):
        if some:
            asked = sum(r["n"] for r in some)
            right = round(sum(r["exact"] * r["n"] for r in some))
            metrics[f"exact_{name}"] = proportion(right, asked).to_metric()
    if training is not None:
        last = [loss for _, loss in training.losses[-10:]]
        metrics |= {
            "last_loss": sum(last) / len(last),
            "training_seconds": training.seconds,
            "training_tokens": float(training.tokens),
        }
    ends = [
        i for i, r in enumerate(questions) if i == 0 or questions[i - 1]["digits"] != r["digits"]
    ]
    return new_record(
        STUDY,
        command(values),
        parameters=dict(values),
        metrics=metrics,
        tables={
            "lengths": lengths,
            "places": scores.by_place(digits, questions),
            "carries": scores.by_carries(digits, questions, [operands(row) for row in test]),
            "items": scores.bits(digits, questions),
            **({"rounds": list(rounds)} if rounds else {}),
            "answers": [
                {
                    "prompt": questions[i]["prompt"][-80:],
                    "answer": said[i],
                    "sum": questions[i]["sum"],
                }
                for i in ends
            ],
        },
        seed=seed,
        seconds=seconds,
        **facts,
    )
