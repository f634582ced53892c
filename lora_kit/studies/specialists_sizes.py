"""Adapters of a size: parameters matched across placements, and what to pick at so many megabytes.

The block "sizes" ran, under the rank-stabilised rule at one rate, the rank of every placement that
fills 1, 5 and 20 MB, and those that match rank 16 and 64 on all layers.
"""

from __future__ import annotations

import pandas as pd

from lora_kit.evaluate.statistics import over_runs
from lora_kit.studies.specialists import (
    ANCHOR,
    BUDGETS,
    PLACEMENTS,
    TASKS_AT_HAND,
    adapter_bytes,
    matched_rank,
    size_table,
)
from lora_kit.studies.specialists_analysis import contrasts, spread_rules
from lora_kit.studies.specialists_compare import MEASURE, with_all_seeds
from lora_kit.studies.specialists_report import (
    Study,
    frame_of,
    main_cells,
    over_items,
    over_seeds,
)

MATCHED_TO = (16, 64)  # ranks on all layers that the others' sizes were matched to


def matched_sizes(shape) -> list[dict[str, int]]:
    """For each size the rank of every placement: {placement: rank}, smallest size first."""
    rows = size_table(shape)
    found = [
        {r["placement"]: r["rank"] for r in rows if r["MB allowed"] == budget} for budget in BUDGETS
    ]
    found += [{p: matched_rank(shape, p, rank) for p in PLACEMENTS} for rank in MATCHED_TO]
    return sorted(found, key=lambda ranks: ranks["all"])


def loss_by_size(study: Study, shape) -> pd.DataFrame:
    """The rank-stabilised runs at rate 0.001 whose setting has every seed, with `MB`: their adapter
    in 16 bits."""
    cells = main_cells(frame_of(study.grid))
    if cells.empty:
        return pd.DataFrame(columns=["task", "placement", "rank", "MB", "loss", "seed"])
    some = spread_rules(cells, ANCHOR)
    some = some[some["scaling"] == "stabilised"]
    return with_size(with_all_seeds(some, ["task", "placement", "rank"]), shape)


def with_size(runs: pd.DataFrame, shape) -> pd.DataFrame:
    """The runs with `MB`, their adapter in 16 bits."""
    pairs = zip(runs["rank"], runs["placement"], strict=True)
    return runs.assign(MB=[adapter_bytes(shape, int(r), p) / 1e6 for r, p in pairs])


def at_equal_size(study: Study, shape) -> list[dict]:
    """Held-out loss of each placement at each size, and that of one placement minus that of all
    layers with as many parameters (seeds as blocks, Holm over the table's lines of a task; `*`
    where p < 0.05)."""
    runs = loss_by_size(study, shape)
    lines: dict[tuple, dict] = {}
    for task in TASKS_AT_HAND:
        some = runs[runs["task"] == task]
        cells = [f"{p} {r}" for p, r in zip(some["placement"], some["rank"], strict=True)]
        some = some.assign(cell=cells)
        ranks = [m for m in matched_sizes(shape) if {f"{p} {m[p]}" for p in m} <= set(cells)]
        pairs = [(f"{p} {m[p]}", f"all {m['all']}") for m in ranks for p in PLACEMENTS[:2]]
        wanted = some[some["cell"].isin({name for pair in pairs for name in pair})]
        found = {c.of: c for c in contrasts(wanted, "loss", "cell", pairs)} if pairs else {}
        for match in ranks:
            for place in PLACEMENTS:
                size = adapter_bytes(shape, match[place], place) / 1e6
                name = f"{place} {match[place]}"
                told = over_seeds(some[some["cell"] == name]["loss"].tolist()).partition(" ")[0]
                if name in found:
                    d, star = found[name].difference, "*" * found[name].significant
                    told += f" ({d.low:+.4f} to {d.high:+.4f}){star}"
                line = {"MB": f"{size:.1f}", "placement": place, "rank": match[place]}
                lines.setdefault((match["all"], place), line)[task] = told
    return list(lines.values())


def pick_at_size(study: Study, shape) -> list[dict]:
    """For each budget in MB and task: of all settings that were run within it with every seed, any
    placement, rule and rate, the one of the lowest held-out loss; how far it lies below the best of
    the next smaller budget (paired by seed); and its score where it was tested."""
    frame = frame_of(study.grid)
    if frame.empty:
        return []
    by = ["placement", "rank", "scaling", "rate"]
    rows = []
    for task in TASKS_AT_HAND:
        runs = frame[(frame["part"] == "tune") & (frame["task"] == task)]
        runs = with_all_seeds(with_size(runs, shape), by)
        before = None
        for budget in BUDGETS:
            fits = runs[runs["MB"] <= budget]
            if fits.empty:
                continue
            best = fits.groupby(by)["loss"].mean().idxmin()
            mine = fits.set_index(by).sort_index().loc[[best]]
            told = {"task": task, "MB allowed": budget, "MB": f"{mine['MB'].iloc[0]:.1f}"}
            told["lowest loss"] = f"{best[0]}, rank {best[1]}, {best[2]}, rate {best[3]:g}"
            told["loss"] = over_seeds(mine["loss"].tolist())
            told["less than within the budget above"] = _below(mine, before)
            metric = " ".join(MEASURE[task])
            tested = metric in mine and mine[metric].notna().any()
            told["score"] = f"{MEASURE[task][1]} {over_items(mine, metric)}" if tested else "-"
            rows.append(told)
            before = mine
    return rows


def _below(mine: pd.DataFrame, before: pd.DataFrame | None) -> str:
    if before is None:
        return ""
    gain = (before.set_index("seed")["loss"] - mine.set_index("seed")["loss"]).dropna()
    if not gain.any():
        return "the same setting"
    e = over_runs(gain.tolist())
    return f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"
