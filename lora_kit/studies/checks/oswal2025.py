"""Checks of Oswal et al. 2025: small models tuned on ECInstruct, ten e-commerce tasks.

Trainable parameters are counted for the one configuration that fits table 1 (notebook 02): rank 16
on all seven linear layers and the output head.
"""

from __future__ import annotations

from lora_kit.architectures import architecture
from lora_kit.memory import plan_memory, weight_bytes
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    OVERSTATED,
    ROUNDING,
    Outcome,
    all_of,
    cell,
    check,
    column,
    equals,
    holds_if,
    some_of,
    text,
)
from lora_kit.train.recipes import recipe

PAPER = "oswal2025"
SHAPES = {
    "smolLM-EC / 1.7B": "smollm2-1.7b",  # SmolLM and SmolLM2 share their shapes
    "smolLM-EC / 360M": "smollm2-360m",
    "smolLM2-EC / 1.7B": "smollm2-1.7b",
    "smolLM2-EC / 360M": "smollm2-360m",
    "Llama3.2-EC / 1B": "llama-3.2-1b",
    "Llama3.2-EC / 3B": "llama-3.2-3b",
}
GENERAL = (
    "GPT-4 Turbo",
    "Gemini Pro",
    "Claude 2.1",
    "Llama-2 13B-chat",
    "Mistral-7B Instruct-v0.2",
)
SMALL, LARGE, LLAMA = "SmolLM2-360M-EC", "SmolLM2-1.7B-EC", "Llama3.2-1B-EC"
TASKS = (
    "AVE / F1*",
    "PRP / Macro F1",
    "PM / F1",
    "SA / Macro F1",
    "SR / HR@1",
    "MPC / Accuracy",
    "PSI / F1",
    "QPR / NDCG",
    "AP / F1",
    "AG / F_BERT",
)
OUTSIDE = ("AVE / F1*", "PRP / M-F1", "SA / M-F1", "SR / HR@1", "AP / F1", "AG / F_BERT")
NEAR = 0.005  # "comparable": at most so far behind


def ahead(table: str, tasks, ours: str, others, slack: float = 0.0) -> dict[str, bool]:
    """By task: whether `ours` is at least the best of `others`, less `slack`."""
    found = {}
    for task in tasks:
        scores = column(PAPER, table, task)
        if ours in scores:
            rival = max((o for o in others if o in scores), key=scores.get)
            name = f"{task.split(' / ')[0]} ({scores[ours]} against {scores[rival]})"
            found[name] = scores[ours] >= scores[rival] - slack
    return found


# ------------------------------------------------------------------ parameters (table 1)


def trainable(row: str) -> Outcome:
    """Table 1's count beside rank 16 on all linear layers and the head, in millions."""
    spec = recipe("oswal")
    millions = architecture(SHAPES[row]).lora_parameters(spec.rank, spec.targets) / 1e6
    printed = cell(PAPER, "table_01", row, "Trainable params")
    outcome = equals(printed, millions, unit="M")
    cut = 0 <= millions - printed.value < 2 * printed.half
    if outcome.verdict == CONTRADICTED and cut:
        return Outcome(ROUNDING, outcome.found, "cut to the digits printed, not rounded")
    return outcome


@check
def trainable_smollm_large() -> Outcome:
    return trainable("smolLM-EC / 1.7B")


@check
def trainable_smollm_small() -> Outcome:
    return trainable("smolLM-EC / 360M")


@check
def trainable_smollm2_large() -> Outcome:
    return trainable("smolLM2-EC / 1.7B")


@check
def trainable_smollm2_small() -> Outcome:
    return trainable("smolLM2-EC / 360M")


@check
def trainable_llama_1b() -> Outcome:
    return trainable("Llama3.2-EC / 1B")


@check
def trainable_llama_3b() -> Outcome:
    return trainable("Llama3.2-EC / 3B")


@check
def total_parameters() -> Outcome:
    """The sizes in the models' names, to two digits (one for Llama's)."""
    cases = {}
    for row, name in SHAPES.items():
        printed = cell(PAPER, "table_01", row, "Total params")
        scale = 1e6 if "M" in printed.printed else 1e9
        count = architecture(name).num_parameters / scale
        unit = 5 if scale == 1e6 else printed.half  # 360M: two digits
        cases[f"{row} ({count:.3g})"] = abs(count - printed.value) <= unit
    outcome = all_of(cases, "totals")
    found = f"{outcome.found}: {', '.join(cases)}"
    verdict = ROUNDING if outcome.verdict == HOLDS else outcome.verdict
    return Outcome(verdict, found, "half a unit of the printed digits")


