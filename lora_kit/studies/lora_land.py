"""LoRA Land recomputed: Tables 3 and 4, Figures 1, 5, 6 and 7 from the scores of Tables 11 and 12.

Zhao et al. 2024 print every score of 10 models on 31 tasks before (Table 11) and after tuning
(Table 12), and GPT-3.5's and GPT-4's. All summaries follow from these 640 numbers; here they are
made again, each beside what was printed. Scores lie in 0…1; a "point" is 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lora_kit.studies.papers import read_table, wide

if TYPE_CHECKING:
    import pandas as pd

PAPER = "zhao2024"
REFERENCES = ("gpt-3.5-turbo", "gpt-4")
# Table 2 and section 5.3: which of the ten are instruction-tuned.
INSTRUCTION_TUNED = (
    "gemma-2b-instruct",
    "gemma-7b-instruct",
    "llama-2-7b-chat",
    "mistral-7b-instruct",
    "zephyr-7b-beta",
)
TWO_BILLION = ("phi-2", "gemma-2b", "gemma-2b-instruct")
# Half a unit of the third decimal, and what binary fractions add to it.
HALF_UNIT = 0.0005 + 1e-9


@dataclass(frozen=True)
class Scores:
    """Scores by task (31 rows): base and tuned × 10 models, reference × GPT-3.5 and GPT-4.

    printed_lift: as printed beside the tuned scores; metric and category: by task.
    """

    base: pd.DataFrame
    tuned: pd.DataFrame
    printed_lift: pd.DataFrame
    reference: pd.DataFrame
    metric: pd.Series
    category: pd.Series

    @property
    def models(self) -> list[str]:
        return list(self.base.columns)


@cache
def load_scores() -> Scores:
    """The scores of Tables 11 and 12. Do not change the frames: they are shared."""
    before, after = read_table(PAPER, "table_11"), read_table(PAPER, "table_12")
    words = wide(after, what="printed")
    lift = wide(after, "lift").astype(float)
    models = list(lift.columns)
    base = wide(before).drop(columns=["Category", "Metric"]).astype(float)
    tuned = wide(after).drop(columns=["Category", "Metric"]).astype(float)
    return Scores(
        base=base[models],
        tuned=tuned[models],
        printed_lift=lift,
        reference=base[list(REFERENCES)],
        metric=words["Metric"],
        category=words["Category"],
    )


def lift_mismatches(scores: Scores | None = None) -> pd.DataFrame:
    """Cells of Table 12 whose printed lift is not tuned − base to rounding; empty if all are."""
    s = scores or load_scores()
    difference = (s.tuned - s.base - s.printed_lift).stack()
    wrong = difference[difference.abs() > HALF_UNIT].rename("difference").reset_index()
    wrong.columns = ["task", "model", "difference"]
    return wrong


def beside(printed: pd.DataFrame, recomputed: pd.DataFrame, half: float = HALF_UNIT):
    """Printed and recomputed numbers of one table, cell by cell.

    Args:
        printed, recomputed: the same row and column names; cells NaN in `printed` are left out.
        half: the largest difference that rounding of the print explains.

    Returns:
        A frame: row, column, printed, recomputed, difference, agrees.
    """
    made = recomputed.reindex(index=printed.index, columns=printed.columns)
    out = printed.stack().rename("printed").reset_index()
    out.columns = ["row", "column", "printed"]
    out["recomputed"] = [made.at[r, c] for r, c in zip(out["row"], out["column"], strict=True)]
    out["difference"] = out["recomputed"] - out["printed"]
    out["agrees"] = out["difference"].abs() <= half
    return out.dropna(subset=["printed"]).reset_index(drop=True)


def best_per_task(scores: Scores | None = None) -> pd.DataFrame:
    """Table 3: the best of ten base and of ten tuned models for each task, and GPT-4."""
    import pandas as pd

    s = scores or load_scores()
    out = pd.DataFrame(
        {
            "Best BM": s.base.max(axis=1),
            "Best FT": s.tuned.max(axis=1),
            "GPT-4": s.reference["gpt-4"],
        }
    )
    out["Lift over BM"] = out["Best FT"] - out["Best BM"]
    out["Lift over GPT-4"] = out["Best FT"] - out["GPT-4"]
    out.loc["Average"] = out.mean()
    return out


def compare_table_3() -> pd.DataFrame:
    """Table 3's 160 numbers beside the recomputed ones."""
    printed = wide(read_table(PAPER, "table_03")).drop(columns="Metric").astype(float)
    return beside(printed, best_per_task())


