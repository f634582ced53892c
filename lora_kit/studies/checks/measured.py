"""Checks of experimental claims against this kit's own records in data/results/.

Without its records a check says "not reproduced here: no record yet", so that a record that arrives
asks for its line of the ledger to be read again.
"""

from __future__ import annotations

import itertools
from functools import cache

from lora_kit.studies.checks.outcome import (
    NOT_REPRODUCED,
    REPRODUCED,
    Outcome,
    check,
    text,
)
from lora_kit.studies.records import Record, read_records

NO_RECORD = "no record yet"
PAIRED = "95 % interval over 3 seeds, paired"
PLACEMENTS, RANKS = ("attention", "mlp", "all"), (2, 8, 32, 128)


@cache
def records(study: str) -> tuple[Record, ...]:
    return tuple(read_records(study))


def awaited(study: str) -> Outcome:
    return Outcome(NOT_REPRODUCED, f"{NO_RECORD} in data/results/{study}")


def reproduced(cases: dict[str, bool], what: str, tolerance: str = "none") -> Outcome:
    wrong = [name for name, true in cases.items() if not true]
    found = f"{len(cases) - len(wrong)} of {len(cases)} {what}"
    verdict = NOT_REPRODUCED if wrong else REPRODUCED
    return Outcome(verdict, found + (f"; not {', '.join(wrong)}" if wrong else ""), tolerance)


# ------------------------------------------------------------------ rank and placement


def _placement() -> dict[tuple[str, int], Record]:
    return {(r.parameters["placement"], r.parameters["rank"]): r for r in records("lora_placement")}


@cache
def _paper_steps() -> tuple[tuple[str, bool], ...]:
    """saha2024's steps of rank and placement at its own α = 16, on language tasks: what each is of,
    and whether ours rises beyond its interval (`studies.specialists_compare`)."""
    from lora_kit.studies.specialists_compare import paper_steps
    from lora_kit.studies.specialists_report import read_study

    return tuple(
        (f"{line['step']}, {line['score']}", s.up) for line, s in paper_steps(read_study())
    )


def _with_language(sums: Outcome, which: str | tuple[str, ...]) -> Outcome:
    """The addition study's outcome beside that of the same steps on language tasks: both have to
    say so. Without the second nothing is reproduced: addition alone is not what the paper ran."""
    ups = [up for name, up in _paper_steps() if name.startswith(which)]
    if not ups:
        return awaited("07_specialists")
    found = f"addition, α = 2r: {sums.found}; language, α = 16: {sum(ups)} of {len(ups)} scores"
    verdict = sums.verdict if all(ups) else NOT_REPRODUCED
    return Outcome(verdict, f"{found} rise beyond the 95 % interval", sums.tolerance)


def _seeds_rise(low: Record, high: Record) -> tuple[bool, str]:
    """Whether the accuracy of `high` lies above that of `low` beyond Student's 95 % interval of
    their difference, paired by seed; and both means in words."""
    from lora_kit.evaluate.statistics import over_runs

    a, b = ({row["seed"]: row["accuracy"] for row in r.tables["seeds"]} for r in (low, high))
    apart = over_runs([b[seed] - a[seed] for seed in sorted(set(a) & set(b))])
    means = [r.metrics["accuracy"].value for r in (low, high)]
    return apart.low > 0, f"{means[0]:.2f} to {means[1]:.2f}"


@check
def higher_rank_is_better() -> Outcome:
    cells = _placement()
    if not cells:
        return awaited("lora_placement")
    cases = {}
    for place, (low, high) in itertools.product(PLACEMENTS, itertools.pairwise(RANKS)):
        up, means = _seeds_rise(cells[place, low], cells[place, high])
        cases[f"{place} r{low} to r{high} ({means})"] = up
    sums = reproduced(cases, "steps up raise the accuracy", PAIRED)
    return _with_language(sums, "all r32")


@check
def both_placements_beat_one() -> Outcome:
    cells = _placement()
    if not cells:
        return awaited("lora_placement")
    cases = {}
    for rank, other in itertools.product(RANKS, PLACEMENTS[:2]):
        up, means = _seeds_rise(cells[other, rank], cells["all", rank])
        cases[f"{other} to all r{rank} ({means})"] = up
    sums = reproduced(cases, "comparisons at the same rank", PAIRED)
    return _with_language(sums, ("attention r128", "mlp r128"))


# ------------------------------------------------------------------ forgetting


@cache
def _judged() -> tuple:
    from lora_kit.studies.forgetting_claims import judge_claims
    from lora_kit.studies.forgetting_report import read_study

    return tuple(judge_claims(read_study()))


