"""The rules by which checks decide: each verdict can come out, on its side of the line."""

import pytest

from lora_kit.errors import UnknownNameError
from lora_kit.evaluate.statistics import standard_error
from lora_kit.studies.checks import counted, measured, outcome
from lora_kit.studies.checks.mai2025_scores import spread
from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    NOT_REPRODUCED,
    OVERSTATED,
    REPRODUCED,
    ROUNDING,
    Cell,
    all_of,
    apart,
    binomial_error,
    cell,
    column,
    equals,
    half_unit,
    holds_if,
    level,
    number_in,
    some_of,
    two_sided,
)
from lora_kit.studies.checks.zhao2024_complexity import left_out, measures, rho, rho_range
from lora_kit.studies.land_models import correlations, leave_one_task_out


@pytest.mark.parametrize(
    ("printed", "value", "verdict"),
    [
        ("21.6%", 21.6, HOLDS),
        ("21.6%", 21.55, ROUNDING),
        ("21.6%", 21.649, ROUNDING),
        ("21.6%", 21.66, CONTRADICTED),
        ("301", 301, HOLDS),
        ("301", 302, CONTRADICTED),
        ("15,878", 15878, HOLDS),
        ("+38.7", 38.39, CONTRADICTED),
        ("-0.002", -0.0031612, CONTRADICTED),
        ("−0.002", -0.0021, ROUNDING),
    ],
)
def test_equals(printed, value, verdict):
    assert equals(printed, value).verdict == verdict


def test_equals_lets_the_inputs_rounding_pass_and_no_more():
    assert equals("6.93", 6.918, 6.91, 6.9251).verdict == ROUNDING
    assert equals("6.93", 6.918, 6.91, 6.92).verdict == CONTRADICTED
    printed = Cell(1.24, float("nan"), "1.24B parameters")
    assert equals(printed, 1.2358, unit="B").found == "1.2358B"
    assert "exact" in equals("7", 7).tolerance


def test_digits_of_numerals():
    assert half_unit("21.6%") == pytest.approx(0.05)
    assert half_unit("0.449") == pytest.approx(0.0005)
    assert half_unit("15,878") == 0.5
    assert number_in("up to -1,234.5 ms") == -1234.5
    with pytest.raises(ValueError, match="no number"):
        number_in("none")


def test_exceptions_are_counted_and_named():
    cases = {"a": True, "b": False, "c": True}
    assert all_of(cases) == outcome.Outcome(CONTRADICTED, "2 of 3 cases; not b")
    assert some_of(cases).verdict == OVERSTATED
    assert some_of({"a": False}).verdict == CONTRADICTED
    assert all_of({"a": True}).verdict == some_of({"a": True}).verdict == HOLDS
    assert holds_if(False, "x").verdict == CONTRADICTED


@pytest.mark.parametrize(
    ("difference", "said", "alike"),
    [(1.97, HOLDS, OVERSTATED), (1.95, OVERSTATED, HOLDS), (-1.0, CONTRADICTED, HOLDS)],
)
def test_differences_against_their_errors(difference, said, alike):
    assert apart(difference, 1.0).verdict == said
    assert level(difference, 1.0).verdict == alike


def test_errors_are_lm_evals():
    scores = [1] * 34 + [0] * 66
    assert binomial_error(0.34, 100) == pytest.approx(standard_error(scores))
    assert two_sided(1.959964) == pytest.approx(0.05, abs=1e-6)


def test_cells_are_looked_up_by_name():
    assert cell("saha2024", "table_01", "Llama-3B-Code-r128", "pass@1").value == 0.2160
    assert cell("mai2025", "table_02", "MMLU CS / Accuracy", "TinyLlama 1.1B (50k)") == Cell(
        27.0, 4.46, "27.00% ± 4.46%"
    )
    assert len(column("oswal2025", "table_02", "PSI / F1")) == 8  # one cell is a dash
    with pytest.raises(UnknownNameError, match="Did you mean"):
        cell("saha2024", "table_01", "Llama-3B-Code-r129", "pass@1")
    with pytest.raises(UnknownNameError, match="column of saha2024"):
        column("saha2024", "table_01", "pass@5")


def test_two_checks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Two checks"):
        outcome.check(counted.humaneval_problems)


