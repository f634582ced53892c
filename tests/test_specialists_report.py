"""The specialists study's statistics on made-up runs whose truth is known, and its tables."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.evaluate.statistics import proportion
from lora_kit.studies.records import new_record, write_record
from lora_kit.studies.specialists import SCALINGS, cell_from, scale_of
from lora_kit.studies.specialists_analysis import (
    collapse,
    contrasts,
    per_doubling,
    rank_map,
    spread_rules,
    tuned,
    two_way,
    whole_design,
)
from lora_kit.studies.specialists_generations import pack
from lora_kit.studies.specialists_report import (
    NO_RECORD,
    NOT_COMPARABLE,
    PAPER_TABLES,
    beside_paper,
    frame_of,
    interference,
    linked_claims,
    main_cells,
    over_items,
    paper_setting,
    read_study,
)


def runs(truth, ranks=(8, 16, 32), places=("attention", "mlp", "all"), seeds=3, noise=0.01, seed=0):
    """A row a run: truth(rank, place) + a seed's own shift + noise."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 0.2, seeds)
    return pd.DataFrame(
        {"rank": r, "placement": p, "seed": s}
        | {"loss": truth(r, p) + shift[s] + rng.normal(0, noise)}
        for r, p, s in itertools.product(ranks, places, range(seeds))
    )


# ------------------------------------------------------------------ two ways


def test_two_way_finds_what_is_there_and_no_more():
    frame = runs(lambda r, p: 0.1 * np.log2(r) + {"attention": 0, "mlp": 0.05, "all": 0}[p])
    rank, place, both = two_way(frame, "loss")[0]
    assert rank.p < 1e-6
    assert place.p < 1e-3
    assert both.p > 0.05
    assert both.low == 0
    assert rank.low < rank.share < rank.high
    assert both.name == "rank × placement"
    assert two_way(frame, "loss")[1] == pytest.approx(0.01, rel=0.5)


def test_two_way_is_the_textbooks_for_a_balanced_design():
    frame = runs(lambda r, p: 0.02 * r * (p == "all"), noise=0.1)
    (rank, *_), _ = two_way(frame, "loss")
    y = frame.pivot_table(index=["rank", "placement"], columns="seed", values="loss")
    grand, cells = y.to_numpy().mean(), y.to_numpy()
    by_rank = y.groupby("rank").mean().mean(axis=1)
    between = 3 * 3 * ((by_rank - grand) ** 2).sum()
    left = cells - cells.mean(1, keepdims=True) - cells.mean(0, keepdims=True) + grand
    f = (between / 2) / ((left**2).sum() / (8 * 2))
    assert rank.f == pytest.approx(f)
    assert rank.p == pytest.approx(stats.f.sf(f, 2, 16))


def test_share_interval_covers():
    """η² of a noncentral F with known λ lies in its interval about 95 times of 100."""
    from lora_kit.studies.specialists_analysis import _share_interval

    rng, df, left, noncentral = np.random.default_rng(0), 4, 40, 12.0
    truth = noncentral / (noncentral + df + left + 1)
    draws = stats.ncf.rvs(df, left, noncentral, size=200, random_state=rng)
    caught = sum(
        low <= truth <= high for low, high in (_share_interval(f, df, left) for f in draws)
    )
    assert 182 <= caught <= 199


def test_a_design_with_holes_is_refused():
    frame = runs(lambda r, p: 0.0)
    with pytest.raises(BadInputError, match="Not every pair"):
        two_way(frame.iloc[1:], "loss")
    with pytest.raises(BadInputError, match="two seeds"):
        two_way(frame[frame["seed"] == 0], "loss")
    with pytest.raises(BadInputError, match="two levels of rank"):
        two_way(frame[frame["rank"] == 8], "loss")


def test_the_largest_design_without_holes_is_found():
    frame = runs(lambda r, p: 0.0)
    assert len(whole_design(frame)) == len(frame)
    one = frame[~((frame["placement"] == "all") & (frame["rank"] == 8) & (frame["seed"] == 0))]
    left = whole_design(one)  # two ranks on three placements, or three ranks on two: six either way
    assert len(left) == 18
    two_way(left, "loss")
    assert whole_design(frame[frame["placement"] == "all"]).empty
    assert whole_design(frame.iloc[:0]).empty


def test_contrasts_of_two_settings_are_the_paired_t_test():
    frame = runs(lambda r, p: 0.1 * r, ranks=(1, 2), places=("all",), seeds=6, noise=0.05)
    frame["setting"] = [f"r{r}" for r in frame["rank"]]
    (found,) = contrasts(frame, "loss", "setting", [("r2", "r1")])
    a, b = (frame[frame["setting"] == s].sort_values("seed")["loss"] for s in ("r2", "r1"))
    paired = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(paired.pvalue)
    low, high = paired.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high))
    with pytest.raises(BadInputError, match="no runs of r3"):
        contrasts(frame, "loss", "setting", [("r3", "r1")])


