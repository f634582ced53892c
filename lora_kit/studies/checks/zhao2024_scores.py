"""Checks of Zhao et al. 2024, sections 4 to 5.4: averages, counts, which base model, GPT-4."""

from __future__ import annotations

from functools import cache

from lora_kit.studies import lora_land
from lora_kit.studies.checks.outcome import (
    Outcome,
    all_of,
    apart,
    cell,
    check,
    column,
    equals,
    holds_if,
    some_of,
    text,
)

PAPER = "zhao2024"
SEVEN_B = ("gemma-7b", "gemma-7b-instruct", "llama-2-7b", "llama-2-7b-chat")
SEVEN_B += ("mistral-7b", "mistral-7b-instruct", "zephyr-7b-beta")
MISTRALS = SEVEN_B[4:]


@cache
def models():
    return lora_land.by_model()


@cache
def best():
    return lora_land.best_per_task()


def tuned_means() -> dict[str, float]:
    return dict(models().loc[lora_land.load_scores().models, "With FT"])


def base_means() -> dict[str, float]:
    return dict(models().loc[lora_land.load_scores().models, "No FT"])


def gpt4() -> float:
    return float(models().loc["gpt-4", "No FT"])


# ------------------------------------------------------------------ averages


@check
def lift_over_base_in_abstract() -> Outcome:
    lift = sum(tuned_means().values()) / 10 - sum(base_means().values()) / 10
    return equals(text(PAPER, "abstract", "lift of fine-tuned over base models"), 100 * lift)


@check
def lift_over_gpt4_in_abstract() -> Outcome:
    mean = 100 * (sum(tuned_means().values()) / 10 - gpt4())
    top = 100 * best().loc["Average", "Lift over GPT-4"]
    cases = {
        f"the best of ten for each task: {top:.1f}": 9.45 < top < 10.5,
        f"the average model: {mean:.1f}": 9.45 < mean < 10.5,
    }
    return some_of(cases, "readings give 10 points")


@check
def gpt4_overall() -> Outcome:
    return equals(text(PAPER, "4", "GPT-4 overall"), gpt4())


@check
def gpt35_overall() -> Outcome:
    return equals(
        text(PAPER, "4", "GPT-3.5 overall"), float(models().loc["gpt-3.5-turbo", "No FT"])
    )


@check
def gpts_lead_before_tuning() -> Outcome:
    best_base = max(base_means().values())
    low = min(gpt4(), models().loc["gpt-3.5-turbo", "No FT"])
    return holds_if(low > best_base, f"{low:.3f} against {best_base:.3f}")


def _lifts() -> list[float]:
    return sorted(100 * models().loc[m, "Average lift from FT"] for m in tuned_means())


@check
def lowest_lift_by_model() -> Outcome:
    return equals(text(PAPER, "4", "lift by base model, lowest"), _lifts()[0])


@check
def highest_lift_by_model() -> Outcome:
    return equals(text(PAPER, "4", "lift by base model, highest"), _lifts()[-1])


@check
def average_lift_by_model() -> Outcome:
    return equals(text(PAPER, "4", "lift by base model, average"), sum(_lifts()) / 10)


def _over_best_base() -> list[float]:
    return sorted(100 * best()["Lift over BM"].drop("Average"))


@check
def lowest_lift_by_task() -> Outcome:
    return equals(text(PAPER, "4", "best tuned over best base, lowest"), _over_best_base()[0])


@check
def highest_lift_by_task() -> Outcome:
    return equals(text(PAPER, "4", "best tuned over best base, highest"), _over_best_base()[-1])


@check
def average_lift_by_task() -> Outcome:
    value = 100 * best().loc["Average", "Lift over BM"]
    return equals(text(PAPER, "4", "best tuned over best base, average"), value)


@check
def best_tuned_average() -> Outcome:
    return equals(text(PAPER, "4", "best tuned, average"), best().loc["Average", "Best FT"])


@check
def best_tuned_beats_gpt4_significantly() -> Outcome:
    lifts = best()["Lift over GPT-4"].drop("Average")
    outcome = apart(float(lifts.mean()), float(lifts.std(ddof=1) / len(lifts) ** 0.5))
    return Outcome(
        outcome.verdict, outcome.found, "1.96 errors over 31 tasks, the best of ten each"
    )


