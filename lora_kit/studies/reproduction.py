"""Our numbers beside the printed ones: filled from the records in data/results/, row by row.

A row without a record says so; one that arrives is shown at the next reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_kit.studies.papers import known_paper, read_table

NO_RECORD = "no record yet"


@dataclass(frozen=True)
class Side:
    """A printed number or statement and ours; `where`: our model and machine; `record`: its file,
    or "" where there is none."""

    what: str
    printed: str
    ours: str
    where: str = ""
    record: str = ""


def beside(paper: str) -> list[Side]:
    """Printed and measured, row by row; rows without a record say so.

    Raises:
        UnknownNameError: no such paper.
    """
    return _SIDES[known_paper(paper)]()


def _printed(paper: str, table: str, row: str, column: str) -> str:
    frame = read_table(paper, table)
    return frame[(frame["row"] == row) & (frame["column"] == column)]["printed"].iloc[0]


def _where(record) -> str:
    return f"{(record.model or {}).get('name', 'no model')}, {record.hardware['name']}"


def _percent(metric) -> str:
    half = 100 * (metric.high - metric.low) / 2
    return f"{100 * metric.value:.1f} % ± {half:.1f}"


def _saha() -> list[Side]:
    from lora_kit.studies.records import read_records

    cells = {
        (r.parameters["placement"], r.parameters["rank"]): r for r in read_records("lora_placement")
    }
    names = {"attention": ("Attn", "Attn"), "mlp": ("MLP", "MLP"), "all": ("ALL", "All")}
    rows = []
    for rank in (32, 128):
        for place, (summary, sense) in names.items():
            rouge = _printed("saha2024", "table_02", f"Llama-1B-LoRA-{summary}-R{rank}", "ROUGE-1")
            share = _printed("saha2024", "table_03", f"Llama-1B-LoRA-{sense}-R{rank}", "Accuracy")
            what, printed = f"{place}, r {rank}", f"HellaSwag {share}, ROUGE-1 {rouge}"
            record = cells.get((place, rank))
            if record is None:
                rows.append(Side(what, printed, NO_RECORD))
            else:
                ours = f"sums right {_percent(record.metrics['accuracy'])}"
                name = f"lora_placement/{place}_r{rank:03}.json"
                rows.append(Side(what, printed, ours, _where(record), name))
    return rows


def _mai() -> list[Side]:
    from lora_kit.studies.checks import measured
    from lora_kit.studies.records import read_records

    table = "table_02"
    tuned = "Fine-tuned Llama 3.2 1B (2k)"
    rows = []
    for what, row, check in (
        ("GSM8K forgetting rate", "GSM8K / Forgetting Rate (FR)", measured.alpaca_erases_a_skill),
        (
            "HellaSwag, change",
            "HellaSwag / Ability Augmentation (ΔA)",
            measured.alpaca_preserves_commonsense,
        ),
        ("MMLU CS, loss", "MMLU CS / Knowledge Loss (ΔK)", measured.alpaca_loses_knowledge),
    ):
        printed, ours = _printed("mai2025", table, row, tuned), check().found
        have = NO_RECORD not in ours
        rows.append(
            Side(
                what,
                printed,
                ours if have else NO_RECORD,
                "smollm2-135m-instruct" if have else "",
                "06_forgetting" if have else "",
            )
        )
    by_engine: dict[str, list] = {}
    for record in read_records("03_qlora_finetuning"):
        if (record.data or {}).get("rows") == 2000:
            by_engine.setdefault(record.parameters["engine"], []).append(record)
    for engine, records in by_engine.items():
        losses = [r.metrics["heldout_loss"] for r in records]
        before = records[0].metrics["heldout_loss_of_base"]
        seconds = sum(r.seconds for r in records) / len(records)
        ours = f"held-out loss {before:.2f} to {sum(losses) / len(losses):.3f} in {seconds:.0f} s"
        name = f"03_qlora_finetuning/alpaca2000_{engine}_seed*.json"
        what = f"2,000 Alpaca rows, {engine}"
        rows.append(Side(what, "no loss, no time", ours, _where(records[0]), name))
    return rows


def _oswal() -> list[Side]:
    from lora_kit.studies.records import read_records

    models = {
        "Llama3.2-1B-EC": "llama_1b",
        "SmolLM2-1.7B-EC": "smollm2_1p7b",
        "SmolLM2-360M-EC": "smollm2_360m",
        "Llama3.2-3B-EC": "llama_3b",
        "SmolLM-1.7B-EC": "smollm_1p7b",
    }
    found = read_records("published_data")
    scored = set(read_table("oswal2025", "table_02")["row"])
    rows = []
    for model, key in models.items():
        printed = "not printed"
        if model in scored:
            printed = _printed("oswal2025", "table_02", model, "QPR / NDCG")
        if not found:
            rows.append(Side(f"NDCG, {model}", printed, NO_RECORD))
            continue
        m = found[0].metrics[f"ndcg_{key}_diverse"]
        ours = f"{m.value:.4f} [{m.low:.3f}, {m.high:.3f}]"
        name = "published_data/published_data.json"
        rows.append(Side(f"NDCG, {model}", printed, ours, "the model's published answers", name))
    return rows + _matching()


def _matching() -> list[Side]:
    """Product matching: the paper's on random pairs; ours on such, and on pairs that look alike."""
    from lora_kit.studies.shop_cells import DEFAULTS
    from lora_kit.studies.shop_report import label, read_study, standing

    records, rows = read_study(), []
    printed = _printed("oswal2025", "table_02", "SmolLM2-360M-EC", "PM / F1")
    for task, what, told in (
        ("match_random", "product matching, random pairs", f"360M-EC {printed}"),
        ("match", "the same, pairs that look alike", "not tried"),
    ):
        found = [s for s in standing(records, task, "tuned") if s.parameters["task"] == task]
        found = [s for s in found if s.parameters["recipe"] != "oswal" and len(s.records) > 2]
        found = [s for s in found if s.parameters["learning_rate"] == DEFAULTS["learning_rate"]]
        if not found:
            rows.append(Side(what, told, NO_RECORD))
            continue
        longest = max(found, key=lambda s: s.parameters["steps"])
        e = longest.estimate(f"{task}_inside")
        ours = f"{label(longest)}: F1 {e.value:.3f} [{e.low:.3f}, {min(1, e.high):.3f}]"
        rows.append(Side(what, told, ours, _where(longest.records[0]), "08_small_shops/gpu"))
    return rows