@check
def trainable_share_is_small() -> Outcome:
    shares = {}
    for row in SHAPES:
        total = cell(PAPER, "table_01", row, "Total params")
        millions = total.value * (1 if "M" in total.printed else 1000)
        shares[row] = cell(PAPER, "table_01", row, "Trainable params").value / millions
    found = f"{min(shares.values()):.1%} to {max(shares.values()):.1%} of the model"
    return holds_if(max(shares.values()) < 0.05, found, "5 %")


@check
def sizes_lie_in_the_range() -> Outcome:
    low = text(PAPER, "1", "range of small models, lowest").value * 1e6
    high = text(PAPER, "1", "range of small models, highest").value * 1e9
    counts = {row: architecture(name).num_parameters for row, name in SHAPES.items()}
    return all_of({f"{r} ({c / 1e9:.2f}B)": low <= c <= high for r, c in counts.items()}, "models")


@check
def tuned_models_are_scored() -> Outcome:
    scored = set(column(PAPER, "table_02", TASKS[1])) | set(column(PAPER, "table_03", OUTSIDE[1]))
    pairs = {
        "smolLM-EC / 1.7B": "SmolLM-1.7B-EC",
        "smolLM-EC / 360M": "SmolLM-360M-EC",
        "smolLM2-EC / 1.7B": LARGE,
        "smolLM2-EC / 360M": SMALL,
        "Llama3.2-EC / 1B": LLAMA,
        "Llama3.2-EC / 3B": "Llama3.2-3B-EC",
    }
    return all_of({row: name in scored for row, name in pairs.items()}, "models of table 1")


@check
def fits_a_small_budget() -> Outcome:
    plans = {
        name: plan_memory(architecture(name), gpu="t4", batch=1, seq=512)
        for name in dict.fromkeys(SHAPES.values())
    }
    cases = {f"{n} ({p.total_bytes / 2**30:.1f} GiB)": p.fits for n, p in plans.items()}
    outcome = all_of(cases, "models fit a free T4 at r 16")
    return Outcome(outcome.verdict, f"{outcome.found}: {', '.join(cases)}")


@check
def quantised_weights_save_memory() -> Outcome:
    folds = []
    for name in dict.fromkeys(SHAPES.values()):
        shape = architecture(name)
        folds.append(sum(weight_bytes(shape)) / sum(weight_bytes(shape, "nf4-double")))
    found = f"fp16 weights take {min(folds):.1f} to {max(folds):.1f} times as much as NF4's"
    return holds_if(min(folds) > 2, found, "at least 2 times")


# ------------------------------------------------------------------ the task list


@check
def ten_tasks() -> Outcome:
    return holds_if(
        len(TASKS) == text(PAPER, "3.1", "tasks").value and all(_in_table_2(t) for t in TASKS),
        f"{len(TASKS)} columns in table 2",
    )


def _in_table_2(task: str) -> bool:
    return len(column(PAPER, "table_02", task)) > 0


@check
def four_categories_hold_ten_tasks() -> Outcome:
    sizes = (2, 2, 3, 3)  # user understanding, product QA, product understanding, query matching
    tasks, groups = (text(PAPER, "3.1", what).value for what in ("tasks", "categories"))
    return holds_if(sum(sizes) == tasks and len(sizes) == groups, f"{sizes} make {sum(sizes)}")


@check
def out_of_domain_covers() -> Outcome:
    names = {t.split(" / ")[0] for t in OUTSIDE}
    return all_of({t.split(" / ")[0]: t.split(" / ")[0] in names for t in TASKS}, "tasks")


# ------------------------------------------------------------------ in domain (table 2)


@check
def small_models_comparable_or_better() -> Outcome:
    """The best of the three tuned models against the best general one, task by task."""
    cases = {}
    for task in TASKS:
        scores = column(PAPER, "table_02", task)
        ours = max(scores[m] for m in (SMALL, LARGE, LLAMA) if m in scores)
        theirs = max(scores[m] for m in GENERAL)
        cases[f"{task} ({ours} against {theirs})"] = ours >= theirs - NEAR
    outcome = all_of(cases, "tasks")
    return Outcome(outcome.verdict, outcome.found, f"{NEAR} behind is still comparable")


