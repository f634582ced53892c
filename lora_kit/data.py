"""Data: named sets from the hub or a local folder, checked row by row; and seeded generators.

A local folder named by LORA_KIT_DATA, laid out as `<set>/<split>.jsonl.gz`, takes precedence over
the hub: the same rows, without a network.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, unknown_name


@dataclass(frozen=True)
class DatasetSpec:
    """One registry entry. `splits` maps our split name to the hub's; `fields` is what each row
    must have; hub_id None marks a set that is only read from a local folder."""

    name: str
    hub_id: str | None
    config: str | None
    licence: str
    splits: Mapping[str, str]
    fields: tuple[str, ...]
    hub_fields: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""
    commit: str | None = None  # the hub's commit that is taken; None: the newest


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            "alpaca",
            "tatsu-lab/alpaca",
            None,
            "CC BY-NC 4.0",
            {"train": "train"},
            ("instruction", "input", "output"),
            notes="52,002 rows on the hub; a local folder may hold a part (train_5000).",
        ),
        DatasetSpec(
            "code_alpaca",
            "sahil2801/CodeAlpaca-20k",
            None,
            "CC BY-NC 4.0",
            {"train": "train"},
            ("instruction", "input", "output"),
        ),
        DatasetSpec(
            "gsm8k",
            "openai/gsm8k",
            "main",
            "MIT",
            {"train": "train", "test": "test"},
            ("question", "answer"),
        ),
        DatasetSpec(
            "hellaswag",
            "Rowan/hellaswag",
            None,
            "MIT",
            {"validation": "validation"},
            ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
        ),
        DatasetSpec(
            "mmlu",
            "cais/mmlu",
            "all",
            "MIT",
            {"test": "test", "dev": "dev"},
            ("subject", "question", "choices", "answer"),
        ),
        DatasetSpec(
            "dialogsum",
            "knkarthick/dialogsum",
            None,
            "CC BY-NC-SA 4.0",
            {"dev": "validation", "test": "test"},
            ("fname", "dialogue"),
            hub_fields={"id": "fname"},
            notes="dev has summary; the original test has three, summary1 to summary3.",
        ),
        DatasetSpec(
            "math",
            "DigitalLearningGmbH/MATH-lighteval",
            "default",
            "MIT",
            {"train": "train", "test": "test"},
            ("problem", "level", "type", "solution"),
            notes="12,500 competition problems in seven subjects (Hendrycks et al. 2021); the "
            "authors' own hendrycks/competition_math was taken off the hub in January 2025.",
        ),
        DatasetSpec(
            "dolly",
            "databricks/databricks-dolly-15k",
            None,
            "CC BY-SA 3.0",
            {"train": "train"},
            ("instruction", "context", "response", "category"),
        ),
        DatasetSpec(
            "cnn_dailymail",
            "abisee/cnn_dailymail",
            "3.0.0",
            "Apache-2.0",
            {"train": "train", "validation": "validation", "test": "test"},
            ("article", "highlights", "id"),
        ),
        DatasetSpec(
            "amazon_google",
            None,
            None,
            "see the set's own page",
            {"train": "train", "validation": "validation", "test": "test"},
            ("left", "right", "label"),
            notes="Local only: product pairs, each side title, manufacturer and price.",
        ),
        DatasetSpec(
            "ecinstruct",
            "NingLab/ECInstruct",
            None,
            "CC BY 4.0",
            {"train": "train"},
            ("task", "split", "setting", "instruction", "input", "options", "output"),
            notes="Ten tasks in one file; `evaluate.shop_tasks` reads and scores them.",
            commit="17c6218a1dec035c672729246e7eee1cac0adc9e",
        ),
    )
}


@dataclass(frozen=True)
class Dataset:
    """Rows with their origin. source is "folder", "hub" or "generated"; fingerprint the SHA-256 of
    the rows as JSON, so that two runs on the same rows can be told from two on others."""

    name: str
    split_name: str
    rows: tuple[dict, ...]
    source: str
    revision: str

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    @property
    def fingerprint(self) -> str:
        return store.sha256_json(list(self.rows))[:16]

    def take(self, n: int) -> Dataset:
        """The first n rows (all of them where there are fewer).

        Raises:
            BadInputError: n < 1.
        """
        if n < 1:
            raise BadInputError(f"n must be at least 1, not {n}.")
        return Dataset(self.name, self.split_name, self.rows[:n], self.source, self.revision)

    def split(self, held_out: int, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts in seeded random order: the rest, and `held_out` rows.

        Rows that stand in the set more than once go to one side together.

        Raises:
            BadInputError: held_out < 1, or it leaves nothing.
        """
        groups: dict[str, list[dict]] = {}
        for row in self.rows:
            groups.setdefault(json.dumps(row, sort_keys=True), []).append(row)
        keys = list(groups)
        random.Random(seed).shuffle(keys)
        test: list[dict] = []
        train: list[dict] = []
        for key in keys:
            side = test if len(test) + len(groups[key]) <= held_out else train
            side.extend(groups[key])
        if held_out < 1 or not train or not test:
            raise BadInputError(
                f"{held_out} held-out rows of {len(self)} leave nothing to train on or to test on."
            )
        return (
            Dataset(self.name, f"{self.split_name}-rest", tuple(train), self.source, self.revision),
            Dataset(self.name, f"{self.split_name}-held", tuple(test), self.source, self.revision),
        )

    def record(self) -> dict:
        """The `data` part of a result record."""
        return {
            "name": self.name,
            "split": self.split_name,
            "rows": len(self),
            "source": self.source,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
        }


