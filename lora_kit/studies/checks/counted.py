"""Checks against the papers' own data: sizes of benchmarks, and rankings scored again.

All read one record, data/results/published_data, which `benchmarks/published_data.py` makes.
"""

from __future__ import annotations

from lora_kit.studies.checks.measured import awaited, records, reproduced
from lora_kit.studies.checks.outcome import (
    HOLDS,
    NOT_REPRODUCED,
    REPRODUCED,
    Outcome,
    cell,
    check,
    equals,
    text,
)


def _published() -> dict | None:
    found = records("published_data")
    return found[0].metrics if found else None


def _count(printed, key: str, scale: float = 1.0) -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    outcome = equals(printed, metrics[key] / scale)
    right = outcome.verdict.startswith(HOLDS)
    return Outcome(outcome.verdict if right else NOT_REPRODUCED, outcome.found, outcome.tolerance)


def _gsm8k(printed) -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    rows = metrics["gsm8k_train"] + metrics["gsm8k_test"]
    near = abs(rows / 1000 - printed.value) <= 0.05
    return Outcome(HOLDS if near else NOT_REPRODUCED, f"{rows:,.0f} rows", "50 rows")


@check
def gsm8k_rows_of_saha() -> Outcome:
    return _gsm8k(text("saha2024", "3.4.2", "GSM8K, problems"))


@check
def gsm8k_rows_of_mai() -> Outcome:
    return _gsm8k(text("mai2025", "1.1, note 2", "GSM8K, problems"))


@check
def gsm8k_rows_of_zhao() -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    cases = {}
    for split in ("train", "test"):
        printed = cell("zhao2024", "figure_02", "gsm8k", f"# examples / {split}").value
        counted = metrics[f"gsm8k_{split}"]
        cases[f"{split} ({printed:.0f}, is {counted:.0f})"] = printed == counted
    found = "; ".join(cases)
    return Outcome(HOLDS if all(cases.values()) else NOT_REPRODUCED, found)


@check
def hellaswag_validation_of_saha() -> Outcome:
    return _count(text("saha2024", "3.4.3", "HellaSwag, validation rows"), "hellaswag_validation")


@check
def hellaswag_validation_of_zhao() -> Outcome:
    printed = cell("zhao2024", "figure_02", "hellaswag", "# examples / validation")
    return _count(printed, "hellaswag_validation")


@check
def hellaswag_rows_of_mai() -> Outcome:
    return _count(text("mai2025", "2.4", "HellaSwag, n"), "hellaswag_validation")


@check
def hellaswag_has_192_activities() -> Outcome:
    printed = text("saha2024", "3.4.3", "HellaSwag, subset").printed
    return _count(printed.partition("/")[2], "hellaswag_activities")


@check
def hellaswag_is_chosen_not_completed() -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    printed = text("saha2024", "4.1.1", "HellaSwag, completions allowed").value
    endings = metrics["hellaswag_endings"]
    found = f"each row offers {endings:.0f} endings to choose from; none is completed"
    return Outcome(HOLDS if endings == printed else NOT_REPRODUCED, found)


@check
def humaneval_problems() -> Outcome:
    return _count(text("saha2024", "3.4.1", "HumanEval, problems"), "humaneval_problems")


@check
def mmlu_subjects_of_mai() -> Outcome:
    return _count(text("mai2025", "1.1, note 3", "MMLU, subjects"), "mmlu_subjects")


@check
def mmlu_subjects_of_alwadhi() -> Outcome:
    return _count(text("alwadhi2024", "4.1", "MMLU, subjects"), "mmlu_subjects")


@check
def mmlu_test_of_zhao() -> Outcome:
    return _count(cell("zhao2024", "figure_02", "mmlu", "# examples / test"), "mmlu_test")


@check
def alpaca_has_python_rows() -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    want, whole = (
        text("saha2024", "3.3", f"Alpaca, {what}").value for what in ("Python rows", "all rows")
    )
    share = metrics["alpaca_rows_that_name_python"] / metrics["alpaca_rows_at_hand"]
    found = f"{share:.1%} of {metrics['alpaca_rows_at_hand']:,.0f} rows name Python: about "
    found += f"{share * whole:,.0f} of {whole:,.0f}, where {want:,.0f} were used"
    return Outcome(HOLDS if share * whole > want / 2 else NOT_REPRODUCED, found, "a factor of two")


def _ndcg(row: str, key: str) -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    m = metrics[f"ndcg_{key}_diverse"]
    outcome = equals(cell("oswal2025", "table_02", row, "QPR / NDCG"), m.value)
    found = f"{m.value:.4f} [{m.low:.3f}, {m.high:.3f}] from the models' own answers"
    right = outcome.verdict.startswith(HOLDS)
    return Outcome(outcome.verdict if right else NOT_REPRODUCED, found, outcome.tolerance)


@check
def ndcg_of_llama() -> Outcome:
    return _ndcg("Llama3.2-1B-EC", "llama_1b")


@check
def ndcg_of_smollm2_large() -> Outcome:
    return _ndcg("SmolLM2-1.7B-EC", "smollm2_1p7b")


@check
def ndcg_of_smollm2_small() -> Outcome:
    return _ndcg("SmolLM2-360M-EC", "smollm2_360m")


@check
def ranking_level_with_gpt4() -> Outcome:
    metrics = _published()
    if metrics is None:
        return awaited("published_data")
    m = metrics["ndcg_llama_1b_diverse"]
    rival = cell("oswal2025", "table_02", "GPT-4 Turbo", "QPR / NDCG").value
    found = f"{m.value:.4f} [{m.low:.3f}, {m.high:.3f}] over 1,000 questions, GPT-4 {rival}"
    return Outcome(REPRODUCED if m.low <= rival <= m.high else NOT_REPRODUCED, found)


@check
def unseen_instruction_is_followed() -> Outcome:
    found = records("published_data")
    if not found:
        return awaited("published_data")
    rows = [r for r in found[0].tables["differences"] if r["pair"].endswith("diverse - single")]
    cases = {
        f"{r['pair'].split(':')[0]} ({r['value']:+.4f})": abs(r["value"]) <= 0.01 for r in rows
    }
    return reproduced(cases, "models rank the same within 0.01 under either instruction", "0.01")