def test_several_contrasts_are_corrected():
    frame = runs(lambda r, p: 0.0, ranks=(1, 2, 4, 8), places=("all",), noise=0.05, seed=3)
    frame["setting"] = [f"r{r}" for r in frame["rank"]]
    found = contrasts(frame, "loss", "setting", [(f"r{r}", "r1") for r in (2, 4, 8)])
    assert all(c.p_holm >= c.p for c in found)
    assert min(c.p_holm for c in found) == pytest.approx(min(1, 3 * min(c.p for c in found)))
    assert not any(c.significant for c in found)


def test_map_marks_what_differs_from_rank_16():
    frame = runs(lambda r, p: -0.2 * (p == "all" and r == 32), ranks=(16, 32, 64))
    means, marked = rank_map(frame, "loss")
    assert marked == {("all", 32)}
    assert means.loc["all", 32] == pytest.approx(
        frame[frame["rank"] == 32]["loss"].groupby(frame["placement"]).mean()["all"]
    )
    assert rank_map(frame[frame["seed"] == 0], "loss")[1] == set()
    holes = frame[~((frame["placement"] == "mlp") & (frame["rank"] == 64))]
    holes = holes[~((holes["placement"] == "attention") & (holes["rank"] == 16))]
    holes = holes[~((holes["placement"] == "mlp") & (holes["rank"] == 32) & (holes["seed"] == 2))]
    assert rank_map(holes, "loss")[1] == {("all", 32)}


def test_slope_for_each_doubling():
    frame = runs(lambda r, p: 2 - 0.03 * np.log2(r), ranks=(8, 16, 32, 64), places=("all",))
    slope = per_doubling(frame, "loss")
    assert slope.value == pytest.approx(-0.03, abs=0.01)
    assert slope.low < -0.03 < slope.high
    with pytest.raises(BadInputError, match="two ranks"):
        per_doubling(frame[frame["rank"] == 8], "loss")


# ------------------------------------------------------------------ the effective step


def stepped(gamma, noise=0.002, ranks=(2, 8, 16, 64), rates=(1e-3, 3e-3, 1e-2, 3e-2), seeds=3):
    """Losses that depend on rate · scale · rank^gamma alone."""
    rng, rows = np.random.default_rng(1), []
    for rank, rule, rate, seed in itertools.product(ranks, SCALINGS, rates, range(seeds)):
        if rank == 16 and rule != "fixed":
            continue
        x = np.log(rate * scale_of(rank, rule) * rank**gamma)
        loss = np.exp(0.02 * (x + 2.0) ** 2 + rng.normal(0, noise))
        told = {"rank": rank, "scaling": rule, "rate": rate, "seed": seed}
        rows.append(told | {"scale": scale_of(rank, rule), "loss": loss})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_collapse_finds_the_exponent(gamma):
    found = collapse(stepped(gamma), draws=40)
    assert found.gamma.value == pytest.approx(gamma, abs=0.051)
    assert found.gamma.low <= gamma + 0.051
    assert found.gamma.high >= gamma - 0.051
    assert found.explained > 0.98
    assert found.by_rate < found.explained
    assert found.all > 0.98


def test_collapse_needs_settings():
    with pytest.raises(BadInputError, match="too few"):
        collapse(stepped(0.5, ranks=(2,), rates=(1e-3,)))


def test_tuned_compares_at_rates_that_all_have():
    frame = stepped(1.0)
    best = tuned(frame)
    assert (best.groupby(["scaling", "rank"])["rate"].nunique() == 1).all()
    means = frame.groupby(["scaling", "rank", "rate"])["loss"].mean()
    for (rule, rank), some in best.groupby(["scaling", "rank"]):
        assert some["loss"].mean() == pytest.approx(means[rule, rank].min())
    lacking = frame[~((frame["rank"] == 2) & (frame["rate"] == 1e-2))]
    assert 1e-2 not in set(tuned(lacking)["rate"])
    alone = frame[(frame["rate"] == 1e-3) | (frame["rank"] == 2)]
    alone = alone[~((alone["rank"] == 2) & (alone["rate"] == 1e-3))]
    with pytest.raises(BadInputError, match="tuned alike"):
        tuned(alone)
    spread = spread_rules(frame, 16)
    assert (spread.groupby(["scaling", "rank"]).size() == 12).all()


# ------------------------------------------------------------------ records read again


def record(seed=0, metrics=None, tables=None, **parameters):
    cell = cell_from(parameters, seed)
    told = cell.to_dict() | {"scale": cell.scale}
    return new_record(
        "07_specialists",
        "a test",
        parameters=told,
        metrics=metrics or {},
        seed=seed,
        seconds=1.0,
        tables=tables or {},
    )


