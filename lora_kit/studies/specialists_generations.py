"""What models wrote, kept in saha2024's formats, and judged with or without a model at hand.

One JSON-lines file a test (sections 4.1.1 and 4.1.2), one line an answer:

    humaneval    {"task_id", "completion"}
    summaries    {"article_id", "article", "generated_summary", "reference_summary"}
    numbers      {"problem_id", "problem", "completion", "answer"}   (the paper prints no format)

and beside it `<test>.json`: the test's name and version, a fingerprint of its items, and who wrote
the answers. A file of another version, or of other items, is refused: its scores would be read as
those of the test that has the name today.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit import store
from lora_kit.data import read_jsonl
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError
from lora_kit.evaluate.statistics import Estimate, estimate
from lora_kit.studies.specialists_tasks import TESTS, Test, missing_data

FORMATS = {
    "code": ("task_id", "completion"),
    "summary": ("article_id", "article", "generated_summary", "reference_summary"),
    "number": ("problem_id", "problem", "completion", "answer"),
}


@dataclass(frozen=True)
class Judged:
    """A test's score. values: {metric: one number an item}, in the items' order; means: of each,
    with its 95 % interval over items. `note` says what could not be judged, and why."""

    test: str
    values: dict[str, list[float]]
    means: dict[str, Estimate]
    fingerprint: str
    note: str = ""


def known_test(name: str) -> Test:
    from lora_kit.errors import unknown_name

    if name not in TESTS:
        raise unknown_name("test of specialists", name, TESTS)
    return TESTS[name]


def fingerprint_items(test: Test, items: Sequence[Mapping]) -> str:
    """A hash of what is asked and what counts as right."""
    if test.judge == "code":
        return store.sha256_json([row["problem"].fingerprint for row in items])[:16]
    right = [row.get("references") or [row["completion"]] for row in items]
    named = [[row["id"], r] for row, r in zip(items, right, strict=True)]
    return store.sha256_json(named)[:16]


# ------------------------------------------------------------------ judging


def judge(test: Test, items: Sequence[Mapping], answers: Sequence[Sequence[str]]) -> Judged:
    """Score answers: for each item its texts, one (greedy) or several.

    code: pass@1, and pass@n from n > 1 answers, each program run in the sandbox (a program that
    hangs is ended there). number: GSM8K's strict and flexible reading; of several answers the mean,
    whether any is right, and whether the most frequent number is ("majority"). summary: ROUGE-1,
    ROUGE-2 and ROUGE-L against the best of the references.

    Raises:
        BadInputError: not one row of answers an item, or rows of different lengths.
    """
    if len(answers) != len(items) or len({len(row) for row in answers}) != 1 or not answers[0]:
        raise BadInputError(
            f"{test.name} has {len(items)} items; answers to {len(answers)}, and as many to each, "
            "are needed."
        )
    judges = {"code": _judge_code, "number": _judge_numbers, "summary": _judge_summaries}
    values, note = judges[test.judge](items, answers)
    means = {name: estimate(found) for name, found in values.items()}
    return Judged(test.name, values, means, fingerprint_items(test, items), note)


def _judge_code(items, answers) -> tuple[dict[str, list[float]], str]:
    from lora_kit.evaluate.code import check_answers, pass_at_k

    problems = [row["problem"] for row in items]
    try:
        checked = check_answers(problems, answers, say=None)
    except NotAvailableError as e:
        return {}, f"not judged on this machine: {e}"
    counts = [(len(row), sum(a.passed for a in row)) for row in checked]
    ks = sorted({1, counts[0][0]})
    return {f"pass@{k}": [pass_at_k(n, c, k) for n, c in counts] for k in ks}, ""


def _judge_numbers(items, answers) -> tuple[dict[str, list[float]], str]:
    from collections import Counter

    from lora_kit.word_problems import judge_numbers, last_number, marked_number

    expected = [row["completion"] for row in items]
    draws = [judge_numbers(some, expected) for some in zip(*answers, strict=True)]
    values = {}
    for i, name in enumerate(("strict", "flexible")):
        each = [[float(x) for x in row] for row in zip(*(d[i] for d in draws), strict=True)]
        values[name] = [sum(row) / len(row) for row in each]
        if len(draws) > 1:
            values[f"{name} any"] = [max(row) for row in each]
            read = marked_number if name == "strict" else last_number
            most = [Counter(map(read, row)).most_common(1)[0][0] for row in answers]
            right = [marked_number(text) for text in expected]
            values[f"{name} majority"] = [float(a == b) for a, b in zip(most, right, strict=True)]
    return values, ""


def _judge_summaries(items, answers) -> tuple[dict[str, list[float]], str]:
    from lora_kit.evaluate.generation_metrics import ROUGE_KINDS, rouge

    found = rouge([row[0] for row in answers], [row["references"] for row in items])
    return {kind: [round(v, 3) for v in found[kind].values] for kind in ROUGE_KINDS}, ""


# ------------------------------------------------------------------ files


def write_generations(
    folder: Path, test: Test, items: Sequence[Mapping], answers: Sequence[Sequence[str]], **about
) -> Path:
    """Write one test's answers as `<test>.jsonl`, and `<test>.json` that says what they answer.

    about: who wrote them (cell, model, seed), kept as it is.
    """
    lines = []
    for row, texts in zip(items, answers, strict=True):
        for text in texts:
            if test.judge == "code":
                line = {"task_id": row["id"], "completion": text}
            elif test.judge == "summary":
                line = {"article_id": row["id"], "article": row["article"]}
                line |= {"generated_summary": text, "reference_summary": row["references"][0]}
                if len(row["references"]) > 1:
                    line["other_references"] = row["references"][1:]
            else:
                line = {"problem_id": row["id"], "problem": row["prompt"]}
                line |= {"completion": text, "answer": row["completion"]}
            lines.append(json.dumps(line, ensure_ascii=False))
    path = store.write_text(Path(folder) / f"{test.name}.jsonl", "\n".join(lines) + "\n")
    facts = {"test": test.name, "version": test.version, "items": len(items)}
    facts |= {"completions": len(answers[0]), "fingerprint": fingerprint_items(test, items)}
    store.write_json(path.with_suffix(".json"), {**facts, "about": about})
    return path


def read_generations(path: Path) -> tuple[Test, list[dict], list[list[str]], dict]:
    """(test, items, answers, facts) of a file that `write_generations` wrote. The items are those
    stored in the file (HumanEval's come from its package): no data set is needed.

    Raises:
        NotAvailableError: no such file, or no facts beside it.
        CorruptFileError: a line that is not of the test's format, or lines missing.
        BadInputError: answers of another version of the test, or to other items.
    """
    path, beside = Path(path), Path(path).with_suffix(".json")
    if not path.exists() or not beside.exists():
        raise NotAvailableError(f"{path} and {beside.name} beside it are both needed to score it.")
    facts = store.read_json(beside)
    missing = {"test", "version", "items", "completions", "fingerprint"} - set(facts)
    if missing:
        raise CorruptFileError(f"{beside} lacks {', '.join(sorted(missing))}.")
    test = known_test(facts["test"])
    if facts["version"] != test.version:
        raise BadInputError(
            f"{path} answers version {facts['version']} of {test.name}, and this kit has version "
            f"{test.version}: the scores would not compare. Generate again, or score it with the "
            "version of the kit that wrote it."
        )
    lines = read_jsonl(path)
    for number, line in enumerate(lines, 1):
        if lacking := [k for k in FORMATS[test.judge] if k not in line]:
            raise CorruptFileError(f"{path} line {number} lacks {', '.join(lacking)}.")
    n, each = facts["items"], facts["completions"]
    if len(lines) != n * each or not n:
        raise CorruptFileError(f"{path} has {len(lines)} lines, not {n} items × {each} answers.")
    text = "generated_summary" if test.judge == "summary" else "completion"
    groups = [lines[i * each : (i + 1) * each] for i in range(n)]
    name = FORMATS[test.judge][0]
    for number, group in enumerate(groups):
        if len({line[name] for line in group}) != 1:
            raise CorruptFileError(f"{path}: the answers to item {number} are not together.")
    items = _stored_items(test, [group[0] for group in groups])
    found = fingerprint_items(test, items)
    here = _at_hand(test, n)
    known = facts["fingerprint"] if here in (None, found) else here
    if found != known:
        raise BadInputError(
            f"{path} answers other items than {test.name} has here (fingerprint {found}, not "
            f"{known}): its scores would not compare."
        )
    return test, items, [[line[text] for line in group] for group in groups], facts


def _stored_items(test: Test, firsts: Sequence[Mapping]) -> list[dict]:
    if test.judge == "code":
        from lora_kit.evaluate.humaneval import load_problems

        problems = {p.task_id: p for p in load_problems()}
        unknown = next((f["task_id"] for f in firsts if f["task_id"] not in problems), None)
        if unknown:
            raise BadInputError(f"HumanEval has no problem {unknown!r}.")
        return [{"id": f["task_id"], "problem": problems[f["task_id"]]} for f in firsts]
    if test.judge == "summary":
        return [
            {
                "id": f["article_id"],
                "article": f["article"],
                "references": [f["reference_summary"], *f.get("other_references", [])],
            }
            for f in firsts
        ]
    return [
        {"id": f["problem_id"], "prompt": f["problem"], "completion": f["answer"]} for f in firsts
    ]


def _at_hand(test: Test, n: int) -> str | None:
    """The fingerprint of the test's first n items here; None where its set is not at hand."""
    if missing_data(test.needs):
        return None
    return fingerprint_items(test, test.items()[:n])


def score_generations(path: Path) -> Judged:
    """Judge a stored file again, without a model; raises what `read_generations` does."""
    test, items, answers, _ = read_generations(path)
    return judge(test, items, answers)


def add_to_record(path: Path, judged: Judged, version: str):
    """Put a test's score into the record of the cell that wrote the answers, in place of the note
    that it could not be judged; returns the record.

    Raises:
        CorruptFileError: no record there.
    """
    from lora_kit.studies.records import Metric, read_record, write_record

    record = read_record(path)
    table = [r for r in record.tables.get("items", []) if r["test"] != judged.test]
    for metric, mean in judged.means.items():
        record.metrics[f"{judged.test} {metric}"] = Metric(**mean.to_metric())
        table.append(item_row(judged, metric, version))
    record.tables["items"] = table
    unjudged = dict(record.parameters.get("unjudged", {}))
    unjudged.pop(judged.test, None)
    record.parameters["unjudged"] = unjudged
    if not unjudged:
        del record.parameters["unjudged"]
    write_record(record, path)
    return record


def item_row(judged: Judged, metric: str, version: str) -> dict:
    """One metric's line of a record's table `items`."""
    return {
        "test": judged.test,
        "version": version,
        "metric": metric,
        "n": judged.means[metric].n,
        "items": judged.fingerprint,
        "scores": pack(judged.values[metric]),
    }


# ------------------------------------------------------------------ scores as short texts


def pack(values: Sequence[float]) -> str:
    """Scores of items as a short text: one character each where all are 0 or 1, else thousandths
    behind a ‰."""
    if all(v in (0, 1) for v in values):
        return "".join(str(int(v)) for v in values)
    return "‰" + " ".join(str(round(1000 * v)) for v in values)


def unpack(text: str) -> list[float]:
    """The scores that `pack` wrote.

    Raises:
        BadInputError: another text.
    """
    if text and not set(text) - {"0", "1"}:
        return [float(c) for c in text]
    try:
        if not text.startswith("‰"):
            raise ValueError(f"{text[:20]!r}")
        return [int(part) / 1000 for part in text[1:].split()]
    except ValueError as e:
        raise BadInputError(f"These are no packed scores: {e}.") from e
