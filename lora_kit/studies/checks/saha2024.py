"""Checks of Saha et al. 2024: rank and placement of LoRA on Llama-3.2, code, summaries, maths.

HumanEval has 164 problems, GSM8K's test set 1,319 (of which the paper took "a subset": fewer only
make errors larger). Of HellaSwag it took 50 of 192 activities, which is about 2,615 of 10,042 rows.
"""

from __future__ import annotations

import itertools
import math

from lora_kit.architectures import architecture
from lora_kit.studies.checks.outcome import (
    HOLDS,
    NOT_CHECKABLE,
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
    level,
    some_of,
    text,
)

PAPER = "saha2024"
PROBLEMS, GSM8K, HELLASWAG = 164, 1319, round(10_042 * 50 / 192)
ONE, THREE, SEVEN = "Llama-3.2-1B-Instruct", "Llama-3.2-3B-Instruct", "Mistral-7B-Instruct-v0.3"
BEST = {
    "code": "Llama-1B-Code-r128",
    "maths": "Llama-1B-Math-R128",
    "all": "Llama-1B-LoRA-All-R128",
}
RANKS = (32, 64, 128)


def score(table: int, row: str, name: str) -> float:
    return cell(PAPER, f"table_{table:02}", row, name).value


def gap(table: int, name: str, one: str, two: str, n: int) -> tuple[float, float]:
    """two − one of a column, and the standard error of the difference over n items each."""
    a, b = score(table, one, name), score(table, two, name)
    return b - a, math.hypot(binomial_error(a, n), binomial_error(b, n))


# ------------------------------------------------------------------ sizes and settings


@check
def one_billion() -> Outcome:
    count = architecture("llama-3.2-1b").num_parameters / 1e9
    return equals(text(PAPER, "3.1", "Llama-3.2-1B-Instruct, parameters"), count, unit="B")


@check
def one_is_called_three() -> Outcome:
    count = architecture("llama-3.2-1b").num_parameters / 1e9
    return equals(text(PAPER, "3.2", "Llama-3.2-1B-Instruct, parameters"), count, unit="B")


@check
def mistral_seven_billion() -> Outcome:
    count = architecture("mistral-7b-v0.3").num_parameters / 1e9
    return equals(text(PAPER, "3.2", "Mistral-7B-Instruct-v0.3, parameters"), count, unit="B")


@check
def ranks_tried_are_reported() -> Outcome:
    rows = [r.lower() for t in range(1, 5) for r in column(PAPER, f"table_{t:02}", _first(t))]
    return all_of({f"rank {k}": any(r.endswith(f"r{k}") for r in rows) for k in (16, *RANKS)})


@check
def architectures_are_reported() -> Outcome:
    rows = [r for t in range(1, 5) for r in column(PAPER, f"table_{t:02}", _first(t))]
    named = {"Llama-3.2-1B": "Llama-1B-", "Llama-3.2-3B": "Llama-3B-", "Qwen": "Qwen"}
    return all_of({n: any(r.startswith(f) for r in rows) for n, f in named.items()})


def _first(table: int) -> str:
    return {1: "pass@1", 2: "ROUGE-1", 3: "Accuracy", 4: "Flexible Extract"}[table]


@check
def rank_is_isolated() -> Outcome:
    alpha = text(PAPER, "4.2.1", "lora_alpha").value
    scales = [alpha / rank for rank in RANKS]
    found = "scale alpha/r " + ", ".join(
        f"{s:g} at r {r}" for s, r in zip(scales, RANKS, strict=True)
    )
    return Outcome(HOLDS if len(set(scales)) == 1 else OVERSTATED, found)


@check
def no_additional_parameters() -> Outcome:
    shape = architecture("llama-3.2-1b")
    count = shape.lora_parameters(128)
    found = f"{count:,} at r 128, {count / shape.num_parameters:.1%} of the model"
    return holds_if(count == 0, found)


