"""Four papers' tables as data: shapes, ranges, ±, and cells that were read with special care."""

import pytest

from lora_kit.studies.papers import read_table, tables, wide

SHAPES = {
    "saha2024": {
        "table_01": (9, 3),
        "table_02": (9, 4),
        "table_03": (12, 3),
        "table_04": (6, 3),
    },
    "mai2025": {"table_01": (3, 4), "table_02": (8, 3)},
    "oswal2025": {"table_01": (6, 2), "table_02": (9, 10), "table_03": (8, 6)},
    "alwadhi2024": {"table_01": (4, 1), "table_02": (5, 1), "table_03": (5, 1)},
}
SCORES = [
    *(("saha2024", f"table_{n:02}") for n in (1, 2, 3, 4)),
    *(("oswal2025", f"table_{n:02}") for n in (2, 3)),
    *(("alwadhi2024", f"table_{n:02}") for n in (2, 3)),
]
LOST = {
    "saha2024": set(),
    "mai2025": {"figure_01"},
    "oswal2025": {"figure_01", "figure_02", "figure_03", "figure_04"},
    "alwadhi2024": {"figure_01", "figure_02", "figure_03"},
}


@pytest.mark.parametrize("paper", SHAPES)
def test_tables_are_whole(paper):
    assert set(tables(paper)) == {*SHAPES[paper], *LOST[paper], "text"}
    for table, shape in SHAPES[paper].items():
        frame = wide(read_table(paper, table), what="printed")
        assert frame.shape == shape, table
        assert frame.notna().all().all()


@pytest.mark.parametrize("paper", LOST)
def test_only_pictures_were_lost(paper):
    for table in tables(paper):
        lost = read_table(paper, table)["printed"] == ""
        assert lost.all() if table in LOST[paper] else not lost.any(), table


@pytest.mark.parametrize(("paper", "table"), SCORES)
def test_scores_lie_between_0_and_1(paper, table):
    frame = read_table(paper, table)
    numbers = frame[frame["column"] != "Group"]
    assert numbers["value"].dropna().between(0, 1).all()
    dashes = numbers[numbers["value"].isna()]
    assert set(dashes["printed"]) <= {"-"}


def test_dashes_are_where_they_are_printed():
    frame = read_table("oswal2025", "table_02")
    dashes = frame[frame["printed"] == "-"]
    assert list(zip(dashes["row"], dashes["column"], strict=True)) == [
        ("SmolLM2-360M-EC", "PSI / F1"),
        ("Llama3.2-1B-EC", "AVE / F1*"),
    ]
    assert (read_table("mai2025", "table_02")["printed"] == "-").sum() == 6


def test_errors_stand_in_their_own_column():
    frame = read_table("mai2025", "table_02")
    with_error = frame[frame["plus_minus"].notna()]
    assert len(with_error) == 16
    assert (with_error["unit"] == "%").all()
    for cell in with_error.to_dict("records"):
        value, error = cell["printed"].replace("%", "").replace("*", "").split("±")
        assert (float(value), float(error)) == (cell["value"], cell["plus_minus"])


def test_copied_cells_are_printed_as_they_stand_and_noted():
    frame = read_table("saha2024", "table_02").set_index(["row", "column"])
    row = "Llama-1B-LoRA-MLP-R128"
    values = [frame.loc[(row, c), "value"] for c in ("ROUGE-1", "ROUGE-2", "ROUGE-L")]
    assert values == [0.0023, 0.0765, 0.2238]
    assert all(frame.loc[(row, c), "note"].startswith("as printed") for c in ("ROUGE-1", "ROUGE-2"))
    twice = read_table("oswal2025", "table_03")
    mistral = twice[twice["row"] == "Mistral-7B Instruct-v0.2"]
    assert len(mistral) == 6
    assert mistral["note"].str.contains("repeats the row").all()


SUMS = {  # added up from the papers' texts by another program than the one that wrote the files
    ("saha2024", "table_01"): 2.7572,
    ("saha2024", "table_02"): 5.5601,
    ("saha2024", "table_03"): 13.6046,
    ("saha2024", "table_04"): 5.8502,
    ("mai2025", "table_02"): 607.11,
    ("oswal2025", "table_02"): 45.662,
    ("oswal2025", "table_03"): 20.101,
    ("alwadhi2024", "table_02"): 2.04,
    ("alwadhi2024", "table_03"): 2.36,
}


@pytest.mark.parametrize(("paper", "table"), SUMS)
def test_sums_over_the_tables(paper, table):
    assert read_table(paper, table)["value"].sum() == pytest.approx(SUMS[paper, table], abs=1e-9)