def by_model(scores: Scores | None = None, slack: float = 0.0) -> pd.DataFrame:
    """Table 4: one row a model, averaged over 31 tasks.

    No FT, With FT; lifts; on how many tasks tuning beat the base (`wins over base`) and GPT-4
    (`wins over GPT-4`: tuned > GPT-4 − slack), and on how many the model was the best of all
    twelve (`best alone`; `best, ties too` counts shared first places).
    """
    import pandas as pd

    s = scores or load_scores()
    gpt4 = s.reference["gpt-4"]
    out = pd.DataFrame({"No FT": s.base.mean(), "With FT": s.tuned.mean()})
    out["Average lift from FT"] = out["With FT"] - out["No FT"]
    out["Average lift from FT vs. GPT-4"] = out["With FT"] - gpt4.mean()
    out["wins over base"] = (s.tuned > s.base).sum()
    # Printed scores have three decimals: thousandths compare without binary rounding.
    margin = (s.tuned.sub(gpt4, axis=0) * 1000).round()
    out["wins over GPT-4"] = (margin > -round(slack * 1000)).sum()
    for name in REFERENCES:
        out.loc[name, "No FT"] = s.reference[name].mean()
    field = s.tuned.join(s.reference)
    first = field.eq(field.max(axis=1), axis=0)
    out["best alone"] = first[first.sum(axis=1) == 1].sum()
    out["best, ties too"] = first.sum()
    return out


def compare_table_4(slack: float = 0.0) -> pd.DataFrame:
    """Table 4 beside the recomputed numbers; counts compare exactly.

    Args:
        slack: how far below GPT-4 still counts as a win (0.02 gives every printed count).
    """
    import pandas as pd

    table = read_table(PAPER, "table_04")
    means, counts = wide(table).astype(float), wide(table, "count").astype(float)
    made = by_model(slack=slack)
    whole = made.loc[load_scores().models].mean()
    whole[["wins over base", "wins over GPT-4"]] = made[["wins over base", "wins over GPT-4"]].sum()
    made.loc["Average"] = whole
    numbers = ["No FT", "With FT", "Average lift from FT", "Average lift from FT vs. GPT-4"]
    printed = counts.rename(
        columns={
            "Frequency FT > No FT": "wins over base",
            "Frequency FT > GPT-4": "wins over GPT-4",
        }
    )
    first = means[["Frequency FT = max(task)"]].rename(
        columns={"Frequency FT = max(task)": "best alone"}
    )
    return pd.concat(
        [beside(means[numbers], made), beside(printed, made, 0.0), beside(first, made, 0.0)],
        ignore_index=True,
    )


def slack_of_wins(largest: float = 0.03) -> pd.DataFrame:
    """How the count "tuned beats GPT-4" grows when a model may lie some points below it.

    Returns:
        A frame: slack (0 to `largest` in thousandths), wins (of 310), models_as_printed (of 10).
    """
    import pandas as pd

    printed = wide(read_table(PAPER, "table_04"), "count")["Frequency FT > GPT-4"].drop("Average")
    rows = []
    for thousandths in range(round(largest * 1000) + 1):
        wins = by_model(slack=thousandths / 1000)["wins over GPT-4"].dropna()
        same = int((wins == printed.astype(float).reindex(wins.index)).sum())
        rows.append((thousandths / 1000, int(wins.sum()), same))
    return pd.DataFrame(rows, columns=["slack", "wins", "models_as_printed"])


