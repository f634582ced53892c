"""One run of the shop study: a task, a method, a seed, scored inside and outside its manufacturers.

The seed draws the division of the pairs (which manufacturers are kept out of training), the
questions, and what training draws. So seeds differ in the shop they are given as well as in luck,
and an interval over seeds holds both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit import shop_products
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.evaluate import shop_metrics as metrics
from lora_kit.shop_products import PARTS, Shop, divide, load_pairs, questions
from lora_kit.studies.records import Record

STUDY = "08_small_shops"
METHODS = ("majority", "fuzzy", "tfidf", "embedding", "zero-shot", "one-shot", "tuned")
LEARNT = ("zero-shot", "one-shot", "tuned")  # by a language model
ASKED = ("inside", "outside")
LETTERS = "ABCD"
# Watts assumed while a method works, to turn seconds into energy: one busy core of a server's CPU
# with its memory (times CPU seconds); the boards' own limits for GPUs (times seconds passed). Not
# measured.
WATTS = {"cpu": 10.0, "t4": 70.0, "gpu": 350.0}

DEFAULTS: dict[str, Any] = {
    "task": "match",  # one of shop_products.TASKS, or "all"
    "method": "tfidf",  # one of METHODS
    "data": "amazon_google",  # amazon_google, generated, or a file of pairs
    "train_rows": 0,  # questions to learn from, 0 for all
    "validation_rows": 0,  # questions to choose a threshold by, 0 for all
    "test_rows": 0,  # of each part, 0 for all
    "model": "smollm2-135m-instruct",
    "recipe": "shop",  # "shop" (short runs, below) or "oswal" (the paper's settings)
    "steps": 60,  # 0: one epoch
    "batch_size": 16,
    "learning_rate": 1e-3,
    "quantization": "none",  # "nf4" on a GPU
    "timed_rows": 100,  # how many questions the latency is taken from, 0 for none
}


def check_setting(setting: Mapping[str, Any]) -> None:
    """Hold a setting to what can run.

    Raises:
        UnknownNameError: an unknown task, method or recipe; BadInputError: a number below 0, or a
            method that a task has not.
    """
    tasks = (*shop_products.TASKS, "all")
    for name, known in (("task", tasks), ("method", METHODS), ("recipe", ("shop", "oswal"))):
        if setting[name] not in known:
            raise unknown_name(f"shop {name}", setting[name], known)
    for name in ("train_rows", "validation_rows", "test_rows", "steps", "timed_rows"):
        if setting[name] < 0:
            raise BadInputError(f"{name} must be 0 or more, not {setting[name]}.")
    if setting["task"] == "extract" and setting["method"] in ("fuzzy", "embedding"):
        raise BadInputError(
            f"The method {setting['method']} compares listings and extracts nothing; the task "
            "extract takes majority, tfidf (its rules), zero-shot, one-shot or tuned."
        )


def run_cell(parameters: dict, seed: int, folder: Path, say=print) -> Record:
    """Run one setting with one seed.

    Args:
        parameters: some of DEFAULTS' names.
        seed: see the module's text.
        folder: not used: a run is too short to be taken up.

    Returns:
        A record: for each task and part the score with its interval, unread answers, the score at
        the cut of 0 for models; seconds per 1,000 items, energy, training; the answers as bits.

    Raises:
        what `check_setting` and `load_pairs` raise; UnknownNameError: a parameter not in DEFAULTS.
    """
    from lora_kit.hardware import PeakMemory, detect
    from lora_kit.studies.records import new_record

    for name in parameters:
        if name not in DEFAULTS:
            raise unknown_name("parameter of the shop study", name, DEFAULTS)
    p = {**DEFAULTS, **parameters}
    check_setting(p)
    started = time.perf_counter()
    shop = divide(load_pairs(p["data"]), seed)
    tasks = _tasks(p)
    asked = {task: task_questions(shop, task, p, seed) for task in tasks}
    with PeakMemory() as memory:
        method = make_method(p, asked, shop, seed, say)
        found, items = {}, []
        for task in tasks:
            scores, bits = score_task(task, method, asked[task], seed)
            found |= scores
            items += bits
            for part in ASKED:
                key = f"{task}_{part}"
                say(f"{p['method']:<10}{key:<22}{found[key]['value']:.3f}")
        found |= timing(method, tasks[0], asked[tasks[0]], p)
    found |= method.facts
    facts = {
        "rows": {t: {part: len(rows) for part, rows in asked[t].items()} for t in tasks},
        "held_out": list(shop.held_out),
        "dropped": dict(shop.dropped),
        "chosen": method.chosen,
        "watts_assumed": watts(detect()),
    }
    return new_record(
        STUDY,
        f"lora-kit sweep shop --grid benchmarks/grids/shop.yaml --seeds {seed}",
        parameters={**p, **facts},
        metrics=found,
        tables={"items": items},
        seed=seed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=max(memory.peak, method.peak_memory),
        model=method.model,
        data={"name": p["data"], "rows": sum(len(shop.part(x)) for x in PARTS)},
    )


def _tasks(p: Mapping) -> list[str]:
    if p["task"] != "all":
        return [p["task"]]
    without = ("extract",) if p["method"] in ("fuzzy", "embedding") else ()
    return [t for t in shop_products.TASKS if t not in without]


def task_questions(shop: Shop, task: str, p: Mapping, seed: int) -> dict[str, list[dict]]:
    """A task's questions by part, cut to the numbers asked for."""
    most = {"train": p["train_rows"], "validation": p["validation_rows"]}
    return {
        part: questions(task, shop.part(part), seed, most.get(part, p["test_rows"]))
        for part in PARTS
    }