def _forgetting(words: str) -> Outcome:
    """A claim of mai2025 as `studies.forgetting_claims` judges it on our records."""
    from lora_kit.studies.forgetting_claims import AT_OUR_SCALE

    (claim,) = [c for c in _judged() if words in c.claim]
    found = claim.ours if claim.verdict in claim.ours else f"{claim.ours} ({claim.verdict})"
    return Outcome(REPRODUCED if claim.verdict == AT_OUR_SCALE else NOT_REPRODUCED, found)


@check
def alpaca_erases_a_skill() -> Outcome:
    return _forgetting("erases most of a skill")


@check
def alpaca_preserves_commonsense() -> Outcome:
    return _forgetting("is preserved")


@check
def alpaca_loses_knowledge() -> Outcome:
    return _forgetting("(MMLU CS) is lost")


@check
def mixed_data_keeps_skills() -> Outcome:
    return _forgetting("mixed data")


# ------------------------------------------------------------------ adapters on one base


@check
def adapters_specialise_one_base() -> Outcome:
    found = [r for r in records("05_adapter_swapping") if "skill" in r.parameters]
    found = [r for r in found if "base_accuracy" in r.metrics]
    if not found:
        return awaited("05_adapter_swapping")
    cases = {}
    for record in found:
        a, b = record.metrics["base_accuracy"], record.metrics["accuracy"]
        cases[f"{record.parameters['skill']} ({a.value:.2f} to {b.value:.2f})"] = b.low > a.high
    return reproduced(cases, "skills rise beyond both intervals on one shared base")


@check
def adapters_hold_less_memory() -> Outcome:
    """One base with three adapters against three models, by the bytes that were held."""
    found = [r.metrics for r in records("07_specialists") if r.parameters.get("part") == "serve"]
    if not found:
        return awaited("07_specialists")
    cases = {}
    for number, m in enumerate(found):
        adapters = (m["bytes base"] + m["bytes three adapters"]) / 1e6
        models = m["bytes three models"] / 1e6
        cases[f"run {number} ({adapters:.0f} MB against {models:.0f})"] = adapters < models
    told = reproduced(cases, "runs: base and three adapters hold less than three models")
    return Outcome(told.verdict, f"{told.found}; {adapters:.0f} MB against {models:.0f}")


# ------------------------------------------------------------------ sums by length


SUMS = "10_arithmetic/lora"  # five seeds at the paper's lengths, 1-7 trained, 1-14 tested


def _sums() -> tuple[list[dict], list[dict], int] | None:
    """Base (4 examples) and tuned by length over seeds: digits, exact with Student's interval,
    digit_accuracy; and how many digits were trained."""
    from lora_kit.studies.arithmetic_cells import DEFAULTS
    from lora_kit.studies.arithmetic_report import Setting

    found = []
    for changed in ({"method": "base", "form": "plain", "shots": 4}, {}):
        wanted = {**DEFAULTS, **changed}
        mine = [r for r in records(SUMS) if all(r.parameters[k] == v for k, v in wanted.items())]
        if not mine:
            return None
        setting = Setting(wanted, changed, tuple(mine))
        digits = setting.curve("digit_accuracy")
        found.append(
            [
                {"digits": e["digits"], "exact": e["mean"], "low": e["low"], "high": e["high"]}
                | {"digit_accuracy": d["mean"]}
                for e, d in zip(setting.curve(), digits, strict=True)
            ]
        )
    return found[0], found[1], DEFAULTS["most_trained"]


@check
def untuned_falls_beyond_six_digits() -> Outcome:
    found = _sums()
    if found is None:
        return awaited(SUMS)
    base = found[0]
    at = {row["digits"]: row["exact"] for row in base}
    words = ", ".join(f"{k} digits {at[k]:.2f}" for k in (1, 2, 3, 6, 7))
    falls = at[6] - at[7] > max(a["exact"] - b["exact"] for a, b in itertools.pairwise(base[:6]))
    return Outcome(REPRODUCED if falls else NOT_REPRODUCED, f"untuned, 4 examples: {words}")


def _rises(base: list[dict], tuned: list[dict], lengths: int) -> dict[str, bool]:
    """Of each of the first lengths, whether tuned lies above base beyond both intervals."""
    return {
        f"{b['digits']} digits ({b['exact']:.2f} to {t['exact']:.2f})": t["low"] > b["high"]
        for b, t in zip(base[:lengths], tuned[:lengths], strict=True)
    }


@check
def tuning_teaches_sums() -> Outcome:
    found = _sums()
    if found is None:
        return awaited(SUMS)
    base, tuned, trained = found
    low, high = (f(row["exact"] for row in tuned[:trained]) for f in (min, max))
    cases = _rises(base, tuned, trained)
    words = f"trained lengths rise beyond both intervals, to {low:.2f} to {high:.2f}"
    return reproduced(cases, words, "95 % intervals over 5 seeds")


