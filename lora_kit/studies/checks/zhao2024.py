"""Checks of Zhao et al. 2024: scale, settings, and whether summaries follow from the scores.

Summaries are recomputed from tables 11 and 12 through `studies.lora_land`.
"""

from __future__ import annotations

from lora_kit.architectures import architecture
from lora_kit.memory import plan_memory, weight_bytes
from lora_kit.studies import lora_land
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    ROUNDING,
    Outcome,
    all_of,
    cell,
    check,
    column,
    equals,
    holds_if,
    text,
)
from lora_kit.studies.papers import read_table, wide

PAPER = "zhao2024"


# ------------------------------------------------------------------ scale and settings


@check
def models_trained() -> Outcome:
    s = lora_land.load_scores()
    return equals(text(PAPER, "abstract", "fine-tuned models"), s.tuned.shape[0] * s.tuned.shape[1])


@check
def five_categories() -> Outcome:
    names = set(lora_land.load_scores().category)
    return holds_if(len(names) == 5, f"{len(names)}: {', '.join(sorted(names))}")


@check
def bases_below_8b() -> Outcome:
    sizes = column(PAPER, "table_02", "# of Parameters")
    return all_of({f"{m} ({v}B)": v <= 8 for m, v in sizes.items()}, "models of at most 8B")


@check
def bases_of_7b_or_smaller() -> Outcome:
    sizes = column(PAPER, "table_02", "# of Parameters")
    return all_of({f"{m} ({v}B)": v < 7.5 for m, v in sizes.items()}, "models round to 7B or less")


@check
def phi_has_2b() -> Outcome:
    count = cell(PAPER, "table_02", "Phi-2b", "# of Parameters").value
    return equals("2", count, unit="B")


@check
def fits_one_a10g() -> Outcome:
    plan = plan_memory(architecture("mistral-7b-v0.3"), rank=8, gpu="a10g", optimizer="adamw")
    found = f"Mistral-7B, r 8, batch 1 of 512 tokens: {plan.total_bytes / 2**30:.1f} of 22.2 GiB"
    return holds_if(plan.fits, found)


@check
def few_trainable_parameters() -> Outcome:
    shape = architecture("mistral-7b-v0.3")
    share = shape.lora_parameters(8) / shape.num_parameters
    return holds_if(share < 0.01, f"{share:.2%} at r 8 on all linear layers", "1 %")


@check
def adapters_of_25_fit_one_card() -> Outcome:
    shape = architecture("mistral-7b-v0.3")
    adapters = 25 * 2 * shape.lora_parameters(8)
    total = (sum(weight_bytes(shape)) + adapters) / 2**30
    found = f"base and 25 adapters in fp16: {total:.1f} GiB, of it {adapters / 2**30:.2f} adapters"
    return holds_if(total < 79.2, found)


@check
def warm_up_steps() -> Outcome:
    steps, share = text(PAPER, "3.4", "training steps"), text(PAPER, "3.4", "warm-up fraction")
    return equals(text(PAPER, "3.4", "warm-up steps"), steps.value * share.value)


@check
def effective_batch() -> Outcome:
    steps, batch = text(PAPER, "3.4", "accumulation steps"), text(PAPER, "3.4", "batch size")
    return equals("16", steps.value * batch.value)


@check
def some_tasks_see_no_full_epoch() -> Outcome:
    rows = column(PAPER, "figure_02", "# examples / train")
    long = [task for task, n in rows.items() if n > 40_000]
    return holds_if(bool(long), f"{len(long)} of {len(rows)} tasks have more than 40,000 rows")


@check
def training_rows_agree() -> Outcome:
    figure = column(PAPER, "figure_02", "# examples / train")
    table = column(PAPER, "table_13", "# training examples")
    return all_of({task: figure[task] == n for task, n in table.items()}, "tasks")


@check
def lengths_agree() -> Outcome:
    figure = column(PAPER, "figure_02", "P95 # Tokens")
    table = column(PAPER, "table_13", "Example length p95")
    outcome = all_of({task: abs(figure[task] - p) < 1 for task, p in table.items()}, "tasks")
    exact = all(figure[task] == p for task, p in table.items())
    verdict = outcome.verdict if exact or outcome.verdict != HOLDS else ROUNDING
    return Outcome(verdict, outcome.found, "rounded or cut to whole tokens")


@check
def wikisql_cost() -> Outcome:
    rows, given, made = (
        text(PAPER, "3.5", f"WikiSQL on GPT-4: {what}").value
        for what in ("examples", "input", "output")
    )
    cost = rows * (given * 0.03 + made * 0.06) / 1000  # GPT-4's price per 1,000 tokens in 2024
    printed = text(PAPER, "3.5", "WikiSQL on GPT-4: cost").value
    verdict = ROUNDING if abs(cost - printed) < 0.05 * printed else CONTRADICTED
    return Outcome(verdict, f"${cost:.0f} at $0.03 and $0.06 per 1,000 tokens", "5 %")


