"""What answers without any knowledge score on ECInstruct's ten tasks, beside the printed scores.

A floor is the best of: a random answer, one answer to everything, the order given. Which floor can
be had depends on what is known of the test rows (`Floor.basis`):

    rows         computed from the rows themselves
    published    from label shares that follow from printed accuracy, recall and specificity
    options      from the number of options alone
    bound        no constant or random answer can score more, whatever the shares
    assumed      from the shares of the data set that the rows were drawn from
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_kit import store
from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.evaluate.shop_metrics import ndcg
from lora_kit.evaluate.shop_tasks import SHOP_TASKS

if TYPE_CHECKING:
    import pandas as pd

DOMAINS = {"IND": "table_02", "OOD": "table_03"}
PAPER = "oswal2025"
# MAVE's own counts (Yang et al. 2022): attributes of products with and without a value.
MAVE = {"value": 2_987_151, "none": 1_780_428}
# Labels of the Shopping Queries Dataset as commonly quoted (Reddy et al. 2022, all languages).
ESCI = {"E": 0.6517, "S": 0.2191, "I": 0.1004, "C": 0.0289}
# bert-score's published baseline: mean F of unrelated English sentences, roberta-large, layer 17.
UNRELATED_TEXTS = 0.83122575


@dataclass(frozen=True)
class Floor:
    """What one trivial answer scores. answer: in words; basis: see the module's text."""

    task: str
    domain: str
    answer: str
    score: float
    basis: str
    how: str


# ------------------------------------------------------------------ formulas


def always_yes(share: float) -> float:
    """F1 of answering yes throughout: precision p, recall 1, so 2p/(1 + p)."""
    return 2 * share / (1 + share)


def random_yes(share: float, rate: float = 0.5) -> float:
    """F1 of answering yes at random at a rate q: precision p, recall q, so 2pq/(p + q). It grows
    with q: of all blind answers "always yes" scores most."""
    return 2 * share * rate / (share + rate)


def macro_bound(labels: int) -> float:
    """No answer that ignores the question has a macro-F1 above 1/K: a constant one gets 2p/(1 + p)
    for its label and 0 for the others, a random one Σ 2pₖqₖ/(pₖ + qₖ)/K ≤ Σ (pₖ + qₖ)/2/K = 1/K."""
    return 1 / labels


def blind_macro(shares: Sequence[float], rates: Sequence[float]) -> float:
    """Macro-F1 of drawing label k with probability qₖ whatever the question, in a large sample."""
    pairs = zip(shares, rates, strict=True)
    return sum(2 * p * q / (p + q) if p + q else 0.0 for p, q in pairs) / len(shares)


def share_of_yes(accuracy: float, recall: float, specificity: float) -> float:
    """p from accuracy = p · recall + (1 − p) · specificity.

    Raises:
        BadInputError: recall and specificity are equal, so that every p fits.
    """
    if recall == specificity:
        raise BadInputError("Equal recall and specificity say nothing about the share of yes.")
    return (accuracy - specificity) / (recall - specificity)


def null_star(share: float) -> float:
    """F1* of answering null throughout where a share s of attributes is null: P = 1, R = s."""
    return 2 * share / (1 + share)


# ------------------------------------------------------------------ shares


