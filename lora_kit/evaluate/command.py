"""What `lora-kit eval` and `lora-kit compare` do."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.data import Dataset
from lora_kit.errors import BadInputError, NotAvailableError
from lora_kit.evaluate.results import Comparison, EvalResult, compare

PERPLEXITY = "perplexity"
QUIET_SECONDS = 5.0  # a run that is over sooner has no need of progress
METRIC_WIDTH = 29


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate, and how. model: a registry name or a folder; adapter: a folder; tasks: as
    for `evaluate`; text: a file for the task "perplexity"; out: the result's file, by default one
    of its own in `runs/eval`; against: a result to compare with."""

    model: str
    tasks: tuple[str, ...]
    adapter: Path | None = None
    text: Path | None = None
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    chat_template: bool = False
    batch: int = 8
    dtype: str = "auto"
    quantisation: str = "none"
    slow: bool = False
    unsafe_code: bool = False
    out: Path | None = None
    against: Path | None = None


def run_eval(spec: EvalSpec) -> Path:
    """Evaluate, print the table, write the result; the same call carries on after a crash.

    Returns:
        The result's file.

    Raises:
        BadInputError, UnknownNameError, NotAvailableError: before the model is loaded where the
            tasks or files are to blame.
    """
    base = read_result(spec.against) if spec.against else None
    tasks = _tasks(spec)
    _check_out(spec.out)
    if spec.adapter is not None and not spec.adapter.is_dir():
        raise NotAvailableError(f"There is no adapter folder {str(spec.adapter)!r}.")
    _check_tasks(tasks, spec)
    from lora_kit.evaluate.harness import evaluate
    from lora_kit.hardware import PeakMemory, hold_to_t4_rules
    from lora_kit.models import load_model

    hold_to_t4_rules()
    loaded = load_model(spec.model, spec.dtype, spec.quantisation)
    name, adapter = loaded.name, None
    if spec.adapter is not None:
        from lora_kit.lora_files import load_lora

        load_lora(loaded.model, spec.adapter)
        adapter = _adapter_record(spec.adapter)
        name = f"{loaded.name} + {spec.adapter.resolve().name}"
    about = _about(spec, loaded.record(), adapter)
    kept = _kept_answers(spec, about)
    with store.lock(kept):
        if kept.exists():
            print(f"taken up again: answers of an earlier run are in {kept}", flush=True)
        with PeakMemory() as memory:
            result = evaluate(
                loaded.model,
                loaded.tokenizer,
                tasks,
                limit=spec.limit,
                num_fewshot=spec.shots,
                batch_size=spec.batch,
                seed=spec.seed,
                chat_template=spec.chat_template,
                name=name,
                fast=not spec.slow,
                unsafe_code=spec.unsafe_code,
                keep_answers=kept,
                on_progress=_progress(),
            )
        result = replace(result, about={**about, "peak_memory_bytes": memory.peak})
        out = result.save(spec.out or _own_file(name, result))
        kept.unlink(missing_ok=True)
    print(format_result(result))
    print(f"{result.seconds:.0f} s with the {result.model_kind} model; {out}")
    if base is not None:
        print()
        print(format_comparison(base, result, compare(base, result)))
    return out


def run_compare(base: Path, tuned: Path, metric: str | None = None) -> list[Comparison]:
    """Compare two results' files item by item, and print what came out.

    Raises:
        NotAvailableError: no such file; CorruptFileError: no result; and what `compare` raises.
    """
    first, second = read_result(base), read_result(tuned)
    found = compare(first, second, metric)
    print(format_comparison(first, second, found))
    return found


def read_result(path: Path) -> EvalResult:
    """The result in a file.

    Raises:
        NotAvailableError: no such file; CorruptFileError: it holds something else.
    """
    if not Path(path).is_file():
        raise NotAvailableError(f"There is no result {str(path)!r}; 'lora-kit eval' writes one.")
    return EvalResult.load(path)


def format_result(result: EvalResult) -> str:
    """A line for each metric: value, standard error, 95 % interval, items; groups first."""
    lines = [f"{result.model}   lm-eval {result.harness}, seed {result.seed}"]
    head = f"{'task':<34}{'shots':>5}  {'metric':<{METRIC_WIDTH}}{'value':>8}{'stderr':>8}"
    lines.append(f"{head}   {'95 % interval':<18}{'n':>7}")
    for row in result.rows():
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        interval = f"{row['low']:.4f} – {row['high']:.4f}" if stderr else ""
        lines.append(
            f"{row['task']:<34}{row['shots']:>5}  {row['metric']:<{METRIC_WIDTH}}"
            f"{_short(row['value']):>8}{stderr:>8}   {interval:<18}{row['n']:>7,}"
        )
    if result.truncated:
        lines.append(
            f"{result.truncated:,} prompts were longer than the model's context and were cut on "
            "the left: these scores are of other questions than the tasks'."
        )
    return "\n".join(lines)


