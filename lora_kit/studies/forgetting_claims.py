"""mai2025's table 2, and its claims judged: by its own figures, and by the study's records."""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.studies.forgetting import CENTRE, Published, published_change, seed_interval
from lora_kit.studies.forgetting_report import (
    NO_RECORD,
    Benchmark,
    Study,
    along,
    difference_from,
    read_benchmarks,
    read_settings,
)

HOLDS, AT_OUR_SCALE, NOT = "holds", "holds at our scale", "does not follow"
NOT_AT_OURS, UNDECIDED = "does not hold at our scale", "not decided at our scale"


@dataclass(frozen=True)
class Claim:
    """A claim of mai2025 in our words, what its own figures give, what ours say, the verdict."""

    claim: str
    printed: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class PrintedScore:
    """A cell of the paper's table 2, in percent: value ± error, over n items."""

    task: str
    metric: str
    model: str
    value: float
    error: float
    n: int


ITEMS = {"GSM8K": 1319, "HellaSwag": 10_042, "MMLU CS": 100}  # the paper rounds HellaSwag's


def printed_scores() -> list[PrintedScore]:
    """The scores of mai2025's table 2 that are printed with an error, in its order."""
    from lora_kit.studies.papers import read_table

    found = []
    for line in read_table("mai2025", "table_02").to_dict("records"):
        task, metric = line["row"].split(" / ")
        if line["plus_minus"] > 0 and "Accuracy" in metric:  # NaN where none was printed
            found.append(
                PrintedScore(
                    *(task, metric.removesuffix(" Accuracy"), line["column"]),
                    *(line["value"], line["plus_minus"], ITEMS[task]),
                )
            )
    return found


def published(task: str, metric: str, base: int = 0, tuned: int = 1) -> Published:
    """Two models of table 2 (0 base, 1 tuned, 2 TinyLlama) on one task, for all they allow."""
    some = [s for s in printed_scores() if (s.task, s.metric) == (task, metric)]
    return published_change(some[base].value / 100, some[tuned].value / 100, some[base].n)


NEAR_TOTAL = 0.5  # the paper's own line for catastrophic: a forgetting rate above one half


def judge_claims(study: Study) -> list[Claim]:
    """The paper's claims, each against its own figures and against our records.

    Ours are judged on the strict accuracy of the two taught skills at the map's centre, which is
    the recipe "mai" (rate and rank are the kit's: the paper prints neither), and on the standard
    benchmarks; where records are missing it says so.
    """
    math, sense = published("GSM8K", "Flexible"), published("HellaSwag", "Normalized")
    science, rivals = published("MMLU CS", "Accuracy"), published("MMLU CS", "Accuracy", 2, 1)
    found = {(b.task, b.metric): b for b in read_benchmarks(study)}
    return [
        _forgetting_claim(study, math, found.get(("gsm8k", "exact_match,flexible-extract"))),
        _preserved_claim(found.get(("hellaswag", "acc_norm")), sense),
        _raised_claim(found.get(("hellaswag", "acc_norm")), sense),
        _knowledge_claim(found, science),
        Claim(
            "tuned on 2,000 rows, Llama beats TinyLlama on 50,000 in computer science",
            f"34 against 27 of 100: p = {rivals.p:.2f}",
            "no base TinyLlama was measured: data and architecture cannot be told apart",
            HOLDS if rivals.p < 0.05 else NOT,
        ),
        _mixture_claim(study),
    ]