# ------------------------------------------------------------------ counts


@check
def tuned_above_base() -> Outcome:
    return equals("301", int(models()["wins over base"].sum()))


@check
def tuned_above_gpt4() -> Outcome:
    wins = int(models()["wins over GPT-4"].sum())
    slack = int(lora_land.by_model(slack=0.02)["wins over GPT-4"].sum())
    outcome = equals("224", wins)
    return Outcome(outcome.verdict, f"{wins}; {slack} if two points below still wins", "exact")


@check
def losses_are_mostly_gemma() -> Outcome:
    s = lora_land.load_scores()
    worse = (s.tuned <= s.base).sum()
    gemma = int(worse[[m for m in worse.index if m.startswith("gemma")]].sum())
    return holds_if(gemma > worse.sum() / 2, f"{gemma} of {int(worse.sum())}")


@check
def gemma_2b_is_worst_after_tuning() -> Outcome:
    means = tuned_means()
    worst = min(means, key=means.get)
    return holds_if(worst == "gemma-2b", f"worst: {worst}, {means[worst]:.3f}")


@check
def gemma_2b_gains_most() -> Outcome:
    lifts = models()["Average lift from FT"].dropna()
    return holds_if(lifts.idxmax() == "gemma-2b", f"{lifts.idxmax()}, {lifts.max():+.3f}")


@check
def low_scores_gain_most() -> Outcome:
    frame = models().loc[list(tuned_means())]
    r = float(frame["No FT"].corr(frame["Average lift from FT"]))
    return holds_if(r < -0.632, f"r = {r:.2f} over ten models", "r < -0.632: p < 0.05")


@check
def all_beat_gpt35() -> Outcome:
    rival = float(models().loc["gpt-3.5-turbo", "No FT"])
    return all_of({m: v > rival for m, v in tuned_means().items()}, "models")


@check
def seven_b_beat_gpt4_but_gemma() -> Outcome:
    above = {m: tuned_means()[m] > gpt4() for m in SEVEN_B}
    cases = {m: over != m.startswith("gemma") for m, over in above.items()}
    return all_of(cases, "models as said")


@check
def phi_is_competitive_with_gpt4() -> Outcome:
    return holds_if(tuned_means()["phi-2"] >= gpt4(), f"{tuned_means()['phi-2']:.3f}, {gpt4():.3f}")


@check
def tuned_models_surpass_gpt4() -> Outcome:
    return some_of({f"{m} ({v:.3f})": v > gpt4() for m, v in tuned_means().items()}, "models")


# ------------------------------------------------------------------ which base, which size


@check
def mistral_is_best_on_ten_tasks() -> Outcome:
    alone = int(models().loc["mistral-7b", "best alone"])
    shared = int(models().loc["mistral-7b", "best, ties too"])
    outcome = equals(text(PAPER, "5.1", "Mistral-7B best on tasks"), alone)
    return Outcome(outcome.verdict, f"{alone} alone, {shared} with shared first places", "exact")


@check
def mistral_is_best_most_often() -> Outcome:
    firsts = models()["best alone"]
    return holds_if(firsts.idxmax() == "mistral-7b", f"{firsts.idxmax()}: {int(firsts.max())}")


@check
def zephyr_average() -> Outcome:
    return equals(text(PAPER, "5.1", "Zephyr overall average"), tuned_means()["zephyr-7b-beta"])


@check
def zephyr_has_the_highest_average() -> Outcome:
    means = tuned_means()
    top = max(means, key=means.get)
    return holds_if(top == "zephyr-7b-beta", f"{top}, {means[top]:.3f}")


@check
def mistrals_lead() -> Outcome:
    order = sorted(tuned_means(), key=tuned_means().get, reverse=True)
    return holds_if(set(order[:3]) == set(MISTRALS), f"first three: {', '.join(order[:3])}")


@check
def gpt35_is_never_best() -> Outcome:
    count = int(models().loc["gpt-3.5-turbo", "best alone"])
    return equals("0", count, unit=" (gsm8k)" if count else "")