def compare_order(figure: str) -> pd.DataFrame:
    """Figures 1, 5 and 6 print no heights but an order along the axis: printed beside recomputed.

    Args:
        figure: `figure_01` (models by tuned average), `figure_05` (tasks by the best tuned
            model's lift over GPT-4), `figure_06` (models by first places).

    Returns:
        A frame: place, printed, recomputed, height (what the recomputed name's bar shows), agrees.
        Equal heights may stand in any order: a name agrees where its height is the place's.
    """
    import pandas as pd

    printed = read_table(PAPER, figure)["printed"].tolist()
    models = by_model()
    if figure == "figure_01":
        heights = models["With FT"].fillna(models["No FT"])
    elif figure == "figure_05":
        heights = best_per_task()["Lift over GPT-4"].drop("Average")
    elif figure == "figure_06":
        heights = models["best alone"]
    else:
        raise ValueError(f"{figure} prints no order that can be recomputed.")
    heights = heights.loc[printed]  # a stable sort then keeps the printed order of equal bars
    ordered = heights.round(6).sort_values(kind="stable")
    return pd.DataFrame(
        {
            "place": range(1, len(printed) + 1),
            "printed": printed,
            "recomputed": list(ordered.index),
            "height": ordered.to_numpy(),
            "agrees": heights.loc[printed].round(6).to_numpy() == ordered.to_numpy(),
        }
    )


def auto_against_instruct(scores: Scores | None = None) -> pd.DataFrame:
    """Figure 7: auto-complete and instruction-tuned models, before and after tuning.

    "average" is the mean over a group's five models; "best" can be read in two ways: the group's
    best single model, or the best of the group task by task. Both are given.

    Returns:
        A frame by reading and time: auto, instruct, difference (instruct − auto).
    """
    import pandas as pd

    s = scores or load_scores()
    auto = [m for m in s.models if m not in INSTRUCTION_TUNED]
    rows = []
    for time, table in (("before", s.base), ("after", s.tuned)):
        a, b = table[auto], table[list(INSTRUCTION_TUNED)]
        rows += [
            ("average model", time, a.mean().mean(), b.mean().mean()),
            ("best model", time, a.mean().max(), b.mean().max()),
            ("best, task by task", time, a.max(axis=1).mean(), b.max(axis=1).mean()),
        ]
    out = pd.DataFrame(rows, columns=["reading", "time", "auto", "instruct"])
    out["difference"] = out["instruct"] - out["auto"]
    return out


def two_against_seven(scores: Scores | None = None) -> dict[str, int]:
    """Section 5.2: on how many of 31 tasks the best tuned 7B model beats the best tuned 2B one.

    Returns:
        seven_ahead, level, two_ahead.
    """
    s = scores or load_scores()
    two = s.tuned[list(TWO_BILLION)].max(axis=1)
    seven = s.tuned.drop(columns=list(TWO_BILLION)).max(axis=1)
    return {
        "seven_ahead": int((seven > two).sum()),
        "level": int((seven == two).sum()),
        "two_ahead": int((seven < two).sum()),
    }


def quality_measures(scores: Scores | None = None) -> pd.DataFrame:
    """The seven measures of section 5.5.1 for each task, from Tables 11 and 12."""
    import pandas as pd

    s = scores or load_scores()
    gpt4 = s.reference["gpt-4"]
    return pd.DataFrame(
        {
            "GPT-4 Score": gpt4,
            "Max GPT-4 Lift": s.tuned.max(axis=1) - gpt4,
            "Average Base Model Lift": (s.tuned - s.base).mean(axis=1),
            "Best Base Model Score": s.base.max(axis=1),
            "Average Base Model Score": s.base.mean(axis=1),
            "Best Fine-tuned Score": s.tuned.max(axis=1),
            "Average Fine-Tuned Score": s.tuned.mean(axis=1),
        }
    )


def printed_heuristics() -> pd.DataFrame:
    """Table 13's 14 heuristics for each task, by the names of `complexity.HEURISTICS`."""
    return _heuristics().copy()


@cache
def _heuristics() -> pd.DataFrame:
    from lora_kit.studies.complexity import HEURISTICS

    table = wide(read_table(PAPER, "table_13")).astype(float)
    headings = {name: h.replace("Compressibility", "Compr.") for name, h in HEURISTICS.items()}
    out = table[list(headings.values())].loc[load_scores().base.index]
    out.columns = list(headings)
    return out


def compare_table_13() -> pd.DataFrame:
    """The six quality measures Table 13 prints beside those recomputed from Tables 11 and 12."""
    printed = wide(read_table(PAPER, "table_13")).astype(float)
    made = quality_measures()
    return beside(printed[[c for c in printed.columns if c in made.columns]], made)