def _zhao() -> list[Side]:
    from lora_kit.studies.mini_records import alike, mini_table
    from lora_kit.studies.records import read_records

    base = _printed("zhao2024", "table_04", "Average", "No FT")
    tuned = _printed("zhao2024", "table_04", "Average", "With FT")
    wins = _printed("zhao2024", "table_04", "Average", "Frequency FT > No FT")
    records, _ = alike([r for r in read_records("09_lora_land") if "lift" in r.metrics])
    if not records:
        return [
            Side("average before and after", f"{base}, {tuned}", NO_RECORD),
            Side("models above their base", wins, NO_RECORD),
            *_serving(),
        ]
    table, where = mini_table(records), _where(records[0])
    ours = f"{table['base'].mean():.3f}, {table['tuned'].mean():.3f} over {len(table)} tasks"
    above = sum(r.metrics["lift"].value > 0 for r in records)
    share = f"{100 * above / len(records):.1f}% ({above}/{len(records)})"
    return [
        Side("average before and after", f"{base}, {tuned}", ours, where, "09_lora_land"),
        Side("models above their base", wins, share, where, "09_lora_land"),
        *_serving(),
    ]


def _serving() -> list[Side]:
    """Latency of 25 adapters over the bare base at 50 users, from a record with that metric."""
    from lora_kit.studies.records import read_records

    totals = [
        float(_printed("zhao2024", table, "Total request time / average", "50 concurrent users"))
        for table in ("table_09", "table_08")
    ]
    what, printed = "25 adapters over the base, 50 users", f"{totals[0] / totals[1]:.2f} times"
    for record in read_records("05_adapter_swapping"):
        if "adapters_over_base" in record.metrics:
            ratio = record.metrics["adapters_over_base"]
            value = ratio if isinstance(ratio, float) else ratio.value
            place = "05_adapter_swapping"
            return [Side(what, printed, f"{value:.2f} times", _where(record), place)]
    return [Side(what, printed, NO_RECORD)]


def _alwadhi() -> list[Side]:
    """Sums by length over seeds at the paper's lengths (notebook 10): base with four examples, and
    tuned."""
    from lora_kit.studies.arithmetic_cells import DEFAULTS
    from lora_kit.studies.arithmetic_report import LORA, read_settings
    from lora_kit.studies.records import read_records

    if not read_records(LORA):
        return [Side("sums by length", "a picture", NO_RECORD)]
    found = {setting.label: setting for setting in read_settings(LORA, DEFAULTS)}
    base, tuned = found.get("base, form plain, shots 4"), found.get("plain")
    if base is None or tuned is None:
        return [Side("sums by length", "a picture", NO_RECORD)]
    rows = []
    curves = (base.curve(), tuned.curve(), tuned.curve("digit_accuracy"))
    for before, after, digits in zip(*curves, strict=True):
        seen = "trained" if after["digits"] <= DEFAULTS["most_trained"] else "not trained"
        ours = f"{before['mean']:.2f} to {after['mean']:.2f} right "
        ours += f"[{after['low']:.2f}, {after['high']:.2f}], {digits['mean']:.2f} of digits"
        what = f"{after['digits']} digits, {seen}"
        where = f"{_where(tuned.records[0])}, {after['seeds']} seeds"
        rows.append(Side(what, "a picture", ours, where, LORA))
    return rows


_SIDES: dict[str, Callable[[], list[Side]]] = {
    "saha2024": _saha,
    "mai2025": _mai,
    "oswal2025": _oswal,
    "zhao2024": _zhao,
    "alwadhi2024": _alwadhi,
}
