"""ECInstruct's ten tasks (Peng et al. 2024, arXiv:2402.08831): rows, prompts, answers, scores.

A row has task, split, setting, instruction, input, options and output. `setting` says whether the
products are in the domain of the training rows (IND) or out of it (OOD), and whether the
instruction is always the same (Single) or one of several (Diverse). Each task has the metric of
Oswal et al. 2025, table 2. An answer that cannot be read is wrong and counted (`Scored.unread`);
ECInstruct's own script leaves such answers out of the score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_kit.data import Dataset, load_rows
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name
from lora_kit.evaluate import shop_metrics as metrics
from lora_kit.evaluate.statistics import Estimate

FIELDS = ("task", "split", "setting", "instruction", "input", "options", "output")
SPLITS = ("train", "val", "test")
YES_NO = ("yes", "no")
SCORERS = ("roberta-large", "all-minilm-l6-v2")


@dataclass(frozen=True)
class ShopTask:
    """One task. kind: how it is answered (yes/no, option, ranking, attributes, text). labels: what
    an answer may be; for option and ranking the letters. spelt: its name in the rows."""

    key: str
    spelt: str
    group: str
    asks: str
    kind: str
    metric: str
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 4


SHOP_TASKS: dict[str, ShopTask] = {
    task.key: task
    for task in (
        ShopTask("AVE", "Attribute_Value_Extraction", "product understanding",
                 "the values of given attributes, from a product's texts", "attributes", "F1*",
                 max_new_tokens=128),
        ShopTask("PRP", "Product_Relation_Prediction", "product understanding",
                 "bought together, viewed together, or similar?", "option", "macro F1",
                 tuple("ABC")),
        ShopTask("PM", "Product_Matching", "product understanding",
                 "are two listings the same product?", "yes/no", "F1", YES_NO),
        ShopTask("SA", "Sentiment_Analysis", "user understanding",
                 "how content is the writer of a review? (five steps)", "option", "macro F1",
                 tuple("ABCDE")),
        ShopTask("SR", "Sequential_Recommendation", "user understanding",
                 "which of twenty products comes next?", "option", "HR@1",
                 tuple("ABCDEFGHIJKLMNOPQRST")),
        ShopTask("MPC", "Multiclass_Product_Classification", "query matching",
                 "exact, substitute, complement or irrelevant?", "option", "accuracy",
                 tuple("ABCD")),
        ShopTask("PSI", "Product_Substitute_Identification", "query matching",
                 "can the product stand in for what was searched?", "yes/no", "F1", YES_NO),
        ShopTask("QPR", "Query_Product_Ranking", "query matching",
                 "order two to four products by relevance", "ranking", "NDCG", tuple("ABCD"),
                 max_new_tokens=12),
        ShopTask("AP", "Answerability_Prediction", "product questions",
                 "do the reviews answer the question?", "yes/no", "F1", YES_NO),
        ShopTask("AG", "Answer_Generation", "product questions",
                 "answer the question from the reviews", "text", "F_BERT", max_new_tokens=128),
    )
}  # fmt: skip
# Names as ECInstruct's scripts and older copies of its rows spell them.
SPELLINGS = {
    "Product_Relation_Predicition": "PRP",
    "Product_Substitue_Identification": "PSI",
    "Query_Product_Rank": "QPR",
    **{task.spelt: key for key, task in SHOP_TASKS.items()},
}


@dataclass(frozen=True)
class Scored:
    """A task's score over its questions, `unread` of which had an answer that could not be read."""

    metric: str
    score: Estimate
    unread: int
    note: str = ""

    def row(self) -> dict:
        """A line of a table."""
        s = self.score
        reach = f"{s.low:.3f} to {s.high:.3f}"
        return {"metric": self.metric, "score": f"{s.value:.3f}", "95 %": reach} | {
            "n": s.n,
            "unread": self.unread,
        }


def shop_task(name: str) -> ShopTask:
    """A task by its key ("PM") or its name in the rows.

    Raises:
        UnknownNameError: neither.
    """
    key = SPELLINGS.get(name, name)
    if key not in SHOP_TASKS:
        raise unknown_name("shop task", name, [*SHOP_TASKS, *SPELLINGS])
    return SHOP_TASKS[key]