def items(**tests):
    return {
        "items": [
            {"test": t, "metric": m, "n": len(v), "items": "x", "version": "1", "scores": pack(v)}
            for (t, m), v in tests["of"].items()
        ]
    }


def test_nothing_is_shown_as_nothing(tmp_path):
    study = read_study(tmp_path)
    assert str(study).startswith("0 cells")
    frame = frame_of(study.grid)
    for name in PAPER_TABLES:
        rows = beside_paper(name, frame)
        ours = [v for row in rows for k, v in row.items() if k.startswith("ours")]
        assert set(ours) == {NO_RECORD, NOT_COMPARABLE}
        assert main_cells(frame).empty
    assert interference(study) == []
    with pytest.raises(UnknownNameError, match="code"):
        beside_paper("cod", frame)


def test_paper_rows_find_their_cells():
    assert paper_setting("Llama-1B-LoRA-Attn-R128") == ("attention", 128)
    assert paper_setting("Llama-1B-LoRA-ALL-R32") == ("all", 32)
    assert paper_setting("Llama-1B-Math-R64") == ("all", 64)
    assert paper_setting("Mistral-7B-Instruct-v0.3") is None
    metrics = {"gsm8k strict": 0.25, "gsm8k flexible": 0.5}
    some = [record(s, metrics, task="gsm8k", rank=32) for s in range(3)]
    others = [record(0, {"gsm8k strict": 0.9}, task="gsm8k", rank=32, learning_rate=3e-3)]
    rows = beside_paper("mathematics", frame_of(some + others))
    (row,) = [r for r in rows if r["row"] == "Llama-1B-Math-R32"]
    assert row["Strict Match"] == "0.2388"
    assert row["ours, Strict Match"].startswith("0.2500 [0.2500")
    (large,) = [r for r in rows if r["row"] == "Llama-3.2-3B-Instruct"]
    assert large["ours, Strict Match"] == NOT_COMPARABLE


def test_a_floor_has_a_width():
    zero = proportion(0, 500).to_metric()
    some = [record(s, {"gsm8k strict": zero}, task="gsm8k") for s in range(3)]
    shown = over_items(frame_of(some), "gsm8k strict")
    assert shown == f"0.0000 [0.0000, {zero['high']:.4f}]"
    assert over_items(frame_of(some[:1]), "gsm8k strict").endswith("(1 seed)")


def test_skipped_and_foreign_files_are_told_apart(tmp_path):
    folder = tmp_path / "07_specialists"
    write_record(record(task="gsm8k"), folder / "a.json")
    large = record(task="gsm8k")
    large.parameters["skipped"] = "too large"
    write_record(large, folder / "b.json")
    small = record(task="sums")
    small.parameters["size"] = "small scale"
    write_record(small, folder / "c.json")
    (folder / "sweep.json").write_text('{"cells": 3}')
    study = read_study(tmp_path)
    assert (len(study.grid), len(study.small)) == (1, 1)
    assert study.skipped == {"gsm8k tune": "too large"}


def test_routed_scores_are_the_routed_specialists(tmp_path):
    test = ("gsm8k", "flexible")
    scores = {"gsm8k": [1.0, 1.0, 0.0, 0.0], "code": [0.0, 0.0, 1.0, 0.0]}
    scores["dialogue"] = [0.0, 0.0, 0.0, 0.0]
    made = [
        record(task=t, tests="all", tables=items(of={test: v}), learning_rate=1e-3)
        for t, v in scores.items()
    ]
    made.append(record(part="base", tests="all", tables=items(of={test: [0.0, 0.0, 0.0, 1.0]})))
    routes = {"routes": [{"test": "gsm8k", "n": 4, "items": "x", "routes": "gdc-"}]}
    made.append(record(part="route", tables=routes))
    made.append(record(task="all", rank=48, tables=items(of={test: [1.0, 1.0, 1.0, 1.0]})))
    folder = tmp_path / "07_specialists"
    for number, some in enumerate(made):
        write_record(some, folder / f"{number}.json")
    (ways,) = interference(read_study(tmp_path))
    # g: the gsm8k adapter's 1; d: the dialogue adapter's 0; c: the code adapter's 1; -: base's 1
    assert ways.means["routed"] == pytest.approx(3 / 4)
    assert ways.means["specialist"] == pytest.approx(2 / 4)
    assert ways.gains["generalist r48"].value == pytest.approx(0.5)
    assert ways.row()["generalist r16"] == NO_RECORD


def test_linked_claims_are_in_the_ledger():
    assert {row["claim"] for row in linked_claims()} >= {"saha2024-026", "saha2024-056"}