def _forgetting_claim(study: Study, printed, gsm8k: Benchmark | None) -> Claim:
    rates = _centre_rates(study)
    text = f"33.51 % to 3.71 % of 1,319: p ≤ {printed.p_most:.0e} however paired"
    claim = "tuning on unrelated data erases most of a skill (FR 88.92 %)"
    if not rates:
        return Claim(claim, text, NO_RECORD, NO_RECORD)
    said = [f"{skill} FR {_range(rate)}" for skill, rate in rates.items()]
    mapped = [(s, skill) for skill in rates for s in read_settings(study, skill)]
    most, skill = max(mapped, key=lambda pair: pair[0].rate[0])
    if most.cell.setting != CENTRE.setting:
        where = difference_from(most.cell)
        said.append(f"most on the map: {skill} {_range(most.rate)} at {where}")
    if gsm8k is not None:
        said.append(f"GSM8K {_change(gsm8k)} from {gsm8k.base.value:.3f}, so little to lose")
    over = [_verdict(low > NEAR_TOTAL, high < NEAR_TOTAL) for _, low, high in rates.values()]
    verdict = over[0] if len(set(over)) == 1 else f"{'; '.join(over)}"
    return Claim(claim, text, "; ".join(said), verdict)


def _preserved_claim(ours: Benchmark | None, printed) -> Claim:
    d = printed.difference
    text = f"+0.43 points, 95 % {100 * d.low:+.1f} to {100 * d.high:+.1f}"
    claim = "commonsense (HellaSwag) is preserved"
    if ours is None:
        return Claim(claim, text, NO_RECORD, NO_RECORD)
    e = ours.difference
    # Preserved: no loss of two points or more is compatible with the items.
    return Claim(claim, text, _change(ours), _verdict(e.low > -0.02, e.high < 0))


def _raised_claim(ours: Benchmark | None, printed) -> Claim:
    text = f"+0.43 points without a test: unpaired p = {printed.p:.2f}"
    said = NO_RECORD
    if ours is not None:
        said = f"{_change(ours)}, McNemar p " + ", ".join(f"{p:.1g}" for p in ours.p)
    return Claim("and even raised (ability augmentation)", text, said, NOT)


def _knowledge_claim(found: dict, printed) -> Claim:
    text = (
        f"47 to 34 of 100: unpaired p = {printed.p:.2f}; paired p < 0.05 only if the two disagree "
        f"on at most {printed.disagreement:.0%}"
    )
    ours = found.get(("mmlu", "acc"))
    said = NO_RECORD
    if ours is not None:
        said = f"all of MMLU {_change(ours)}, from {ours.base.value:.3f}, where guessing gives 0.25"
    return Claim("knowledge (MMLU CS) is lost, significantly (13.00 ± 6.93)", text, said, NOT)


def _mixture_claim(study: Study) -> Claim:
    claim = "mixed data may keep what was known (proposed, not tried)"
    said, better = [], []
    for skill in CENTRE.skills:
        on = along(read_settings(study, skill), "replay")
        if len(on) > 1:
            first, last = on[0], on[-1]
            # Seeds are shared, so they are compared seed by seed.
            gains = [a - b for a, b in zip(first.rates, last.rates, strict=False)]
            mean, low, high = seed_interval(gains)
            said.append(
                f"{skill}: FR {first.rate[0]:.2f} without, {last.rate[0]:.2f} with "
                f"{last.cell.replay:.0%} replayed, {_range((mean, low, high))} less"
            )
            better.append(_verdict(low > 0, high < 0))
    if not said:
        return Claim(claim, "no figures", NO_RECORD, NO_RECORD)
    verdict = better[0] if len(set(better)) == 1 else "; ".join(better)
    return Claim(claim, "no figures", "; ".join(said), verdict)


def _verdict(yes: bool, no: bool) -> str:
    """What an interval says of a claim about our own models."""
    return AT_OUR_SCALE if yes else NOT_AT_OURS if no else UNDECIDED


def _centre_rates(study: Study) -> dict[str, tuple[float, float, float]]:
    found = {}
    for skill in CENTRE.skills:
        on = [s for s in read_settings(study, skill) if s.cell.setting == CENTRE.setting]
        if on:
            found[skill] = on[0].rate
    return found


def _change(ours: Benchmark) -> str:
    e = ours.difference
    return f"{100 * e.value:+.2f} points [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"


def _range(rate: tuple[float, float, float]) -> str:
    return f"{rate[0]:.2f} [{rate[1]:.2f}, {rate[2]:.2f}]"
