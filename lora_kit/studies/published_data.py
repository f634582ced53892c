"""What the papers' own data say: sizes of the benchmarks they name, and rankings scored again.

The rankings are the answers that the models of Oswal et al. 2025 gave to ECInstruct's
query-product-ranking questions, which the authors put online; with ECInstruct's labels they allow
the one column of their tables that anybody can compute again, with the errors it was printed
without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lora_kit import store
from lora_kit.data import load_rows, read_jsonl
from lora_kit.errors import CorruptFileError, NotAvailableError
from lora_kit.evaluate.shop_metrics import GAINS, ndcg

STUDY = "published_data"
SUBJECTS = (
    "college_computer_science",
    "high_school_computer_science",
    "machine_learning",
    "professional_psychology",
)


@dataclass(frozen=True)
class Ranking:
    """One model's answers under one kind of instruction, scored. scores: NDCG of each question."""

    model: str
    setting: str
    scores: tuple[float, ...]

    @property
    def key(self) -> str:
        return f"{self.model}_{self.setting}".lower().replace("-", "_").replace(".", "p")


def read_rankings(folder: Path | None = None) -> list[Ranking]:
    """Score every set of published answers.

    Args:
        folder: holds `predictions.jsonl.gz` and `labels.jsonl.gz`; `ecinstruct_qpr` of the folder
            that LORA_KIT_DATA names by default.

    Raises:
        NotAvailableError: the files are not there.
        CorruptFileError: answers and labels differ in number, or a label is unknown.
    """
    if folder is None:
        root = store.local_data()
        if root is None:
            raise NotAvailableError("Set LORA_KIT_DATA to a folder that holds ecinstruct_qpr.")
        folder = root / "ecinstruct_qpr"
    paths = [folder / f"{name}.jsonl.gz" for name in ("predictions", "labels")]
    for path in paths:
        if not path.exists():
            raise NotAvailableError(f"There is no file {path}; LORA_KIT_DATA must name its folder.")
    answers, labels = (read_jsonl(path) for path in paths)
    named = [row["labels"] for row in labels]
    unknown = {label for row in named for label in row} - set(GAINS)
    if unknown:
        raise CorruptFileError(f"{paths[1]} has unknown labels: {', '.join(sorted(unknown))}.")
    found = []
    for row in answers:
        if len(row["predictions"]) != len(named):
            raise CorruptFileError(
                f"{paths[0]}: {row['model']} answered {len(row['predictions'])} questions, "
                f"but {paths[1].name} has {len(named)}."
            )
        scores = tuple(
            ndcg(_options(text), label)
            for text, label in zip(row["predictions"], named, strict=True)
        )
        setting = row["setting"].removeprefix("IND_").removesuffix("_Instruction")
        found.append(Ranking(row["model"], setting.lower(), scores))
    return found


def _options(text: str) -> list[int]:
    """ "B,A" → [1, 0]; anything that is no single letter is left out."""
    names = [part.strip() for part in text.split(",")]
    return [ord(name) - ord("A") for name in names if len(name) == 1]


def count_rows() -> dict[str, int]:
    """Sizes of the benchmarks the papers name, counted in the rows themselves.

    Raises:
        NotAvailableError: a set is neither in the local folder nor within reach.
    """
    from lora_kit.evaluate.humaneval import load_problems

    mmlu = Counter(row["subject"] for row in load_rows("mmlu", "test"))
    scenes = load_rows("hellaswag", "validation")
    alpaca = load_rows("alpaca", "train")
    python = sum("python" in f"{r['instruction']} {r['input']}".lower() for r in alpaca)
    return {
        "gsm8k_train": len(load_rows("gsm8k", "train")),
        "gsm8k_test": len(load_rows("gsm8k", "test")),
        "hellaswag_validation": len(scenes),
        "hellaswag_activities": len({row["activity_label"] for row in scenes}),
        "hellaswag_endings": len({len(row["endings"]) for row in scenes}) == 1
        and len(scenes[0]["endings"]),
        "mmlu_test": sum(mmlu.values()),
        "mmlu_subjects": len(mmlu),
        **{f"mmlu_{subject}": mmlu[subject] for subject in SUBJECTS},
        "humaneval_problems": len(load_problems()),
        "alpaca_rows_at_hand": len(alpaca),
        "alpaca_rows_that_name_python": python,
    }


def measure():
    """The record of all this; a few seconds on one core.

    Raises:
        NotAvailableError: a set is not at hand.
    """
    import time

    from lora_kit.evaluate.statistics import estimate, paired_difference
    from lora_kit.studies.records import new_record

    started = time.perf_counter()
    rankings = read_rankings()
    metrics = {name: float(count) for name, count in count_rows().items()}
    for ranking in rankings:
        metrics[f"ndcg_{ranking.key}"] = estimate(ranking.scores).to_metric()
    by = {(r.model, r.setting): r.scores for r in rankings}
    pairs = {}
    for model in sorted({m for m, _ in by}):
        pairs[f"{model}: diverse - single"] = (by[model, "single"], by[model, "diverse"])
    large, small = by["LLama_1B", "diverse"], by["smolLM2-1.7B", "diverse"]
    pairs["LLama_1B - smolLM2-1.7B, diverse"] = (small, large)
    pairs["LLama_3B - LLama_1B, diverse"] = (large, by["LLama_3B", "diverse"])
    differences = [
        {"pair": name, **paired_difference(a, b).to_metric()} for name, (a, b) in pairs.items()
    ]
    return new_record(
        STUDY,
        "python benchmarks/published_data.py",
        parameters={"gains": GAINS, "gain": "2^g - 1", "discount": "log2(place + 1)"},
        metrics=metrics,
        tables={"differences": differences},
        seconds=time.perf_counter() - started,
    )