def load_rows(name: str, split: str, limit: int | None = None) -> Dataset:
    """Rows of a named set, from LORA_KIT_DATA where it has them, else from the hub.

    Args:
        name: a registry name.
        split: one of the set's splits.
        limit: keep the first so many rows.

    Raises:
        UnknownNameError: the set or split; nearest names are offered.
        NotAvailableError: neither in the local folder nor within reach on the hub.
        CorruptFileError: a row without the expected fields, or a file that cannot be read.
        BadInputError: limit < 1.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    spec = DATASETS[name]
    if split not in spec.splits:
        raise unknown_name(f"split of {name}", split, spec.splits)
    if limit is not None and limit < 1:
        raise BadInputError(f"limit must be at least 1, not {limit}.")
    local = local_file(name, split)
    if local is not None:
        rows, source, revision = read_jsonl(local), "folder", store.sha256_file(local)[:12]
    else:
        rows, revision = _from_hub(spec, split)
        source = "hub"
    check_rows(rows, spec.fields, f"{name}/{split}")
    return Dataset(name, split, tuple(rows[:limit]), source, revision)


def is_local(name: str, split: str) -> bool:
    """Whether LORA_KIT_DATA holds this split, so that no network is needed."""
    return local_file(name, split) is not None


def local_file(name: str, split: str) -> Path | None:
    """The local file of a split: `<set>/<split>.jsonl[.gz]`, or the largest part,
    `<split>_<rows>.jsonl[.gz]`. None where LORA_KIT_DATA is not set or lacks the split.

    Raises:
        NotAvailableError: LORA_KIT_DATA names no folder.
    """
    root = store.local_data()
    if root is None:
        return None
    if not root.is_dir():  # a misspelt folder must not send a run to the hub in silence
        raise NotAvailableError(f"LORA_KIT_DATA names {root}, which is no folder.")
    for whole in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (root / name / whole).is_file():
            return root / name / whole
    parts = {}
    for path in (root / name).glob(f"{split}_*.jsonl*"):
        if found := re.fullmatch(rf"{split}_(\d+)\.jsonl(\.gz)?", path.name):
            parts[int(found[1])] = path
    return parts[max(parts)] if parts else None


def read_jsonl(path: Path) -> list[dict]:
    """Read JSON lines, gzipped or plain.

    Raises:
        CorruptFileError: names the file and the line.
    """
    rows, number = [], 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            for line in f:
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CorruptFileError(f"{path} line {number} is not JSON: {e}.") from e
    except (EOFError, OSError, zlib.error) as e:
        raise CorruptFileError(f"{path} breaks off after line {number}: {e}.") from e
    return rows


def check_rows(rows: Iterable[Mapping], fields: Iterable[str], where: str) -> None:
    """Hold every row to the fields expected of it.

    Raises:
        CorruptFileError: there are no rows, or a row lacks a field; names the first such row.
    """
    fields = tuple(fields)
    count = 0
    for count, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise CorruptFileError(f"{where} row {count} is a {type(row).__name__}, not an object.")
        missing = [f for f in fields if f not in row]
        if missing:
            raise CorruptFileError(
                f"{where} row {count} lacks {', '.join(missing)}; it has {', '.join(sorted(row))}."
            )
    if count == 0:
        raise CorruptFileError(f"{where} has no rows.")


def _from_hub(spec: DatasetSpec, split: str) -> tuple[list[dict], str]:
    unreachable = (
        f"{spec.name}/{split} is neither in the folder LORA_KIT_DATA names "
        f"({store.local_data() or 'not set'})"
    )
    if spec.hub_id is None:
        raise NotAvailableError(f"{unreachable} nor on the hub; put it into that folder.")
    from datasets import load_dataset
    from httpx import HTTPError
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        revision = spec.commit or dataset_info(spec.hub_id, timeout=20).sha
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError):
        revision = None  # offline: the datasets library may hold a copy in its own cache
    try:
        loaded = load_dataset(spec.hub_id, spec.config, split=spec.splits[split], revision=revision)
    except (HTTPError, OSError, ValueError) as e:  # datasets raises both for what it cannot reach
        raise NotAvailableError(
            f"{unreachable} nor can the hub be reached. Connect once, or put it there."
        ) from e
    rows = [{spec.hub_fields.get(k, k): v for k, v in row.items()} for row in loaded]
    return rows, revision or "cached"