@check
def wikisql_rows() -> Outcome:
    rows = cell(PAPER, "figure_02", "wikisql", "# examples / test").value
    return equals(text(PAPER, "3.5", "WikiSQL on GPT-4: examples"), rows)


@check
def wikisql_lengths() -> Outcome:
    cases = {}
    for what, name in (("input", "Input length µ"), ("output", "Output length µ")):
        value = cell(PAPER, "table_13", "wikisql", name).value
        printed = text(PAPER, "3.5", f"WikiSQL on GPT-4: {what}")
        cases[f"{what} ({value})"] = abs(value - printed.value) <= printed.half
    outcome = all_of(cases, "means")
    verdict = ROUNDING if outcome.verdict == HOLDS else outcome.verdict
    return Outcome(verdict, f"{outcome.found}: {', '.join(cases)}", "half a token")


@check
def customer_support_rows() -> Outcome:
    n = cell(PAPER, "figure_02", "customer_support", "# examples / test").value
    scores = lora_land.load_scores().base.loc["customer_support"]
    cases, hundred = {}, 0
    for model, score in scores.items():
        cases[f"{model} ({score})"] = abs(round(score * n) / n - score) <= 0.0005
        hundred += abs(score * 100 - round(score * 100)) < 1e-9
    outcome = all_of(cases, f"base scores are counts of {n:.0f}")
    return Outcome(outcome.verdict, f"{outcome.found}; {hundred} are counts of 100", "rounding")


@check
def scores_lie_between_0_and_1() -> Outcome:
    s = lora_land.load_scores()
    values = [v for t in (s.base, s.tuned, s.reference) for v in t.to_numpy().ravel()]
    return holds_if(0 <= min(values) and max(values) <= 1, f"{min(values)} to {max(values)}")


@check
def metrics_agree_between_tables() -> Outcome:
    one, two = (
        wide(read_table(PAPER, t), what="printed")["Metric"] for t in ("table_11", "table_12")
    )
    return all_of({f"{t} ({one[t]})": one[t] == two[t] for t in one.index}, "tasks")


@check
def accuracy_for_classification() -> Outcome:
    figure = wide(read_table(PAPER, "figure_02"), what="printed")
    chosen = figure[figure["Task Description"].str.contains("classification")]
    return all_of({f"{t} ({m})": m == "accuracy" for t, m in chosen["Metric"].items()}, "tasks")


# ------------------------------------------------------------------ whole tables


@check
def table_3_follows() -> Outcome:
    made = lora_land.compare_table_3()
    return holds_if(bool(made["agrees"].all()), f"{int(made['agrees'].sum())} of {len(made)} cells")


@check
def table_4_means_follow() -> Outcome:
    made = lora_land.compare_table_4()
    means = made[~made["column"].str.startswith(("wins", "best"))]
    wrong = sorted(set(means.loc[~means["agrees"], "row"]))
    found = f"{int(means['agrees'].sum())} of {len(means)} cells; not {', '.join(wrong)}"
    return Outcome(CONTRADICTED if wrong else HOLDS, found, "half a unit")


@check
def table_4_shares_follow() -> Outcome:
    cases = {}
    frame = read_table(PAPER, "table_04")
    for name in ("Frequency FT > No FT", "Frequency FT > GPT-4"):
        counts = {r: v for r, v in wide(frame, "count")[name].items() if v == v}
        for model, count in counts.items():
            share = cell(PAPER, "table_04", model, name)
            exact = 100 * count / (310 if model == "Average" else 31)
            cases[f"{model} {share.value} (is {exact:.2f})"] = abs(share.value - exact) <= 0.05
    return all_of(cases, "percentages")


@check
def table_12_lifts_follow() -> Outcome:
    wrong = len(lora_land.lift_mismatches())
    return holds_if(wrong == 0, f"{310 - wrong} of 310", "half a unit")


@check
def table_13_measures_follow() -> Outcome:
    made = lora_land.compare_table_13()
    return holds_if(bool(made["agrees"].all()), f"{int(made['agrees'].sum())} of {len(made)} cells")


def _order(figure: str) -> Outcome:
    made = lora_land.compare_order(figure)
    wrong = made.loc[~made["agrees"], "printed"]
    found = f"{int(made['agrees'].sum())} of {len(made)} places"
    return holds_if(wrong.empty, found + (f"; not {', '.join(wrong)}" if len(wrong) else ""))


@check
def figure_1_order() -> Outcome:
    return _order("figure_01")


@check
def figure_5_order() -> Outcome:
    return _order("figure_05")


@check
def figure_6_order() -> Outcome:
    return _order("figure_06")