def published_shares() -> dict[tuple[str, str], tuple[float, float, int]]:
    """{(task, domain): (lowest, highest share of yes that some row gives, questions)}.

    Every row is rounded to three digits, so its share is a range; the intersection of all rows of a
    task is kept, as whole counts.

    Raises:
        BadInputError: two rows contradict each other.
    """
    path = store.repository() / "data" / "shop" / "ecinstruct_counts.csv"
    found: dict[tuple[str, str], list] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        key = row["task"], row["domain"]
        values = [float(row[name]) for name in ("accuracy", "recall", "specificity")]
        ends = [
            share_of_yes(*(v + half * sign for v, sign in zip(values, signs, strict=True)))
            for half in (0.0005,)
            for signs in itertools.product((-1, 1), repeat=3)
        ]
        low, high, n = found.get(key, (0.0, 1.0, int(row["questions"])))
        found[key] = (max(low, min(ends)), min(high, max(ends)), n)
    for key, (low, high, n) in found.items():
        if low > high:
            raise BadInputError(f"The published rows of {' '.join(key)} contradict each other.")
        found[key] = (-(-low * n // 1) / n, high * n // 1 / n, n)
    return found


def ranking_labels() -> list[list[str]]:
    """The options' labels of ECInstruct's 1,000 ranking questions, where they are at hand.

    Raises:
        NotAvailableError: they are not.
    """
    from lora_kit.data import read_jsonl

    root = store.local_data()
    path = root / "ecinstruct_qpr" / "labels.jsonl.gz" if root else None
    if path is None or not path.exists():
        raise NotAvailableError("Set LORA_KIT_DATA to a folder that holds ecinstruct_qpr.")
    return [row["labels"] for row in read_jsonl(path)]


def ranking_floors(labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean NDCG of the given order, of its reverse, and of a random order (its expectation: the
    mean over all permutations of each question)."""
    orders = {
        "given order": lambda n: [list(range(n))],
        "reversed": lambda n: [list(range(n))[::-1]],
        "random order": lambda n: list(itertools.permutations(range(n))),
        "worst order": None,
    }
    found = {}
    for name, make in orders.items():
        values = []
        for names in labels:
            tried = make(len(names)) if make else itertools.permutations(range(len(names)))
            scores = [ndcg(order, names) for order in tried]
            values.append(sum(scores) / len(scores) if make else min(scores))
        found[name] = sum(values) / len(values)
    return found


def recorded_ranking() -> dict[str, float] | None:
    """`ranking_floors` as the committed record has them; None without one."""
    from lora_kit.studies.records import read_records

    for record in read_records("08_small_shops_floors"):
        return {name: float(value) for name, value in record.metrics.items()}
    return None


# ------------------------------------------------------------------ the floors


def floors(ranking: Mapping[str, float] | None = None) -> list[Floor]:
    """Every floor, in and out of domain.

    Args:
        ranking: what `ranking_floors` gives; the rows' at hand or the record's by default. Without
            either the ranking task has no floor.
    """
    made: list[Floor] = []
    null = MAVE["none"] / sum(MAVE.values())
    shares = published_shares()
    for domain in DOMAINS:
        made += [
            Floor("AVE", domain, "null throughout, by F1*", null_star(null), "assumed",
                  f"{null:.3f} of MAVE's attributes have no value"),
            Floor("AVE", domain, "null throughout, by entries", null, "assumed",
                  "as ECInstruct's script counts; the same share"),
            Floor("PRP", domain, "any blind answer", macro_bound(3), "bound", "three labels"),
            Floor("SA", domain, "any blind answer", macro_bound(5), "bound", "five labels"),
            Floor("SR", domain, "random or constant", 1 / 20, "options", "twenty options"),
            Floor("AG", domain, "an unrelated text", UNRELATED_TEXTS, "published",
                  "bert-score's baseline, roberta-large"),
        ]  # fmt: skip
    made += [
        Floor("MPC", "IND", "random", 1 / 4, "options", "four options"),
        Floor("MPC", "IND", "majority (exact)", ESCI["E"], "assumed",
              "labels of the Shopping Queries Dataset"),
    ]  # fmt: skip
    for (task, domain), (low, high, n) in shares.items():
        share = (low + high) / 2
        how = f"{low * n:.0f} to {high * n:.0f}" if high > low else f"{low * n:.0f}"
        how = f"{how} of {n:,} are yes"
        made += [
            Floor(task, domain, "always yes", always_yes(share), "published", how),
            Floor(task, domain, "a coin", random_yes(share), "published", how),
            Floor(task, domain, "majority", always_yes(share) if share > 0.5 else 0.0,
                  "published", how),
        ]  # fmt: skip
    for name, value in (ranking or _ranking()).items():
        if name != "worst order":
            made.append(Floor("QPR", "IND", name, value, "rows", "1,000 questions' labels"))
    order = list(SHOP_TASKS)
    return sorted(made, key=lambda f: (f.domain, order.index(f.task), -f.score))


def _ranking() -> Mapping[str, float]:
    try:
        return ranking_floors(ranking_labels())
    except NotAvailableError:
        return recorded_ranking() or {}


def best_floors(found: Sequence[Floor] | None = None) -> dict[tuple[str, str], Floor]:
    """The highest floor of each task and domain; for AVE by entries, which is how ECInstruct's
    authors scored the models whose numbers the paper took over."""
    best: dict[tuple[str, str], Floor] = {}
    for floor in found if found is not None else floors():
        key = floor.task, floor.domain
        if "by F1*" in floor.answer:
            continue
        if key not in best or floor.score > best[key].score:
            best[key] = floor
    return best


def beside_floors(domain: str = "IND", found: Sequence[Floor] | None = None) -> pd.DataFrame:
    """The printed table of a domain with its floors: one line a model and task.

    Columns: model, task, metric, score, floor, answer (the trivial one), basis, above (score −
    floor), room ((score − floor)/(1 − floor): the share of what lies above the floor).
    """
    import pandas as pd

    from lora_kit.studies.papers import read_table, wide

    best = best_floors(found)
    table = wide(read_table(PAPER, DOMAINS[domain]))
    lines = []
    for column in table:
        task, metric = column.split(" / ")
        floor = best.get((task, domain))
        for model, value in table[column].dropna().items():
            line = {"model": model, "task": task, "metric": metric, "score": value}
            if floor:
                above = value - floor.score
                line |= {"floor": floor.score, "answer": floor.answer, "basis": floor.basis}
                line |= {"above": above, "room": above / (1 - floor.score)}
            lines.append(line)
    return pd.DataFrame(lines)


def measure():
    """The record of what the rows at hand give: the ranking task's floors.

    Raises:
        NotAvailableError: the rows are not at hand.
    """
    import time

    from lora_kit.studies.records import new_record

    started = time.perf_counter()
    labels = ranking_labels()
    return new_record(
        "08_small_shops_floors",
        "python benchmarks/small_shops.py --part floors",
        parameters={"task": "QPR", "questions": len(labels)},
        metrics=ranking_floors(labels),
        seconds=time.perf_counter() - started,
        data={"name": "ecinstruct_qpr", "rows": len(labels)},
    )