# ------------------------------------------------------------------ methods


class Method:
    """A way to answer: `pair_scores` for match and rank, `extract` for extraction.

    facts: metrics of its making. chosen: what validation decided. peak_memory: of training.
    """

    model: dict | None = None

    def __init__(self):
        self.facts: dict[str, float] = {}
        self.chosen: dict[str, str] = {}
        self.peak_memory = 0

    def scores(self, task: str, rows: Sequence[dict]) -> np.ndarray:
        """match: (rows,) how sure of yes; rank: (rows, candidates)."""
        raise NotImplementedError

    def extract(self, rows: Sequence[dict]) -> list:
        """extract: {attribute: value} of each row, or UNREAD."""
        raise NotImplementedError


class Majority(Method):
    """The training part's most frequent answer, whatever the question; ties by the first."""

    def scores(self, task, rows):
        # The same score for all: yes for all or for none, and the candidates as they were given.
        return (
            np.tile(-np.arange(len(LETTERS)), (len(rows), 1))
            if task == "rank"
            else np.zeros(len(rows))
        )

    def extract(self, rows):
        return [{} for _ in rows]


class Classical(Method):
    """A baseline of `shop_baselines`, with its rules for extraction."""

    def __init__(self, name: str, asked: Mapping, shop: Shop):
        super().__init__()
        from lora_kit.studies.shop_baselines import BASELINES, rules

        started, worked = time.perf_counter(), time.process_time()
        self.scorers, held = {}, []
        for task, parts in asked.items():
            if task == "extract":
                self.rule = rules(shop.train)
                continue
            sides = [_pairs(parts[part]) for part in ("train", "validation")]
            self.scorers[task] = BASELINES[name](*sides)
            held.append(self.scorers[task].bytes)
            if self.scorers[task].chosen:
                self.chosen[task] = self.scorers[task].chosen
        self.facts["training_seconds"] = time.perf_counter() - started
        self.facts["training_cpu_seconds"] = time.process_time() - worked
        self.facts["method_bytes"] = float(sum(held))

    def scores(self, task, rows):
        flat = self.scorers[task].score(_pairs(rows))
        return flat.reshape(len(rows), -1) if task == "rank" else flat

    def extract(self, rows):
        return [self.rule(row["listing"]) for row in rows]


class Model(Method):
    """A language model, as it is (zero-shot, one-shot) or tuned on the tasks' training rows."""

    def __init__(self, p: Mapping, asked: Mapping, seed: int, say):
        super().__init__()
        import torch

        from lora_kit.fingerprint import fingerprint_model
        from lora_kit.models import fetch_model, load_model
        from lora_kit.studies import shop_model

        self.batch = 128 if torch.cuda.is_available() else 16
        self.example = {}
        if p["method"] == "tuned":
            rows = [q for parts in asked.values() for q in parts["train"]]
            self.rows = shop_model.training_rows(rows, seed)
            spec = training_spec(p, seed)
            self.net, self.tokenizer, self.facts, self.peak_memory = shop_model.tune(
                p["model"], self.rows, spec, say
            )
            self.facts["training_rows"] = float(len(rows))
        else:
            loaded = load_model(p["model"], quantization=p["quantization"])
            self.net, self.tokenizer = loaded.model, loaded.tokenizer
        if p["method"] == "one-shot":
            self.example = {task: parts["train"][0] for task, parts in asked.items()}
        files = fetch_model(p["model"])
        self.model = {"name": files.name, "source": files.source, "revision": files.revision}
        self.model["fingerprint"] = fingerprint_model(self.net).digest
        size = sum(t.numel() * t.element_size() for t in self.net.parameters())
        self.facts["method_bytes"] = float(size)

    def prompts(self, task, rows):
        from lora_kit.studies.shop_model import with_example

        if task in self.example:
            return [with_example(row, self.example[task]) for row in rows]
        return [row["prompt"] for row in rows]

    def scores(self, task, rows):
        from lora_kit.studies.shop_model import word_scores

        choices = [f" {x}" for x in LETTERS] if task == "rank" else [" yes", " no"]
        found = word_scores(self.net, self.tokenizer, self.prompts(task, rows), choices, self.batch)
        return found if task == "rank" else found[:, 0] - found[:, 1]

    def extract(self, rows):
        from lora_kit.studies.shop_model import answer_texts

        said = answer_texts(self.net, self.tokenizer, self.prompts("extract", rows), self.batch)
        self.chosen["answers"] = " | ".join(said[:3])
        return [metrics.read_attributes(text) for text in said]