def test_spread_takes_the_corners():
    low, high = spread(lambda a, b: a - b, Cell(1.0, 0, "1.0"), Cell(0.5, 0, "0.5"))
    assert (low, high) == pytest.approx((0.4, 0.6))


def test_short_cuts_agree_with_the_full_study():
    full = correlations("spearman").set_index(["heuristic", "measure"])["r"]
    for pair in (("output_mean", "Max GPT-4 Lift"), ("compressibility_std", "GPT-4 Score")):
        assert rho(*pair) == pytest.approx(full[pair])
        low, high = rho_range(*pair)
        assert low - 0.02 <= full[pair] <= high + 0.02
    slow = leave_one_task_out(["Max GPT-4 Lift"]).set_index("model")["over_mean"]
    assert left_out("Max GPT-4 Lift", False) == pytest.approx(slow["linear"], rel=1e-6)
    assert left_out("Max GPT-4 Lift", True) == pytest.approx(slow["linear + base"], rel=1e-6)
    assert len(measures()) == 31


def test_measured_checks_follow_the_records(monkeypatch):
    for module in (measured, counted):
        monkeypatch.setattr(module, "records", lambda study: ())
    without = [
        measured.higher_rank_is_better,
        measured.tuning_lifts_most_tasks,
        measured.sums_degrade_with_length,
        measured.adapters_hold_less_memory,
        measured.tuning_teaches_sums,
        measured.untuned_falls_beyond_six_digits,
        counted.humaneval_problems,
        counted.ndcg_of_llama,
    ]
    for function in without:
        found = function()
        assert found.verdict == NOT_REPRODUCED
        assert "no record yet" in found.found
    monkeypatch.undo()
    cells = measured._placement()
    turned = {(p, r): cells[p, {2: 128, 8: 32, 32: 8, 128: 2}[r]] for p, r in cells}
    assert "9 of 9 steps up" in measured.higher_rank_is_better().found
    assert measured.higher_rank_is_better().verdict == NOT_REPRODUCED  # at α = 16 it is not better
    monkeypatch.setattr(measured, "_paper_steps", lambda: (("all r32 to all r128, a", True),))
    assert measured.higher_rank_is_better().verdict == REPRODUCED
    monkeypatch.setattr(measured, "_paper_steps", lambda: ())
    for function in (measured.higher_rank_is_better, measured.both_placements_beat_one):
        assert function().verdict == NOT_REPRODUCED  # addition alone decides nothing
        assert "no record yet in data/results/07_specialists" in function().found
    monkeypatch.setattr(measured, "_paper_steps", lambda: (("mlp r128 to all r128, a", True),))
    assert "5 of 8 comparisons" in measured.both_placements_beat_one().found  # paired over seeds
    assert measured.both_placements_beat_one().verdict == NOT_REPRODUCED
    monkeypatch.setattr(measured, "_placement", lambda: turned)
    monkeypatch.setattr(measured, "_paper_steps", lambda: (("all r32 to all r128, a", True),))
    assert measured.higher_rank_is_better().verdict == NOT_REPRODUCED


def test_sums_are_judged_over_seeds_and_by_length(monkeypatch):
    """A made-up study: the base falls after six digits, the tuned model after seven."""

    def rows(*exact):
        return [
            {"digits": k, "exact": e, "low": e - 0.01, "high": e + 0.01, "digit_accuracy": e}
            for k, e in enumerate(exact, start=1)
        ]

    base = rows(0.5, 0.5, 0.5, 0.5, 0.5, 0.45, 0.1, 0, 0, 0)
    tuned = rows(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.4, 0.1, 0.04)
    monkeypatch.setattr(measured, "_sums", lambda: (base, tuned, 7))
    assert measured.untuned_falls_beyond_six_digits().verdict == REPRODUCED
    assert measured.tuning_teaches_sums().verdict == REPRODUCED
    assert measured.further_lengths_stay_near_zero().verdict == REPRODUCED
    assert "9: 0.100" in measured.further_lengths_stay_near_zero().found
    tuned[-1]["exact"] = 0.06
    assert measured.further_lengths_stay_near_zero().verdict == NOT_REPRODUCED
    base[0]["exact"] = 0.95
    assert measured.untuned_falls_beyond_six_digits().verdict == NOT_REPRODUCED
