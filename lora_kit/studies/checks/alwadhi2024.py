"""Checks of Alwadhi 2024: QLoRA on two MMLU subjects and on k-digit addition.

MMLU's test set has 112 questions on machine learning and 612 on professional psychology (counted in
data/results/published_data); the paper prints accuracies to two decimals and no error. The curves
of its figures 2 and 3 are pictures, which the copy at hand lost.
"""

from __future__ import annotations

import math

from lora_kit.architectures import architecture
from lora_kit.memory import GPUS, plan_memory
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    NOT_REPRODUCED,
    OVERSTATED,
    Outcome,
    all_of,
    apart,
    binomial_error,
    cell,
    check,
    column,
    equals,
    holds_if,
    some_of,
    text,
)

PAPER = "alwadhi2024"
TABLES = {"ML": ("table_02", 112), "psychology": ("table_03", 612)}
TEACHER, VANILLA, GENERAL = "GPT-4o", "LLaMA (vanilla)", "LLaMA (General FT)"
OWN = {"ML": "LLaMA (ML FT)", "psychology": "LLaMA (Psychology FT)"}
OTHER = {"ML": "LLaMA (Psychology FT)", "psychology": "LLaMA (ML FT)"}


def score(subject: str, model: str) -> float:
    return cell(PAPER, TABLES[subject][0], model, "Accuracy").value


def change(subject: str, one: str, two: str) -> tuple[float, float]:
    """two − one, and the standard error over the subject's questions, unpaired."""
    a, b, n = score(subject, one), score(subject, two), TABLES[subject][1]
    return b - a, math.hypot(binomial_error(a, n), binomial_error(b, n))


# ------------------------------------------------------------------ tables 2 and 3


@check
def teacher_is_better_ml() -> Outcome:
    return apart(*change("ML", VANILLA, TEACHER))


@check
def teacher_is_better_psychology() -> Outcome:
    return apart(*change("psychology", VANILLA, TEACHER))


@check
def teacher_beats_all_students() -> Outcome:
    cases = {}
    for subject, (table, _) in TABLES.items():
        for model, value in column(PAPER, table, "Accuracy").items():
            if model != TEACHER:
                cases[f"{subject} {model}"] = value < score(subject, TEACHER)
    return all_of(cases, "students below GPT-4o")


@check
def ml_tuning_beats_vanilla() -> Outcome:
    return apart(*change("ML", VANILLA, OWN["ML"]))


@check
def ml_tuning_beats_general() -> Outcome:
    return apart(*change("ML", GENERAL, OWN["ML"]))


@check
def ml_improvement_is_marked() -> Outcome:
    difference, error = change("ML", VANILLA, OWN["ML"])
    questions = difference * TABLES["ML"][1]
    outcome = apart(difference, error)
    return Outcome(
        outcome.verdict, f"{questions:.0f} of 112 questions; {outcome.found}", "1.96 errors"
    )


@check
def psychology_degrades() -> Outcome:
    difference, error = change("psychology", VANILLA, OWN["psychology"])
    return apart(-difference, error)


@check
def psychology_below_general() -> Outcome:
    difference, error = change("psychology", GENERAL, OWN["psychology"])
    return apart(-difference, error)


def _quoted(what: str, model: str) -> Outcome:
    return equals(text(PAPER, "5.2", what), score("psychology", model))


@check
def psychology_quoted() -> Outcome:
    return _quoted("Psychology FT", OWN["psychology"])


@check
def psychology_vanilla_quoted() -> Outcome:
    return _quoted("vanilla, Psychology", VANILLA)


@check
def psychology_general_quoted() -> Outcome:
    return _quoted("General FT, Psychology", GENERAL)


@check
def psychology_gains_are_smaller() -> Outcome:
    difference, _ = change("psychology", VANILLA, OWN["psychology"])
    found = f"the targeted model changes by {difference:+.2f}: a loss, and no smaller gain"
    return holds_if(difference > 0, found)


@check
def targeted_is_best_in_its_subject() -> Outcome:
    cases = {}
    for subject in TABLES:
        tuned = {m: score(subject, m) for m in (GENERAL, OWN[subject], OTHER[subject])}
        best = max(tuned, key=tuned.get)
        cases[f"{subject} (best tuned: {best}, {tuned[best]})"] = best == OWN[subject]
    return some_of(cases, "subjects")


@check
def general_tuning_is_level() -> Outcome:
    changes = {s: change(s, VANILLA, GENERAL) for s in TABLES}
    cases = {f"{s} ({d:+.2f})": abs(d) < 1.96 * e for s, (d, e) in changes.items()}
    return all_of(cases, "subjects within 1.96 standard errors of vanilla")


@check
def general_tuning_improves() -> Outcome:
    changes = {s: change(s, VANILLA, GENERAL)[0] for s in TABLES}
    return some_of({f"{s} ({d:+.2f})": d > 0 for s, d in changes.items()}, "subjects rise")