def make_method(p: Mapping, asked: Mapping, shop: Shop, seed: int, say) -> Method:
    """The method a setting names, made from the training and validation parts alone."""
    if p["method"] == "majority":
        return Majority()
    if p["method"] in LEARNT:
        return Model(p, asked, seed, say)
    return Classical(p["method"], asked, shop)


def training_spec(p: Mapping, seed: int):
    """The hyperparameters of a setting: the paper's, or the short ones of `DEFAULTS`."""
    from dataclasses import replace

    from lora_kit.train.recipes import recipe
    from lora_kit.train.spec import TrainSpec

    if p["recipe"] == "oswal":
        spec = recipe("oswal", seed=seed, style="bare", checkpointing=False)
        return replace(spec, steps=p["steps"], quantization=p["quantization"])
    return TrainSpec(
        rank=16,
        alpha=32,
        learning_rate=p["learning_rate"],
        steps=p["steps"],
        batch_size=p["batch_size"],
        max_length=320,
        quantization=p["quantization"],
        checkpointing=False,
        seed=seed,
    )


def _pairs(rows: Sequence[dict]) -> list[dict]:
    return [pair for row in rows for pair in (row["pairs"] if "pairs" in row else [row["pair"]])]


# ------------------------------------------------------------------ scores


def score_task(task: str, method: Method, parts: Mapping, seed: int) -> tuple[dict, list[dict]]:
    """(metrics, items) of one task: both asked parts, the cut chosen on validation."""
    found: dict[str, Any] = {}
    items = []
    cut = None
    if task.startswith("match"):
        cut = _cut(method.scores(task, parts["validation"]), parts["validation"])
        found[f"{task}_cut"] = cut
    for part in ASKED:
        rows, key = parts[part], f"{task}_{part}"
        if task == "extract":
            truth, said = [row["truth"] for row in rows], method.extract(rows)
            counts = metrics.attribute_counts(truth, said)
            found[key] = metrics.from_counts(counts, metrics.f1_star_of, seed).to_metric()
            found[f"{key}_unread"] = float(sum(s == metrics.UNREAD for s in said))
            sums = dict(zip(metrics.OUTCOMES, counts.sum(0), strict=True))
            found |= {f"{key}_{name}": float(n) for name, n in sums.items()}
            items.append({"task": task, "part": part, "counts": counts.astype(int).tolist()})
        elif task == "rank":
            orders = np.argsort(-method.scores(task, rows), axis=1, kind="stable").tolist()
            truth = [row["truth"] for row in rows]
            found[key] = metrics.hit_rate(orders, truth, seed).to_metric()
            labels = [["E" if i == t else "I" for i in range(len(LETTERS))] for t in truth]
            found[f"{key}_ndcg"] = metrics.mean_ndcg(orders, labels, seed).to_metric()
            hits = [int(o[0] == t) for o, t in zip(orders, truth, strict=True)]
            items.append({"task": task, "part": part, "hits": _bits(hits)})
        else:
            scores, truth = method.scores(task, rows), [row["truth"] for row in rows]
            found[key] = _f1(truth, scores >= cut, seed)
            if method.model:
                found[f"{key}_uncut"] = _f1(truth, scores > 0, seed)
            both = {"truth": _bits(truth), "said": _bits(scores >= cut)}
            items.append({"task": task, "part": part, **both})
    return found, items


def _cut(scores: np.ndarray, rows: Sequence[dict]) -> float:
    from lora_kit.studies.shop_baselines import best_threshold

    return best_threshold(scores, [row["truth"] for row in rows])


def _f1(truth, said, seed) -> dict:
    names = np.array(["no", "yes"])
    given = names[np.asarray(said).astype(int)].tolist()
    return metrics.f1(names[np.asarray(truth)].tolist(), given, seed=seed).to_metric()


def _bits(values) -> str:
    return "".join(str(int(v)) for v in values)


def timing(method: Method, task: str, parts: Mapping, p: Mapping) -> dict[str, float]:
    """Seconds for 1,000 questions, passed and of CPU time (best of three each: other work may run,
    and CPU time hardly feels it), and the energy they take at the watts assumed."""
    from lora_kit.hardware import detect

    rows = parts["inside"][: p["timed_rows"]]
    if not rows:
        return {}
    passed, worked = [], []
    for _ in range(1 if task == "extract" and method.model else 3):
        wall, cpu = time.perf_counter(), time.process_time()
        method.extract(rows) if task == "extract" else method.scores(task, rows)
        passed.append(time.perf_counter() - wall)
        worked.append(time.process_time() - cpu)
    seconds, busy = (1000 * min(times) / len(rows) for times in (passed, worked))
    hardware = detect()
    drawn = (seconds if hardware.device == "cuda" else busy) * watts(hardware) / 3600
    return {
        "seconds_per_1000": seconds,
        "cpu_seconds_per_1000": busy,
        "watt_hours_per_1000": drawn,
    }


def watts(hardware) -> float:
    """What is assumed to be drawn while a method works: a core of a CPU, or a GPU."""
    if hardware.device != "cuda":
        return WATTS["cpu"]
    return WATTS["t4" if "T4" in hardware.name else "gpu"]
