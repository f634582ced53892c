"""Packaged tasks over a local folder: which of lm-eval's definitions its rows serve.

The folder LORA_KIT_DATA names holds `hellaswag/validation.jsonl.gz`, `gsm8k/train.jsonl.gz` and
`test.jsonl.gz`, and `mmlu/test.jsonl.gz` and `dev.jsonl.gz` with all subjects in one file. Its rows
are held to the published ones: a benchmark's score is a score on its rows, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.data import Dataset, is_local, load_rows, local_file
from lora_kit.errors import CorruptFileError, NotAvailableError

LOCAL_NAMES = ("hellaswag", "gsm8k", "mmlu", "mmlu_<subject or area>")
MMLU_AREAS = ("stem", "other", "social_sciences", "humanities")
# Rows, and the first 16 hex digits of the SHA-256 of what `_asked` reads of each row.
PUBLISHED = {
    ("hellaswag", "validation"): (10_042, "a28454494dcc27ca"),
    ("gsm8k", "train"): (7_473, "4b1ff5a894f1206a"),
    ("gsm8k", "test"): (1_319, "0e8cf8f0a4f3ab32"),
    ("mmlu", "dev"): (285, "7cd2a2431eda20ee"),
    ("mmlu", "test"): (14_042, "05b553214c05f2fb"),
}


@dataclass(frozen=True)
class LocalTask:
    """A packaged task whose rows a local folder can hold.

    `definition` is relative to lm-eval's task folder; `data` names the set; `splits` are those it
    reads, ours and the definition's names being the same; shots come from `shots` (None: the
    folder has none). `subject`: the rows with this value in their field `subject`.
    """

    name: str
    definition: str
    data: str
    splits: tuple[str, ...]
    scored: str
    shots: str | None
    subject: str | None = None


def local_task(name: str) -> LocalTask | None:
    """The task of this name that a local folder can serve, or None."""
    if name == "hellaswag":
        return LocalTask(
            name, "hellaswag/hellaswag.yaml", name, ("validation",), "validation", None
        )
    if name == "gsm8k":
        return LocalTask(name, "gsm8k/gsm8k.yaml", name, ("train", "test"), "test", "train")
    if name.removeprefix("mmlu_") in _subjects() and name.startswith("mmlu_"):
        file = f"mmlu/default/{name}.yaml"
        subject = name.removeprefix("mmlu_")
        return LocalTask(name, file, "mmlu", ("dev", "test"), "test", "dev", subject)
    return None


def members(name: str) -> list[str]:
    """The tasks a name stands for: MMLU's subjects for "mmlu" or an area, else itself."""
    area = name.removeprefix("mmlu_")
    if name == "mmlu" or (name.startswith("mmlu_") and area in MMLU_AREAS):
        chosen = [s for s, a in _subjects().items() if name == "mmlu" or a == area]
        return [f"mmlu_{subject}" for subject in chosen]
    return [name]


def known_tasks() -> list[str]:
    """Every name `local_task` and `members` know."""
    areas = [f"mmlu_{area}" for area in MMLU_AREAS]
    return ["hellaswag", "gsm8k", "mmlu", *areas, *members("mmlu")]


def has_local_rows(name: str) -> bool:
    """Whether LORA_KIT_DATA holds every split this task reads, so that no network is needed."""
    found = [local_task(member) for member in members(name)]
    return all(
        spec is not None and all(is_local(spec.data, split) for split in spec.splits)
        for spec in found
    )


def check_folder(name: str, shots: int) -> bool:
    """Whether to read a task from the local folder: it has what is needed of it.

    Raises:
        NotAvailableError: it has some of the task's files, and lacks one that is needed.
    """
    spec = local_task(name)
    if spec is None or not any(is_local(spec.data, split) for split in spec.splits):
        return False
    for split in [spec.scored] + ([spec.shots] if shots and spec.shots else []):
        if not is_local(spec.data, split):
            what = "questions" if split == spec.scored else f"{shots} worked example(s)"
            raise NotAvailableError(
                f"The folder LORA_KIT_DATA names lacks {spec.data}/{split}.jsonl.gz, which holds "
                f"the {what} of {name}; put it there, or unset LORA_KIT_DATA to use the hub."
            )
    return True


def local_rows(spec: LocalTask, split: str) -> Dataset:
    """The task's rows of one split.

    Raises:
        CorruptFileError: the file holds other rows than the published ones.
    """
    file = local_file(spec.data, split)
    whole = _split(spec.data, split, file, file.stat().st_mtime_ns)
    if spec.subject is None:
        return whole
    rows = tuple(row for row in whole if row["subject"] == spec.subject)
    return replace(whole, name=spec.name, rows=rows)


def packaged_definition(name: str) -> dict[str, Any]:
    """lm-eval's own definition of a local task, its functions resolved."""
    from lm_eval.tasks._yaml_loader import load_yaml

    spec = local_task(name)
    config = load_yaml(_folder() / spec.definition)
    config.pop("tag", None)  # groups tasks in lm-eval's index; a task does not take it
    return config


@lru_cache(maxsize=4)
def _split(data: str, split: str, file: Path, changed: int) -> Dataset:
    """Read a file once for all the subjects it holds; a changed file is read anew."""
    found = load_rows(data, split)
    if (data, split) in PUBLISHED:
        rows, fingerprint = PUBLISHED[data, split]
        got = store.sha256_json([_asked(data, row) for row in found])[:16]
        if (len(found), got) != (rows, fingerprint):
            raise CorruptFileError(
                f"{data}/{file.name} does not hold the published rows: {len(found):,} with "
                f"fingerprint {got} instead of {rows:,} with {fingerprint}. Replace it, or unset "
                "LORA_KIT_DATA to use the hub; pass your own rows as a Dataset."
            )
    return found


def _asked(data: str, row) -> list:
    """What of a row reaches prompt or score."""
    if data == "hellaswag":  # where a text is cut into ctx_a and ctx_b differs between copies
        context = f"{row['ctx_a']} {row['ctx_b']}".strip()
        return [row["activity_label"], context, row["endings"], row["label"]]
    if data == "gsm8k":
        return [row["question"], row["answer"]]
    return [row["subject"], row["question"], row["choices"], row["answer"]]


@lru_cache(maxsize=1)
def _subjects() -> dict[str, str]:
    """MMLU's subjects with their areas, as lm-eval's packaged files have them."""
    found = {}
    for file in sorted((_folder() / "mmlu" / "default").glob("mmlu_*.yaml")):
        tag = next(x for x in file.read_text().splitlines() if "tag" in x)
        area = tag.split(":")[1].strip(" \"'").removeprefix("mmlu_").removesuffix("_tasks")
        found[file.stem.removeprefix("mmlu_")] = area
    return found


def _folder() -> Path:
    """lm-eval's folder of task definitions, found without importing it."""
    return Path(find_spec("lm_eval").origin).parent / "tasks"
