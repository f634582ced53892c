"""The addition study's records read again."""

import pytest

from lora_kit.studies import arithmetic_cells, arithmetic_report, coupled_cells
from lora_kit.studies.arithmetic_report import (
    LORA,
    MMLU,
    NO_RECORD,
    Setting,
    arithmetic_table,
    coupled_table,
    leakage_rows,
    match,
    planned,
    read_settings,
)
from lora_kit.studies.records import new_record, write_record

DEFAULTS = arithmetic_cells.DEFAULTS


def lengths(exact):
    kinds = {"unreadable": 0, "length": 1, "carry": 2, "other": 0}
    return [
        {"digits": k, "n": 10, "exact": e, "low": e - 0.1, "high": e + 0.1}
        | {"digit_accuracy": e, "edit_distance": 5 - 5 * e, **kinds}
        for k, e in exact.items()
    ]


@pytest.fixture
def root(tmp_path):
    """Two seeds of `plain`, one of `reversed`, as the sweep leaves them."""
    for method, seed, exact in (
        ("plain", 0, {7: 0.8, 8: 0.4}),
        ("plain", 1, {7: 0.6, 8: 0.2}),
        ("reversed", 0, {7: 1.0, 8: 0.9}),
    ):
        made = new_record(
            "10_arithmetic",
            "lora-kit sweep",
            parameters=DEFAULTS | {"method": method},
            metrics={},
            tables={"lengths": lengths(exact)},
            seed=seed,
            seconds=1.0,
        )
        write_record(made, tmp_path / LORA / f"{method}_{seed}.json")
    return tmp_path


def test_settings_gather_their_seeds(root):
    found = {s.label: s for s in read_settings(LORA, DEFAULTS, root)}
    assert set(found) == {"plain", "reversed"}
    assert [r.seed for r in found["plain"].records] == [0, 1]
    seven, eight = found["plain"].curve()
    assert (seven["digits"], seven["mean"], seven["seeds"], seven["n"]) == (7, 0.7, 2, 20)
    # Student's interval of two seeds 0.2 apart: 0.7 ± 12.7 · 0.1, held within 0 and 1.
    assert (seven["low"], seven["high"]) == (0.0, 1.0)
    assert eight["mean"] == pytest.approx(0.3)
    alone = found["reversed"].curve()[1]
    assert (alone["low"], alone["high"]) == (pytest.approx(0.8), 1.0), "the record's own interval"
    edits = found["reversed"].curve("edit_distance")
    assert [r["mean"] for r in edits] == pytest.approx([0, 0.5])
    assert found["plain"].kinds(True) == {"unreadable": 0, "length": 2, "carry": 4, "other": 0}
    assert found["plain"].at(8).startswith("0.300 (")
    assert found["plain"].at(99) == ""


def test_what_has_no_record_says_so(root):
    rows = arithmetic_table(root)
    assert len(rows) == len(planned("arithmetic"))
    by_label = {row["setting"]: row for row in rows}
    assert by_label["plain"]["7 digits"].startswith("0.700")
    assert by_label["plain"]["seeds"] == 2
    assert by_label["scratchpad"]["7 digits"] == NO_RECORD
    assert by_label["scratchpad"]["seeds"] == 0
    assert all(NO_RECORD in row.values() for row in coupled_table(root))
    assert leakage_rows(root) == []


def test_labels_tell_settings_apart():
    for grid, defaults in (
        ("arithmetic", DEFAULTS),
        ("coupled", coupled_cells.DEFAULTS),
    ):
        labels = [s.label for s in match(planned(grid), defaults, [])]
        assert len(set(labels)) == len(labels)
    assert Setting(DEFAULTS | {"rank": 4}, {"rank": 4}).label == "plain, rank 4"


def test_leakage_is_gathered_over_seeds(tmp_path):
    def metric(value):
        return {"value": value, "low": 0.0, "high": 1.0, "n": 4}

    for seed, after in ((0, 1.0), (1, 0.5)):
        made = new_record(
            "10_mmlu",
            "lora-kit sweep",
            parameters={"part": "leakage", **arithmetic_report.leakage_cells.DEFAULTS},
            metrics={
                "leaked_before": metric(0.25),
                "leaked_after": metric(after),
                "leaked_difference": metric(after - 0.25),
                "leaked_p": 0.5 - after / 4,
            },
            seed=seed,
            seconds=1.0,
        )
        write_record(made, tmp_path / MMLU / f"{seed}.json")
    row, *others = leakage_rows(tmp_path)
    assert (row["before"], row["after"], row["seeds"]) == ("0.250", "0.750", 2)
    assert row["asked"] == "leaked"
    assert row["least p"] == "0.25"
    # 0.75 and 0.25: their mean, and Student's interval of two, 12.7 · 0.25 wide, holds 0.
    assert row["change"] == "+0.500 (-2.677 to +3.677)"
    assert {o["asked"] for o in others} == {NO_RECORD}, "what the grid has and no record says so"
    assert len(others) == len(planned("leakage")) - 1
    assert all(list(o) == list(row) for o in others)


def test_committed_records_are_read():
    for folder, defaults in (
        (arithmetic_report.COUPLED, coupled_cells.DEFAULTS),
        (arithmetic_report.CPU, DEFAULTS),
        (LORA, DEFAULTS),
    ):
        for setting in read_settings(folder, defaults):
            assert setting.curve(), setting.label