def load_ecinstruct(limit: int | None = None) -> Dataset:
    """All of ECInstruct's rows, checked: from LORA_KIT_DATA, else from the hub at a fixed commit.

    Raises:
        NotAvailableError: neither is within reach; CorruptFileError: a row that is none, named.
    """
    data = load_rows("ecinstruct", "train", limit)
    for number, row in enumerate(data, 1):
        check_row(row, f"ecinstruct row {number}")
    return data


def check_row(row: Mapping, where: str) -> ShopTask:
    """Hold a row to its task.

    Raises:
        CorruptFileError: a missing field, an unknown task or split, no instruction, options or
            attributes that are no JSON, a label outside the task's; `where` names the row.
    """
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise CorruptFileError(f"{where} lacks {', '.join(missing)}; it has {', '.join(row)}.")
    key = SPELLINGS.get(row["task"], row["task"])
    if key not in SHOP_TASKS:
        known = ", ".join(task.spelt for task in SHOP_TASKS.values())
        raise CorruptFileError(f"{where}: unknown task {row['task']!r}. Known: {known}.")
    task = SHOP_TASKS[key]
    if row["split"] not in SPLITS:
        raise CorruptFileError(f"{where}: split {row['split']!r} is none of {', '.join(SPLITS)}.")
    for name in ("instruction", "output"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise CorruptFileError(f"{where}: its {name} is empty.")
    due(task, row, where)
    return task


def options_of(row: Mapping, where: str = "The row") -> list[str]:
    """A row's options, which stand in it as a JSON list (or as a list already).

    Raises:
        CorruptFileError: no JSON list.
    """
    options = row.get("options") or []
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as e:
            raise CorruptFileError(f"{where}: its options are no JSON list ({e}).") from e
    if not isinstance(options, list):
        raise CorruptFileError(f"{where}: its options are no JSON list but {options!r}.")
    return [str(option) for option in options]


def due(task: ShopTask, row: Mapping, where: str = "The row"):
    """The right answer of a row, in the form its answers are read in.

    Raises:
        CorruptFileError: it is none of the task's.
    """
    said = row["output"]
    options_of(row, where)
    if task.kind == "text":
        return said
    if task.kind == "attributes":
        found = metrics.read_attributes(said)
        if found == metrics.UNREAD:
            raise CorruptFileError(
                f"{where}: its output is no JSON list of attributes and values: {said[:60]!r}."
            )
        return dict(found)
    found = read(task, said, row)
    if found == metrics.UNREAD:
        raise CorruptFileError(
            f"{where}: {said[:40]!r} is no label of {task.spelt} ({', '.join(letters(task, row))})."
        )
    return found


def letters(task: ShopTask, row: Mapping) -> tuple[str, ...]:
    """What may be answered: the letters of the row's own options where it has some."""
    count = len(options_of(row)) if task.kind == "option" else 0
    return task.labels[:count] if count else task.labels


def read(task: ShopTask, answer: str, row: Mapping):
    """An answer in the form it is scored in, or UNREAD."""
    if task.kind == "yes/no":
        return metrics.read_yes_no(answer)
    if task.kind == "option":
        return metrics.read_letter(answer, "".join(letters(task, row)))
    if task.kind == "ranking":
        return metrics.read_ranking(answer, "".join(task.labels))
    if task.kind == "attributes":
        return metrics.read_attributes(answer)
    return answer if answer.strip() else metrics.UNREAD


def select(
    data: Sequence[Mapping],
    task: str,
    split: str = "test",
    domain: str = "IND",
    instructions: str = "Diverse",
) -> list[Mapping]:
    """The rows of one task, split and setting.

    Raises:
        UnknownNameError: no such task; BadInputError: no such rows, saying which there are.
    """
    wanted = shop_task(task).key
    mine = [r for r in data if SPELLINGS.get(r["task"], r["task"]) == wanted]
    setting = f"{domain}_{instructions}_Instruction"
    found = [r for r in mine if (r["split"], r["setting"]) == (split, setting)]
    if not found:
        there = sorted({f"{r['split']} {r['setting']}" for r in mine}) or ["none"]
        raise BadInputError(f"{wanted} has no rows {split} {setting}; it has {', '.join(there)}.")
    return found


def as_instruction(row: Mapping) -> dict[str, str]:
    """A row as {instruction, input, output}: the options, if any, stand under the input."""
    options = options_of(row)
    given = str(row["input"])
    if options:
        given += "\n\nOptions:\n" + "\n".join(options)
    return {"instruction": row["instruction"], "input": given, "output": row["output"]}


def score(
    task: str,
    rows: Sequence[Mapping],
    answers: Sequence[str],
    labels: Sequence[Sequence[str]] | None = None,
    scorer: str = "roberta-large",
    seed: int = 0,
) -> Scored:
    """Score answers to a task's rows by the paper's metric.

    Args:
        task: key or name.
        rows, answers: as many of each.
        labels: QPR only: each option's label (E, S, C, I), which the rows themselves do not say.
        scorer: AG only: the encoder of F_BERT; "all-minilm-l6-v2" needs no hub, and its numbers
            cannot be set beside the paper's.

    Raises:
        BadInputError: no rows, other numbers of rows and answers, QPR without labels.
        NotAvailableError: the scorer is neither in the cache nor within reach.
    """
    made = shop_task(task)
    if len(rows) != len(answers) or not rows:
        raise BadInputError(f"{len(answers)} answers for {len(rows)} rows of {made.key}.")
    if made.kind == "text":
        return _f_bert(rows, answers, scorer, seed)
    given = [read(made, answer, row) for answer, row in zip(answers, rows, strict=True)]
    unread = sum(said == metrics.UNREAD for said in given)
    truth = [due(made, row, f"row {i}") for i, row in enumerate(rows, 1)]
    if made.kind == "yes/no":
        found = metrics.f1(truth, given, seed=seed)
    elif made.kind == "attributes":
        found = metrics.f1_star(truth, given, seed)
    elif made.kind == "ranking":
        if labels is None:
            raise BadInputError("NDCG needs each option's label (E, S, C, I): pass labels.")
        orders = [
            [] if order == metrics.UNREAD else [ord(x) - ord("A") for x in order] for order in given
        ]
        found = metrics.mean_ndcg(orders, labels, seed)
    elif made.metric == "macro F1":
        found = metrics.macro_f1(truth, given, made.labels, seed)
    else:  # HR@1 and accuracy: the one letter is right or not
        from lora_kit.evaluate.statistics import estimate

        right = [float(a == b) for a, b in zip(truth, given, strict=True)]
        found = estimate(right, seed=seed)
    return Scored(made.metric, found, unread)


def _f_bert(rows, answers, scorer: str, seed: int) -> Scored:
    """BERTScore's F1 by torchmetrics with roberta-large, layer 17, no rescaling; or the kit's own
    matching with a small encoder."""
    if scorer not in SCORERS:
        raise unknown_name("scorer of F_BERT", scorer, SCORERS)
    texts, truth = [str(a) for a in answers], [row["output"] for row in rows]
    unread = sum(not a.strip() for a in texts)
    if scorer == "all-minilm-l6-v2":
        from lora_kit.evaluate.generation_metrics import matching_similarity

        found = matching_similarity(texts, truth, seed=seed)["f1"].mean
        return Scored("F_BERT", found, unread, "MiniLM's, not the paper's roberta-large")
    from torchmetrics.functional.text import bert_score

    from lora_kit.evaluate.statistics import estimate

    try:
        values = bert_score(texts, truth, model_name_or_path=scorer, num_layers=17)["f1"]
    except (OSError, ValueError) as e:
        raise NotAvailableError(
            f"{scorer} is neither in the cache nor within reach; connect once, or pass "
            "scorer='all-minilm-l6-v2', whose numbers are on another scale."
        ) from e
    values = [0.0 if not a.strip() else float(v) for a, v in zip(texts, values, strict=True)]
    return Scored("F_BERT", estimate(values, seed=seed), unread)