@check
def fraction_of_the_size() -> Outcome:
    one, seven = architecture("llama-3.2-1b"), architecture("mistral-7b-v0.3")
    share = (one.num_parameters + one.lora_parameters(128)) / seven.num_parameters
    return holds_if(share < 0.5, f"{share:.0%} of Mistral-7B's parameters, adapter included")


@check
def lora_xs_hundredfold() -> Outcome:
    shape = architecture("llama-2-7b")
    modules = 7 * shape.num_layers
    folds = {r: shape.lora_parameters(r) / (modules * r * r) for r in (16, 32, 64)}
    found = ", ".join(f"{fold:,.0f} at r {r}" for r, fold in folds.items())
    return holds_if(min(folds.values()) > 100, f"LoRA's count over r x r a module: {found}")


# ------------------------------------------------------------------ code (table 1)


@check
def code_rivals_large_models() -> Outcome:
    cases = {}
    for row in (BEST["code"], "Llama-3B-Code-r128"):
        difference, stderr = gap(1, "pass@1", SEVEN, row, PROBLEMS)
        cases[f"{row} ({score(1, row, 'pass@1')})"] = difference > -1.96 * stderr
    return some_of(cases, "models level with Mistral's 0.3231")


@check
def code_improves_the_1b() -> Outcome:
    base = score(1, ONE, "pass@1")
    cases = {
        f"r{r} ({score(1, f'Llama-1B-Code-r{r}', 'pass@1')})": score(
            1, f"Llama-1B-Code-r{r}", "pass@1"
        )
        > base
        for r in RANKS
    }
    best = (score(1, BEST["code"], "pass@1") - base) * PROBLEMS
    outcome = some_of(cases, f"ranks above {base}")
    return Outcome(outcome.verdict, f"{outcome.found}; at most {best:.1f} problems of {PROBLEMS}")


@check
def code_1b_stays_behind() -> Outcome:
    ours = [score(1, f"Llama-1B-Code-r{r}", "pass@1") for r in RANKS]
    return holds_if(max(ours) < score(1, THREE, "pass@1"), f"best 1B {max(ours)}, 3B base 0.0852")


@check
def code_3b_before() -> Outcome:
    return equals(text(PAPER, "5.1", "3B code model before"), 100 * score(1, THREE, "pass@1"))


@check
def code_3b_after() -> Outcome:
    row = "Llama-3B-Code-r128"
    return equals(text(PAPER, "5.1", "3B code model after"), 100 * score(1, row, "pass@1"))


@check
def code_3b_boost_is_significant() -> Outcome:
    return apart(*gap(1, "pass@1", THREE, "Llama-3B-Code-r128", PROBLEMS))


@check
def code_3b_comes_closer() -> Outcome:
    seven = score(1, SEVEN, "pass@1")
    before, after = (seven - score(1, r, "pass@1") for r in (THREE, "Llama-3B-Code-r128"))
    return holds_if(after < before, f"behind Mistral by {before:.3f}, then {after:.3f}")


@check
def code_higher_rank_is_better() -> Outcome:
    cases = {}
    for size, metric in itertools.product(("1B", "3B"), ("pass@1", "pass@10")):
        for low, high in itertools.combinations(RANKS, 2):
            one, two = (score(1, f"Llama-{size}-Code-r{r}", metric) for r in (low, high))
            cases[f"{size} {metric} r{low} to r{high}"] = two > one
    return all_of(cases, "steps up")


@check
def pass_at_10_within_bound() -> Outcome:
    rows = column(PAPER, "table_01", "pass@1")
    cases = {
        f"{row} ({score(1, row, 'pass@10') / one:.0f} times)": one
        <= score(1, row, "pass@10")
        <= 10 * one
        for row, one in rows.items()
    }
    return all_of(cases, "rows with pass@1 <= pass@10 <= 10 pass@1")


@check
def one_completion_a_problem() -> Outcome:
    cases = {
        f"{row} ({value})": abs(value * PROBLEMS - round(value * PROBLEMS)) <= 5e-5 * PROBLEMS
        for row, value in column(PAPER, "table_01", "pass@1").items()
    }
    return all_of(cases, f"pass@1 that are counts of {PROBLEMS}")