def scored(method, seed, bits, **changed):
    """A record whose only sums are of 8 digits, right or wrong as `bits` say."""
    right = bits.count("1") / len(bits)
    row = {"digits": 8, "n": len(bits), "exact": right, "low": 0.0, "high": 1.0}
    row |= {"digit_accuracy": right, "edit_distance": 0.0}
    return new_record(
        "10_arithmetic",
        "lora-kit sweep",
        parameters=DEFAULTS | {"method": method, **changed},
        metrics={},
        tables={
            "lengths": [row],
            "items": [{"digits": 8, "scores": bits}],
            "places": [{"digits": 8, "place": 0, "n": len(bits), "right": right}],
            "carries": [
                {"digits": 8, "chain": 0, "n": len(bits), "right": bits.count("1")},
                {"digits": 1, "chain": 0, "n": 1, "right": 0},
            ],
        },
        seed=seed,
        seconds=1.0,
    )


def test_settings_are_paired_by_seed_and_sum():
    plain = Setting(DEFAULTS, {}, (scored("plain", 0, "0011"), scored("plain", 1, "0001")))
    other = DEFAULTS | {"rank": 4}
    both = Setting(other, {"rank": 4}, tuple(scored("plain", s, "0111", rank=4) for s in (1, 0)))
    found = arithmetic_report.paired(plain, both, [8])
    # +0.25 and +0.5: Student's interval of two is 12.7 · 0.125 to either side.
    assert (found.value, found.n) == (pytest.approx(0.375), 2)
    assert found.high - found.value == pytest.approx(12.706 * 0.125, rel=1e-3)
    alone = Setting(other, {"rank": 4}, (scored("plain", 1, "1111", rank=4),))
    found = arithmetic_report.paired(plain, alone, [8])
    assert (found.value, found.n) == (0.75, 1)
    assert found.low < 0.75 <= found.high, "over the sums of the one seed"
    never = Setting(other, {"rank": 8})
    rows = arithmetic_report.against(plain, [both, never], {"8 digits": [8]})
    assert rows[0] == {
        "setting": "plain, rank 4",
        "seeds": 2,
        "8 digits": "+0.375 (-1.213 to +1.963)",
    }
    assert rows[1]["8 digits"] == NO_RECORD
    (aim, empty) = arithmetic_report.aim_rows([both, never], digits=8, aim=0.75)
    assert (aim["lowest"], aim["seeds at 75% or more"]) == ("0.750", "2")
    assert empty["8 digits"] == NO_RECORD


def test_a_second_star_stands_after_holms_correction():
    """Alone among the settings a difference keeps both stars; among four it loses one: p is 0.02,
    four times that is not below 0.05."""
    bits = ["0" * 10 + "1" * 10, "0" * 12 + "1" * 8, "0" * 11 + "1" * 9]
    plain = Setting(DEFAULTS, {}, tuple(scored("plain", s, b) for s, b in enumerate(bits)))
    gained = ["0" * 6 + "1" * 14, "0" * 7 + "1" * 13, "0" * 8 + "1" * 12]  # +0.2, +0.25, +0.15
    changed = {"rank": 4}
    better = Setting(
        DEFAULTS | changed,
        changed,
        tuple(scored("plain", s, b, **changed) for s, b in enumerate(gained)),
    )
    noise = ["0" * 10 + "1" * 10, "0" * 11 + "1" * 9, "0" * 12 + "1" * 8]  # 0, +0.05, -0.05
    others = [
        Setting(
            DEFAULTS | {"rank": n},
            {"rank": n},
            tuple(scored("plain", s, b, rank=n) for s, b in enumerate(noise)),
        )
        for n in (8, 16, 64)
    ]
    (alone,) = arithmetic_report.against(plain, [better], {"8 digits": [8]})
    assert alone["8 digits"].endswith(") **")
    rows = arithmetic_report.against(plain, [better, *others], {"8 digits": [8]})
    assert rows[0]["8 digits"].endswith(") *")
    assert not any("*" in row["8 digits"] for row in rows[1:])


def test_seeds_that_agree_keep_an_interval():
    """Two seeds with every sum right leave Student's interval no width; Wilson's has one."""
    right = Setting(DEFAULTS, {}, tuple(scored("plain", s, "1" * 50) for s in (0, 1)))
    (row,) = right.curve()
    assert (row["mean"], row["high"]) == (1.0, 1.0)
    assert row["low"] == pytest.approx(0.963, abs=1e-3), "100 of 100, not 50 of 50"


def test_tables_are_gathered_over_seeds():
    runs = (scored("plain", 0, "0011"), scored("plain", 1, "0001"))
    setting = Setting(DEFAULTS, {}, runs)
    assert setting.places() == [{"digits": 8, "place": 0, "right": 0.375}]
    assert setting.chains([8]) == [{"chain": 0, "n": 8, "right": 0.375}]
    assert setting.chains([2, 7]) == []
    (row,) = setting.artefact()
    assert (row["digits"], row["exact"], row["product"]) == (8, 0.375, 0.375)


def test_a_slope_is_a_fall_a_digit(root):
    plain = next(s for s in read_settings(LORA, DEFAULTS, root) if s.label == "plain")
    assert plain.slope("exact", 7, 8).value == pytest.approx(0.4)
    assert plain.each(7) == {0: 0.8, 1: 0.6}