@check
def best_small_model_leads() -> Outcome:
    cases = {}
    for task in TASKS:
        scores = column(PAPER, "table_02", task)
        best = max(scores, key=scores.get)
        cases[f"{task} ({best})"] = best in (SMALL, LARGE, LLAMA)
    return some_of(cases, "columns led by a tuned small model")


@check
def always_above_gpt4_and_gemini() -> Outcome:
    return all_of(ahead("table_02", TASKS, LARGE, GENERAL[:2]), "tasks (1.7B)")


@check
def llama_above_gpt4_and_gemini() -> Outcome:
    return all_of(ahead("table_02", TASKS, LLAMA, GENERAL[:2]), "tasks (Llama 1B)")


@check
def smallest_above_gpt4_and_gemini() -> Outcome:
    return all_of(ahead("table_02", TASKS, SMALL, GENERAL[:2]), "tasks (360M)")


@check
def smallest_comparable_or_better() -> Outcome:
    return some_of(ahead("table_02", TASKS, SMALL, GENERAL, NEAR), "tasks (360M)")


@check
def smaller_models_beat_top_models() -> Outcome:
    cases = {}
    for model in (SMALL, LARGE, LLAMA):
        cases |= {f"{model} {k}": v for k, v in ahead("table_02", TASKS, model, GENERAL).items()}
    return some_of(cases, "cells of tuned models at or above every general model")


@check
def above_ecomgpt() -> Outcome:
    cases = {}
    for table, tasks in (("table_02", TASKS), ("table_03", OUTSIDE)):
        cases |= {f"{table} {k}": v for k, v in ahead(table, tasks, LARGE, ["EcomGPT"]).items()}
    return all_of(cases, "tasks (1.7B)")


@check
def classification_of_llama() -> Outcome:
    scores = column(PAPER, "table_02", "MPC / Accuracy")
    lowest = min(scores, key=scores.get)
    found = f"lowest of {len(scores)}: {lowest}, {scores[lowest]}"
    return Outcome(CONTRADICTED if lowest == LLAMA else HOLDS, found)


# ------------------------------------------------------------------ out of domain (table 3)


@check
def outside_above_gpt4_and_gemini() -> Outcome:
    return all_of(ahead("table_03", OUTSIDE, LARGE, GENERAL[:2]), "tasks (1.7B)")


@check
def outside_smallest() -> Outcome:
    return all_of(ahead("table_03", OUTSIDE, SMALL, GENERAL[:2]), "tasks (360M)")


@check
def generalises_outside_its_domain() -> Outcome:
    names = dict(
        zip(OUTSIDE, (TASKS[0], TASKS[1], TASKS[3], TASKS[4], TASKS[8], TASKS[9]), strict=True)
    )
    falls = {}
    for outside, inside in names.items():
        a = cell(PAPER, "table_02", LARGE, inside).value
        b = cell(PAPER, "table_03", LARGE, outside).value
        falls[f"{outside.split(' / ')[0]} ({a} to {b})"] = b >= 0.9 * a
    outcome = some_of(falls, "tasks keep nine tenths of the score (1.7B)")
    return Outcome(outcome.verdict, outcome.found, "a tenth")


@check
def larger_is_better_outside() -> Outcome:
    return all_of(ahead("table_03", OUTSIDE, LARGE, [SMALL]), "tasks on which 1.7B beats 360M")


# ------------------------------------------------------------------ metrics


@check
def f1_of_precision_and_recall() -> Outcome:
    cases = {}
    for tp, fp, fn in ((8, 2, 4), (1, 9, 0), (50, 3, 7)):
        p, r = tp / (tp + fp), tp / (tp + fn)
        cases[f"{tp}, {fp}, {fn}"] = abs(2 * p * r / (p + r) - 2 * tp / (2 * tp + fp + fn)) < 1e-12
    return all_of(cases, "counts give 2PR/(P + R) = 2TP/(2TP + FP + FN)")


@check
def prompt_engineering_is_compared() -> Outcome:
    """Is any row of the tables a small model with prompts in place of tuning?"""
    rows = column(PAPER, "table_02", TASKS[1])
    small = [r for r in rows if ("Smol" in r or "3.2" in r) and not r.endswith("-EC")]
    verdict = HOLDS if small else OVERSTATED
    return Outcome(verdict, f"{len(small)} rows of an untuned small model, with or without prompts")