def format_comparison(base: EvalResult, tuned: EvalResult, found: Sequence[Comparison]) -> str:
    """A line for each metric: both values, their paired difference with interval, the tests."""
    lines = [f"base   {base.model}", f"tuned  {tuned.model}"]
    head = f"{'task':<34}{'metric':<{METRIC_WIDTH}}{'base':>8}{'tuned':>8}{'diff':>9}"
    lines.append(f"{head}   {'95 % interval':<19}{'McNemar p':>10}{'Holm p':>9}{'n':>7}")
    for one in found:
        d = one.difference
        interval = f"{d.low:+.4f} – {d.high:+.4f}" if d.low != d.high else ""
        tests = "".join(
            f"{'' if p is None else format(p, '.3g'):>{w}}"
            for p, w in ((one.p, 10), (one.p_holm, 9))
        )
        lines.append(
            f"{one.task:<34}{one.metric:<{METRIC_WIDTH}}{_short(one.base.value):>8}"
            f"{_short(one.tuned.value):>8}{d.value:>+9.4f}   {interval:<19}{tests}{one.base.n:>7,}"
        )
    lines.append(
        "Paired: the same items under both. The interval is the paired bootstrap's, McNemar's test "
        "exact, Holm's correction over the tests shown (a group's members among themselves)."
    )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _tasks(spec: EvalSpec) -> list[str | Dataset]:
    names = [name.strip() for name in spec.tasks if name.strip()]
    if PERPLEXITY in names and spec.text is None:
        raise BadInputError("The task perplexity needs --text FILE: what to read.")
    found: list[str | Dataset] = [name for name in names if name != PERPLEXITY]
    if spec.text is not None:
        found.append(read_texts(spec.text))
    if not found:
        raise BadInputError("No task given; write --tasks hellaswag,gsm8k, or --text FILE.")
    return found


def read_texts(path: Path) -> Dataset:
    """Texts to measure perplexity on: rows with a field `text`, or a .txt or .md file as one text.

    Raises:
        NotAvailableError: no such file; BadInputError: rows without texts; CorruptFileError.
    """
    from lora_kit.data_files import read_file

    if not path.is_file():
        raise NotAvailableError(f"There is no file {str(path)!r}.")
    if path.suffix.lower() in (".txt", ".md"):
        try:
            rows = [{"text": path.read_text(encoding="utf-8")}]
        except UnicodeDecodeError as e:
            raise BadInputError(f"{path} is not UTF-8 ({e}); save it as UTF-8.") from e
    else:
        rows = read_file(path)
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            raise BadInputError(f"{path} row {number} has no text in a field of that name.")
    if not rows:
        raise BadInputError(f"{path} has no rows.")
    texts = tuple({"text": row["text"]} for row in rows)
    return Dataset(PERPLEXITY, path.stem, texts, "file", store.sha256_file(path)[:12])


def _check_tasks(tasks: Sequence[str | Dataset], spec: EvalSpec) -> None:
    """Look at the tasks once before the model is loaded: a misspelt name is found in seconds."""
    from lora_kit.evaluate.harness import HUMANEVAL, quiet_lm_eval
    from lora_kit.evaluate.tasks import plan_tasks

    for what, value, least in (("--limit", spec.limit, 1), ("--shots", spec.shots, 0)):
        if value is not None and value < least:
            raise BadInputError(f"{what} must be at least {least}, not {value}.")
    named = [task for task in tasks if task != HUMANEVAL]
    if named:
        with quiet_lm_eval():
            plan_tasks(named, limit=1, num_fewshot=spec.shots)


def _check_out(out: Path | None) -> None:
    if out is not None and out.is_dir():
        raise BadInputError(f"{out} is a folder; name a file for the result.")


def _adapter_record(folder: Path) -> dict[str, str]:
    from lora_kit.lora_files import CONFIG, WEIGHTS

    files = [folder / CONFIG, folder / WEIGHTS]
    digests = [store.sha256_file(file) for file in files if file.exists()]
    return {"name": folder.resolve().name, "sha256": store.sha256_json(digests)[:16]}


def _about(spec: EvalSpec, model: Mapping[str, Any], adapter) -> dict[str, Any]:
    from importlib.metadata import version

    from lora_kit.hardware import detect

    names = ("torch", "transformers", "lm_eval", "lora-kit")
    return {
        "command": " ".join(["lora-kit", *sys.argv[1:]]),
        "model": dict(model),
        "adapter": adapter,
        "limit": spec.limit,
        "shots": spec.shots,
        "chat_template": spec.chat_template,
        "hardware": detect().to_dict(),
        "versions": {name: version(name) for name in names},
    }


def _kept_answers(spec: EvalSpec, about: Mapping[str, Any]) -> Path:
    """The file of this model's answers: another model, adapter, dtype or version has another."""
    identity = [about[key] for key in ("model", "adapter", "versions")]
    identity.append([about["hardware"]["kind"], spec.slow])
    return store.home() / "evaluations" / f"{store.sha256_json(identity)[:16]}.jsonl"


def _own_file(name: str, result: EvalResult) -> Path:
    """A file in runs/eval that is not there yet."""
    inside = {task for members in result.groups.values() for task in members}
    tasks = [*result.groups, *(task for task in result.tasks if task not in inside)]
    stem = "-".join([name.replace(" + ", "+"), *tasks])[:120].replace("/", "_")
    number = 1
    while True:
        path = Path("runs") / "eval" / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists():
            return path
        number += 1


def _progress():
    """Prints how far it is: after five seconds, then ever more rarely."""
    start = time.monotonic()
    due = QUIET_SECONDS

    def tell(done: int, asked: int) -> None:
        nonlocal due
        passed = time.monotonic() - start
        if passed < due:
            return
        due = passed + max(QUIET_SECONDS, passed / 4)
        of = f" of {asked:,} requests, {done / asked:.0%}" if asked else " requests"
        print(f"answered {done:,}{of}, {passed:.0f} s", flush=True)

    return tell