@check
def ten_completions_a_problem() -> Outcome:
    cases = {
        f"{row} ({value})": abs(value * PROBLEMS - round(value * PROBLEMS)) <= 5e-5 * PROBLEMS
        for row, value in column(PAPER, "table_01", "pass@10").items()
    }
    return all_of(cases, f"pass@10 that are counts of {PROBLEMS}")


# ------------------------------------------------------------------ summaries (table 2)

ROUGES = ("ROUGE-1", "ROUGE-2", "ROUGE-L")


@check
def rouge_orders() -> Outcome:
    cases = {}
    for row in column(PAPER, "table_02", "ROUGE-1"):
        one, two, longest = (score(2, row, name) for name in ROUGES)
        cases[row] = two <= one and longest <= one
    return all_of(cases, "rows with ROUGE-2 and ROUGE-L at most ROUGE-1")


@check
def both_beat_one_at_every_rank() -> Outcome:
    cases = {}
    for rank, other, name in itertools.product((32, 128), ("MLP", "Attn"), ROUGES):
        both = score(2, f"Llama-1B-LoRA-ALL-R{rank}", name)
        cases[f"{name} over {other} at r{rank}"] = both > score(
            2, f"Llama-1B-LoRA-{other}-R{rank}", name
        )
    return all_of(cases, "comparisons")


@check
def both_at_128_is_the_best_summariser() -> Outcome:
    cases = {}
    for name in ROUGES:
        tuned = {r: v for r, v in column(PAPER, "table_02", name).items() if "LoRA" in r}
        cases[name] = max(tuned, key=tuned.get) == "Llama-1B-LoRA-ALL-R128"
    return all_of(cases, "metrics, among the tuned models")


# ------------------------------------------------------------------ HellaSwag (table 3)


@check
def hellaswag_before() -> Outcome:
    return equals(text(PAPER, "5.2", "1B HellaSwag before"), 100 * score(3, ONE, "Accuracy"))


@check
def hellaswag_after() -> Outcome:
    return equals(text(PAPER, "5.2", "1B HellaSwag after"), 100 * score(3, BEST["all"], "Accuracy"))


@check
def hellaswag_gain_is_significant() -> Outcome:
    return apart(*gap(3, "Accuracy", ONE, BEST["all"], HELLASWAG))


@check
def hellaswag_passes_the_3b() -> Outcome:
    names = ("Accuracy", "Acc - Norm")
    three = [score(3, THREE, n) for n in names]
    twin = "Llama-1B-LoRA-All-R32"
    if three == [score(3, twin, n) for n in names]:
        found = f"the 3B's {three[0]} and {three[1]} are also those printed for {twin}"
        return Outcome(NOT_CHECKABLE, found)
    return holds_if(score(3, BEST["all"], "Accuracy") > three[0], f"3B {three[0]}")


@check
def hellaswag_3b_above_1b() -> Outcome:
    cases = {
        name: score(3, THREE, name) > score(3, ONE, name) for name in ("Accuracy", "Acc - Norm")
    }
    return all_of(cases, "columns in which the 3B base beats the 1B base")


@check
def hellaswag_level_with_mistral() -> Outcome:
    return level(*gap(3, "Accuracy", SEVEN, BEST["all"], HELLASWAG))


@check
def hellaswag_both_is_best() -> Outcome:
    cases = {}
    for name in ("Accuracy", "Acc - Norm"):
        tuned = {r: v for r, v in column(PAPER, "table_03", name).items() if "LoRA" in r}
        cases[name] = max(tuned, key=tuned.get) == BEST["all"]
    return some_of(cases, "columns, among the tuned models")


@check
def hellaswag_base_agrees_with_mai() -> Outcome:
    theirs = cell("mai2025", "table_02", "HellaSwag / Accuracy", "Base Llama 3.2 1B").value / 100
    ours = score(3, ONE, "Accuracy")
    error = math.hypot(binomial_error(ours, HELLASWAG), binomial_error(theirs, 10_042))
    return level(theirs - ours, error)


