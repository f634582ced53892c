"""What a sweep found: one row a setting and metric, and a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lora_kit import figures
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.evaluate.statistics import over_runs
from lora_kit.studies.records import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PANELS = 4  # metrics in a figure that were not asked for by name
COLUMNS = ("metric", "mean", "low", "high", "n")


def summarise(
    records: Iterable[Record], names: Sequence[str], metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """Mean and 95 % interval of every metric over the seeds of each setting.

    The interval is Student's t over runs (`statistics.over_runs`): how far another set of seeds
    may lie, which the interval inside a record, over test items, does not say. Of one run there is
    none. Settings come in the order of the records.

    Args:
        names: the parameters that make a setting; a column each.
        metrics: some of the records' metrics; all by default.

    Raises:
        BadInputError: a record without one of the parameters; UnknownNameError: a metric that no
            record has.
    """
    import pandas as pd

    found: dict[tuple, tuple[dict[str, Any], dict[str, list[float]]]] = {}
    for record in records:
        if missing := [name for name in names if name not in record.parameters]:
            raise BadInputError(f"A record of {record.study} has no parameter {missing[0]}.")
        setting = {name: _plain(record.parameters[name]) for name in names}
        _, values = found.setdefault(tuple(map(repr, setting.values())), (setting, {}))
        for name, metric in record.metrics.items():
            values.setdefault(name, []).append(
                metric if isinstance(metric, float) else metric.value
            )
    known = {name: None for _, values in found.values() for name in values}
    for name in metrics or ():
        if found and name not in known:
            raise unknown_name("metric", name, known)
    rows = []
    for setting, values in found.values():
        for name in metrics or values:
            if name in values:
                e = over_runs(values[name])
                single = e.n == 1
                low, high = (float("nan"),) * 2 if single else (e.low, e.high)
                rows.append([*setting.values(), name, e.value, low, high, e.n])
    return pd.DataFrame(rows, columns=[*names, *COLUMNS])


def draw_summary(
    table: pd.DataFrame, metrics: Sequence[str] | None = None, title: str = ""
) -> Figure | None:
    """A panel a metric: lines over a parameter that is a number, else one point a setting.

    Where one or two parameters vary and one is a number of three or more values, that one is the
    axis and the other tells lines apart. Bars are the table's intervals.

    Args:
        table: as `summarise` makes it.
        metrics: by default the first four that are not the same everywhere.

    Returns:
        The figure; None where there is nothing to draw.

    Raises:
        UnknownNameError: a metric the table does not have.
    """
    import matplotlib.pyplot as plt

    names = [c for c in table.columns if c not in COLUMNS]
    varied = [n for n in names if table[n].map(repr).nunique() > 1]
    chosen = list(metrics or [])
    for name in chosen:
        if name not in set(table["metric"]):
            raise unknown_name("metric", name, set(table["metric"]))
    if not chosen:
        spread = table.groupby("metric", sort=False)["mean"].nunique()
        chosen = [m for m in table["metric"].unique() if spread[m] > 1][:PANELS]
    if not chosen:
        return None
    figures.use_style()
    axis = _axis(table, varied)
    settings = table[varied].map(repr).drop_duplicates() if varied else table.head(1)
    tall = 3.2 if axis else min(12.0, 1.4 + 0.32 * len(settings))
    across = min(2, len(chosen))
    down = -(-len(chosen) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(5.0 * across + 1.0, tall * down), squeeze=False, layout="constrained"
    )
    for i, panel in enumerate(axes.flat):
        if i >= len(chosen):
            panel.remove()
            continue
        part = table[table["metric"] == chosen[i]]
        if axis:
            _lines(panel, part, axis, [n for n in varied if n != axis])
        else:
            _points(panel, part, varied, labels=i % across == 0)
        panel.set_title(chosen[i].replace("_", " "))
    if title:
        figure.suptitle(title)
    plt.close(figure)  # shown by nobody; saved by the caller
    return figure


def _axis(table: pd.DataFrame, varied: Sequence[str]) -> str | None:
    numbers = [
        n
        for n in varied
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in table[n])
        and table[n].nunique() > 2
    ]
    if not numbers or len(varied) > 2:
        return None
    return max(numbers, key=lambda n: table[n].nunique())


def _lines(panel, part: pd.DataFrame, axis: str, other: list[str]) -> None:
    groups = part.groupby(other[0], sort=False) if other else [("", part)]
    for value, rows in groups:
        rows = rows.sort_values(axis)
        errors = [(rows["mean"] - rows["low"]).fillna(0), (rows["high"] - rows["mean"]).fillna(0)]
        label = f"{other[0]} {value}" if other else None
        panel.errorbar(rows[axis], rows["mean"], yerr=errors, capsize=3, label=label)
    values = sorted(part[axis].unique())
    if values[0] > 0 and values[-1] / values[0] >= 10:
        panel.set_xscale("log")
    panel.set_xticks(values, [f"{v:g}" for v in values])
    panel.minorticks_off()
    panel.set_xlabel(axis)
    panel.set_ylabel(_counted(part))
    if other:
        panel.legend()


def _points(panel, part: pd.DataFrame, varied: Sequence[str], labels: bool) -> None:
    places = range(len(part))
    errors = [(part["mean"] - part["low"]).fillna(0), (part["high"] - part["mean"]).fillna(0)]
    panel.errorbar(part["mean"], places, xerr=errors, fmt="o", capsize=3)
    words = [", ".join(f"{n} {row[n]}" for n in varied) or "all" for _, row in part.iterrows()]
    panel.set_yticks(places, words if labels else [""] * len(part))
    panel.set_ylim(len(part) - 0.5, -0.5)
    panel.set_xlabel(_counted(part))


def _counted(part: pd.DataFrame) -> str:
    least, most = part["n"].min(), part["n"].max()
    runs = f"{least} run{'s' if most > 1 else ''}" if least == most else f"{least} to {most} runs"
    return f"mean of {runs}, 95 %" if most > 1 else "one run"


def _plain(value: Any) -> Any:
    """A list as text: a table's column is grouped and compared."""
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else value