@check
def sums_degrade_with_length() -> Outcome:
    found = _sums()
    if found is None:
        return awaited(SUMS)
    _, tuned, trained = found
    low = min(row["low"] for row in tuned[:trained])
    beyond = tuned[trained:]
    cases = {f"{r['digits']} digits ({r['exact']:.2f})": r["high"] < low for r in beyond}
    return reproduced(cases, f"lengths beyond {trained} lie below every trained one's {low:.2f}")


@check
def one_length_beyond_is_better_than_the_base() -> Outcome:
    found = _sums()
    if found is None:
        return awaited(SUMS)
    base, tuned, trained = found
    cases, last = _rises(base, tuned, trained + 1), tuned[trained]
    words = f"lengths up to {trained + 1} rise beyond both intervals; {trained + 1} digits to "
    return reproduced(cases, f"{words}{last['exact']:.2f} [{last['low']:.2f}, {last['high']:.2f}]")


@check
def further_lengths_stay_near_zero() -> Outcome:
    """The paper says "beyond 9 digits", 7 being trained."""
    found = _sums()
    if found is None:
        return awaited(SUMS)
    _, tuned, trained = found
    nine, *far = tuned[trained + 1 :]
    cases = {f"{r['digits']} digits ({r['exact']:.2f})": r["exact"] <= 0.05 for r in far}
    words = f"lengths beyond {nine['digits']} have at most 5 % right ({nine['digits']}: "
    words += f"{nine['exact']:.3f}; {far[0]['digits']}: {far[0]['exact']:.3f}"
    return reproduced(cases, f"{words} [{far[0]['low']:.3f}, {far[0]['high']:.3f}])", "5 %")


@check
def digit_accuracy_falls_more_gently() -> Outcome:
    found = _sums()
    if found is None:
        return awaited(SUMS)
    steps = {
        name: max(a[name] - b[name] for a, b in itertools.pairwise(found[1]))
        for name in ("exact", "digit_accuracy")
    }
    gentle = steps["digit_accuracy"] < steps["exact"]
    words = f"largest fall by one digit, mean of 5 seeds: {steps['exact']:.2f} exact, "
    words += f"{steps['digit_accuracy']:.2f} of digits"
    return Outcome(REPRODUCED if gentle else NOT_REPRODUCED, words)


# ------------------------------------------------------------------ a miniature LoRA Land


def _mini():
    from lora_kit.studies.mini_records import alike, mini_table

    found = [r for r in records("09_lora_land") if "task" in r.parameters and "lift" in r.metrics]
    found, _ = alike(found)
    return mini_table(found) if len(found) > 5 else None


@check
def tuning_lifts_most_tasks() -> Outcome:
    table = _mini()
    if table is None:
        return awaited("09_lora_land")
    above = int((table["lift"] > 0).sum())
    found = f"{above} of {len(table)} tasks rise, mean lift {table['lift'].mean():+.3f}"
    return Outcome(
        REPRODUCED if above >= 0.9 * len(table) else NOT_REPRODUCED, found, "nine tenths"
    )


@check
def lift_follows_heuristics() -> Outcome:
    from lora_kit.studies.mini_records import same_heuristics

    table = _mini()
    if table is None:
        return awaited("09_lora_land")
    frame = same_heuristics(table)
    kept = frame[(frame["p_holm"] < 0.05) & (frame["paper"] * frame["mini"] > 0)]
    found = f"{len(kept)} of {len(frame)} heuristics agree in sign at p < 0.05 (Holm)"
    return Outcome(REPRODUCED if len(kept) else NOT_REPRODUCED, found)


@check
def rows_a_second_on_alpaca() -> Outcome:
    """Mai tuned 50,000 Alpaca rows in 14 hours with Unsloth; how fast were we, held to T4 rules?"""
    found = [
        r
        for r in records("03_qlora_finetuning")
        if r.parameters.get("engine") == "unsloth" and (r.data or {}).get("name") == "alpaca"
    ]
    if not found:
        return awaited("03_qlora_finetuning")
    ours = sum(r.data["rows"] / r.seconds for r in found) / len(found)
    most = text("mai2025", "2.3.1", "TinyLlama, samples").value
    theirs = most / (3600 * text("mai2025", "table 1, note", "TinyLlama, time to tune").value)
    model, card = found[0].model["name"], found[0].hardware["name"].partition(",")[0]
    words = f"ours {ours:.1f} rows/s ({model} on {card}), theirs {theirs:.2f}"
    return Outcome(NOT_REPRODUCED, f"{words} (1.1B on a T4): no common ground")