# ------------------------------------------------------------------ maths (table 4)


@check
def gsm8k_before() -> Outcome:
    return equals(text(PAPER, "5.3", "1B GSM8K before"), 100 * score(4, ONE, "Flexible Extract"))


@check
def gsm8k_after() -> Outcome:
    after = 100 * score(4, BEST["maths"], "Flexible Extract")
    return equals(text(PAPER, "5.3", "1B GSM8K after"), after)


@check
def gsm8k_level_with_larger() -> Outcome:
    found = {m: gap(4, "Flexible Extract", m, BEST["maths"], GSM8K) for m in (THREE, SEVEN)}
    cases = {f"{m} ({d:+.4f})": abs(d) < 1.96 * error for m, (d, error) in found.items()}
    return all_of(cases, "larger models within 1.96 standard errors")


@check
def gsm8k_higher_rank_is_better() -> Outcome:
    cases = {}
    for name in ("Flexible Extract", "Strict Match"):
        for low, high in itertools.combinations(RANKS, 2):
            one, two = (score(4, f"Llama-1B-Math-R{r}", name) for r in (low, high))
            cases[f"{name} r{low} to r{high}"] = two > one
    return all_of(cases, "steps up")


@check
def gsm8k_tuning_helps() -> Outcome:
    base = score(4, ONE, "Flexible Extract")
    rows = {r: score(4, f"Llama-1B-Math-R{r}", "Flexible Extract") for r in RANKS}
    return some_of({f"r{r} ({v})": v > base for r, v in rows.items()}, f"ranks above {base}")


@check
def gsm8k_base_agrees_with_mai() -> Outcome:
    row = "GSM8K / Flexible Accuracy"
    theirs = cell("mai2025", "table_02", row, "Base Llama 3.2 1B").value / 100
    ours = score(4, ONE, "Flexible Extract")
    return level(theirs - ours, math.hypot(*(binomial_error(p, GSM8K) for p in (ours, theirs))))


# ------------------------------------------------------------------ conclusions


@check
def r128_beats_r32_everywhere() -> Outcome:
    pairs = {f"{s} {m}": (1, f"Llama-{s}-Code-r{{}}", m) for s in ("1B", "3B") for m in CODE}
    for place in ("MLP", "Attn", "ALL"):
        pairs |= {f"{place} {m}": (2, f"Llama-1B-LoRA-{place}-R{{}}", m) for m in ROUGES}
    for place in ("MLP", "Attn", "All"):
        row = f"Llama-1B-LoRA-{place}-R{{}}"
        pairs |= {f"HellaSwag {place} {m}": (3, row, m) for m in ("Accuracy", "Acc - Norm")}
    maths = ("Flexible Extract", "Strict Match")
    pairs |= {f"GSM8K {m}": (4, "Llama-1B-Math-R{}", m) for m in maths}
    return all_of(
        {
            name: score(table, row.format(128), metric) > score(table, row.format(32), metric)
            for name, (table, row, metric) in pairs.items()
        },
        "comparisons",
    )


CODE = ("pass@1", "pass@10")


@check
def comparable_on_four_benchmarks() -> Outcome:
    cases = {}
    for name, (table, metric, row, n) in {
        "HumanEval": (1, "pass@1", BEST["code"], PROBLEMS),
        "HellaSwag": (3, "Accuracy", BEST["all"], HELLASWAG),
        "GSM8K": (4, "Flexible Extract", BEST["maths"], GSM8K),
    }.items():
        difference, error = gap(table, metric, SEVEN, row, n)
        cases[name] = difference > -1.96 * error
    both = "Llama-1B-LoRA-ALL-R128"
    cases["CNN/DailyMail"] = all(score(2, both, m) >= score(2, SEVEN, m) for m in ROUGES)
    return some_of(cases, "benchmarks on which the tuned 1B is level with Mistral-7B")