@check
def general_tuning_excels_nowhere() -> Outcome:
    cases = {}
    for subject in TABLES:
        tuned = {m: score(subject, m) for m in (GENERAL, OWN[subject], OTHER[subject])}
        cases[f"{subject} ({score(subject, GENERAL)})"] = max(tuned, key=tuned.get) != GENERAL
    return some_of(cases, "subjects in which another tuned model is ahead")


@check
def both_approaches_improve_the_student() -> Outcome:
    cases = {}
    for subject in TABLES:
        for model in (GENERAL, OWN[subject]):
            difference, _ = change(subject, VANILLA, model)
            cases[f"{subject} {model} ({difference:+.2f})"] = difference > 0
    return some_of(cases, "tuned models above vanilla")


@check
def all_tuned_models_improve_a_little() -> Outcome:
    cases = {}
    for subject in TABLES:
        for model in (GENERAL, OWN[subject], OTHER[subject]):
            difference, _ = change(subject, VANILLA, model)
            cases[f"{subject} {model} ({difference:+.2f})"] = difference > 0
    return some_of(cases, "tuned models above vanilla")


@check
def gains_are_marginal_in_hard_subjects() -> Outcome:
    changes = {s: change(s, VANILLA, OWN[s])[0] for s in TABLES}
    return some_of({f"{s} ({d:+.2f})": 0 < d < 0.1 for s, d in changes.items()}, "subjects")


@check
def frozen_weights_keep_knowledge() -> Outcome:
    difference, error = change("psychology", VANILLA, OWN["psychology"])
    found = f"psychology falls by {-difference:.2f} with W frozen, z = {-difference / error:.1f}"
    return Outcome(CONTRADICTED if -difference > 1.96 * error else HOLDS, found, "1.96 errors")


# ------------------------------------------------------------------ sizes and memory


@check
def low_rank_update_has_its_shapes() -> Outcome:
    import numpy as np

    draw = np.random.default_rng(0)
    d, r, k = 6, 2, 5
    update = draw.normal(size=(d, r)) @ draw.normal(size=(r, k))
    rank = int(np.linalg.matrix_rank(update))
    return holds_if(update.shape == (d, k) and rank == r, f"shape {update.shape}, rank {rank}")


@check
def only_a_few_million() -> Outcome:
    shape = architecture("llama-2-7b")
    counts = {
        "r 8 on q and v": shape.lora_parameters(8, "q_proj,v_proj"),
        "r 32 on q and v": shape.lora_parameters(32, "q_proj,v_proj"),
        "r 32 on all linear layers": shape.lora_parameters(32),
    }
    cases = {f"{name} ({count / 1e6:.1f}M)": count < 1e7 for name, count in counts.items()}
    outcome = some_of(cases, "settings below ten million")
    return Outcome(outcome.verdict, outcome.found, "ten million")


@check
def llama_2_size() -> Outcome:
    count = architecture("llama-2-7b").num_parameters / 1e9
    return equals(text(PAPER, "5.1.1", "LLaMA 2, parameters"), count, unit="B")


@check
def four_bits_a_parameter() -> Outcome:
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return equals(text(PAPER, "3.3", "bits of QLoRA's weights"), bits, unit=" bits")


@check
def hundred_billion_on_one_card() -> Outcome:
    need = text(PAPER, "3.3", "model on one consumer card").value * 1e9 * 4.127 / 8 / 2**30
    card = max(GPUS[name] for name in GPUS if name.startswith("rtx"))
    found = f"the 4-bit weights alone take {need:.0f} GiB; the largest consumer card has {card:g}"
    return Outcome(OVERSTATED if need > card else HOLDS, found)


@check
def gradients_are_quantised() -> Outcome:
    shape = architecture("llama-2-7b")
    plan = plan_memory(shape, rank=32)
    bits = 8 * plan.row("gradients") / shape.lora_parameters(32)
    return Outcome(
        HOLDS if bits < 16 else NOT_REPRODUCED,
        f"{bits:.0f} bits a gradient in the kit's engines; QLoRA quantises the base only",
    )


@check
def seven_billion_on_a_t4() -> Outcome:
    plan = plan_memory(architecture("llama-2-7b"), rank=32, gpu="t4")
    found = f"{plan.total_bytes / 2**30:.1f} of 15 GiB at r 32, one row of 512 tokens"
    return holds_if(plan.fits, found)


# ------------------------------------------------------------------ addition


@check
def trained_on_seven_tested_on_twelve() -> Outcome:
    trained, tested = (
        text(PAPER, "5.1.2", f"digits {w}, most").value for w in ("trained", "tested")
    )
    return holds_if(trained < tested, f"{tested - trained:.0f} lengths were not trained")


@check
def addition_can_be_memorised() -> Outcome:
    """9·10^(k−1) numbers of k digits: how many sums there are to know by heart."""
    digits = int(text(PAPER, "5.1.2", "digits trained, most").value)
    pairs = {k: (9 * 10 ** (k - 1) + (k == 1)) ** 2 for k in range(1, digits + 1)}
    learnable = {f"{k} digits ({n:.1e} sums)": n <= 1e6 for k, n in pairs.items()}
    outcome = some_of(learnable, "lengths have at most a million sums")
    return Outcome(outcome.verdict, outcome.found, "a million")