@check
def frequencies_of_first_places() -> Outcome:
    printed = column(PAPER, "table_04", "Frequency FT = max(task)")
    firsts = models()["best alone"]
    cases = {f"{m} ({v:.0f}, is {firsts[m]})": v == firsts[m] for m, v in printed.items()}
    return all_of(cases, "counts of table 4")


@check
def phi_beats_gemmas() -> Outcome:
    means = tuned_means()
    cases = {m: means["phi-2"] > v for m, v in means.items() if m.startswith("gemma")}
    return all_of(cases, "Gemma models")


@check
def phi_behind_llama() -> Outcome:
    a, b = (cell(PAPER, "table_04", m, "With FT").value for m in ("phi-2", "llama-2-7b"))
    exact = 100 * (tuned_means()["llama-2-7b"] - tuned_means()["phi-2"])
    outcome = equals(text(PAPER, "5.2", "Phi-2 behind Llama-2-7b"), 100 * (b - a))
    return Outcome(outcome.verdict, f"{outcome.found} by table 4; {exact:.2f} by table 12", "exact")


@check
def seven_b_beat_two_b() -> Outcome:
    found = lora_land.two_against_seven()
    outcome = equals(text(PAPER, "5.2", "tasks on which 7B beats 2B"), found["seven_ahead"])
    words = f"{found['seven_ahead']} ahead, {found['level']} level, {found['two_ahead']} behind"
    return Outcome(outcome.verdict, words, "exact")


@check
def gemma_instruct_beats_phi_untuned() -> Outcome:
    means = base_means()
    cases = {m: means[m] > means["phi-2"] for m in ("gemma-2b-instruct", "gemma-7b-instruct")}
    return all_of(cases, "Gemma instruct models")


def _auto():
    frame = lora_land.auto_against_instruct()
    return frame.set_index(["reading", "time"])["difference"]


@check
def instruct_leads_before_tuning() -> Outcome:
    gap = float(_auto()["average model", "before"])
    return holds_if(gap > 0, f"{gap:+.3f}")


@check
def instruct_lead_after_tuning() -> Outcome:
    what = "tuned: average instruction-tuned over average auto-complete"
    return equals(text(PAPER, "5.3", what), float(_auto()["average model", "after"]))


@check
def best_auto_leads_after_tuning() -> Outcome:
    gaps = [float(_auto()[r, "after"]) for r in ("best model", "best, task by task")]
    outcome = equals("-0.002", gaps[1])
    return Outcome(outcome.verdict, f"{gaps[0]:+.4f} by model, {gaps[1]:+.4f} by task", "0.0005")


@check
def disparity_narrows() -> Outcome:
    before, after = (float(_auto()["average model", t]) for t in ("before", "after"))
    return holds_if(abs(after) < abs(before), f"{before:+.3f} before, {after:+.3f} after")


# ------------------------------------------------------------------ against GPT-4


@check
def gpt4_ahead_on_six_tasks() -> Outcome:
    lifts = best()["Lift over GPT-4"].drop("Average").round(6)
    return equals(text(PAPER, "5.4", "tasks on which GPT-4 stays ahead"), int((lifts < 0).sum()))


def _glue():
    return best().loc[[t for t in best().index if t.startswith("glue_")]]


@check
def glue_near_90_percent() -> Outcome:
    mean = float(_glue()["Best FT"].mean())
    return holds_if(0.88 <= mean <= 0.92, f"{mean:.3f} over {len(_glue())} tasks", "2 points")


@check
def glue_beats_gpt4() -> Outcome:
    return some_of({t: v > 0 for t, v in _glue()["Lift over GPT-4"].items()}, "GLUE tasks")


@check
def gpt4_leads_on_broad_tasks() -> Outcome:
    lifts = best()["Lift over GPT-4"].drop("Average").sort_values()
    found = ", ".join(f"{t} {v:+.3f}" for t, v in lifts.head(2).items())
    return holds_if(set(lifts.index[:2]) == {"magicoder", "mmlu"}, f"largest deficits: {found}")
