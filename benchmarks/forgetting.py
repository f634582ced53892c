"""What Alpaca makes a model forget: the records that notebook 06 reads.

    python benchmarks/forgetting.py --device cuda --jobs 8      # one GPU, five minutes
    python benchmarks/forgetting.py --quick                     # a CPU: the same road, tiny

Three parts, chosen with `--part teach,map,standard`:

    teach     for each seed a base that was taught two skills (sums, word problems), merged
    map       that base after QLoRA on Alpaca: replay, learning rate, rows and rank, one variable at
              a time from a centre, asked before and after on the same held-out items
    standard  the untaught model after the paper's recipe on 2,000 rows: HellaSwag, MMLU, GSM8K,
              whole test sets, before (as it is; through NF4) and after (three seeds)

One record a cell in data/results/06_forgetting, with every item's 0 or 1, so that each test can be
made again. What has its record is left alone: a run that was cut off carries on. Cells come in
order of importance, all seeds of a setting before the next. `--jobs N` keeps N processes on the
GPU, each held to a T4's rules (fp16, 15 GiB). Offline, `--model` names a folder with the default
model (safetensors, or the GGUF file) and LORA_KIT_DATA the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, Queue

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAME = "smollm2-135m-instruct"
STUDY = "06_forgetting"
PARTS = ("teach", "map", "standard")
TASKS = {"gsm8k": None, "mmlu": 5, "hellaswag": None}  # shots; None: the task's own. Longest first
BATCH = {"gsm8k": 256, "mmlu": 64, "hellaswag": 64}  # where the fast model does not choose
STANDARD_ROWS = 2000
FULL = {"train": 4000, "test": 500, "teach_steps": 300, "teach_batch": 64, "rounds": 3}
FULL |= {"alpaca": 1.0, "held_out": 200, "limit": None}
QUICK = {"train": 64, "test": 8, "teach_steps": 2, "teach_batch": 4, "rounds": 1}
QUICK |= {"alpaca": 0.01, "held_out": 4, "limit": 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--part", default=",".join(PARTS), help="some of teach,map,standard")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of the standard part")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--budget", type=float, help="seconds: start nothing that would not end")
    parser.add_argument("--teach-steps", type=int, help="steps of a round of teaching")
    parser.add_argument("--settings", type=int, help="of the map, only the first so many")
    parser.add_argument("--quick", action="store_true", help="tiny numbers, to try the road")
    parser.add_argument("--out", type=Path, default=Path("data/results") / STUDY)
    parser.add_argument("--work", type=Path, default=Path("runs/forgetting"), help="taught models")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.part.split(",")) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if unknown := set(args.tasks.split(",")) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        os.environ["LORA_KIT_T4_RULES"] = "1"
    if args.worker:
        work(json.loads(args.worker))
        return
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = plan(args)
    left = [job for job in jobs if not job["done"]]
    print(f"{len(jobs)} cells, {len(jobs) - len(left)} of them there already", flush=True)
    if not left:
        return
    failed = side_by_side(args, jobs, prepare(args), started)
    missing = [job["name"] for job in plan(args) if not job["done"]]
    print(f"{time.perf_counter() - started:.0f} s in all; {len(missing)} cells missing")
    if missing:
        print("missing: " + ", ".join(missing))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------ the parent: what, and in order


def plan(args) -> list[dict]:
    """The jobs, most important first. A job without a record is a step on the way to others."""
    from lora_kit.studies.forgetting import cells

    parts = args.part.split(",")
    seeds = [int(s) for s in args.seeds.split(",")]
    jobs: list[dict] = []

    def add(name: str, kind: str, needs: str | None = None, **what) -> None:
        record = kind in ("teach", "evaluate", "cell")
        done = (args.out / f"{name}.json").exists() if record else folder_of(args, name).exists()
        done = done and (kind != "teach" or folder_of(args, name).exists())
        jobs.append({"name": name, "kind": kind, "needs": needs, "done": done, **what})

    taught = [s for s in seeds if "teach" in parts or "map" in parts]
    for seed in taught:
        add(f"teach_seed{seed}", "teach", seed=seed)
    if "standard" in parts:
        for seed in seeds:
            add(f"standard_seed{seed}_model", "tune", seed=seed)
        add("standard_nf4_model", "quantise")
        for task in args.tasks.split(","):
            add(f"standard_base_{task}", "evaluate", task=task, which="base")
        for which in ("nf4", *(f"seed{s}" for s in seeds)):
            for task in args.tasks.split(","):
                needs = f"standard_{which}_model"
                add(f"standard_{which}_{task}", "evaluate", needs, task=task, which=which)
    if "map" in parts:
        wanted = cells(seeds)
        wanted = wanted[: args.settings * len(seeds)] if args.settings else wanted
        for cell in wanted:
            add(f"map_{cell.name}", "cell", f"teach_seed{cell.seed}", cell=cell.to_dict())
    # A model that no missing evaluation needs is not made again.
    needed = {job["needs"] for job in jobs if not job["done"]}
    for job in jobs:
        if job["kind"] in ("tune", "quantise") and job["name"] not in needed:
            job["done"] = True
        if job["kind"] == "teach" and "teach" not in parts and job["name"] not in needed:
            job["done"] = True
    return jobs


def folder_of(args, name: str) -> Path:
    return args.work / name


def prepare(args) -> str:
    """The folder of the default model, under the model's own name."""
    from lora_kit.models import _convert_gguf, fetch_model

    ggufs = sorted(Path(args.model).glob("*.gguf")) if args.model else []
    if not ggufs:
        return str(fetch_model(args.model or NAME).path)
    folder = args.work / NAME
    if not folder.exists():
        from lora_kit import store

        with store.new_folder(folder) as part:
            _convert_gguf(ggufs[0], part)
    return str(folder)


class Worker:
    """A child process that takes one job a line and answers one line a job."""

    def __init__(self, number: int, args, model: str, answers: Queue) -> None:
        self.number, self.job, self.begun = number, None, 0.0
        options = {"model": model, "out": str(args.out), "work": str(args.work)}
        options |= {"quick": args.quick, "device": args.device, "teach_steps": args.teach_steps}
        command = [sys.executable, __file__, "--device", args.device]
        environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
        if args.jobs > 1:
            threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
            environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self.log = args.work / f"worker{number}.log"
        self.process = subprocess.Popen(
            [*command, "--worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.log, "w"),
            text=True,
            env=environment,
        )
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: Queue) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                answers.put((self, json.loads(line)))
        answers.put((self, None))  # it has ended

    def give(self, job: dict) -> None:
        self.job, self.begun = job, time.perf_counter()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()


def side_by_side(args, jobs: list[dict], model: str, started: float) -> list[str]:
    """Give each free worker the first job whose needs are met; return the names that failed."""
    answers: Queue = Queue()
    waiting = [job for job in jobs if not job["done"]]
    done = {job["name"] for job in jobs if job["done"]}
    workers = [Worker(i, args, model, answers) for i in range(min(args.jobs, len(waiting)))]
    alive, failed, took = list(workers), [], {}
    while waiting or any(w.job for w in alive):
        passed = time.perf_counter() - started
        for worker in [w for w in alive if w.job is None]:
            for job in waiting:
                ends = passed + max(took.get(job["kind"], [0]))
                in_time = args.budget is None or ends < args.budget
                if in_time and (job["needs"] is None or job["needs"] in done):
                    waiting.remove(job)
                    worker.give(job)
                    break
        if not any(w.job for w in alive):  # nothing runs, so nothing waiting can ever start
            break
        try:
            left = None if args.budget is None else max(0.1, args.budget + 5 - passed)
            worker, said = answers.get(timeout=left)
        except Empty:
            print("the budget is spent: what still runs is cut off", flush=True)
            break
        passed, job = time.perf_counter() - started, worker.job
        if said is None:
            alive.remove(worker)
            said = {"failed": "its process ended", "line": ""}
            if job is None:
                continue
        worker.job = None
        seconds = time.perf_counter() - worker.begun
        if said.get("failed"):
            failed.append(job["name"])
            tail = "".join(worker.log.read_text().splitlines(keepends=True)[-12:])
            print(f"{passed:5.0f} s  {job['name']} FAILED: {said['failed']}\n{tail}", flush=True)
            continue
        done.add(job["name"])
        took.setdefault(job["kind"], []).append(seconds)
        print(f"{passed:5.0f} s  {job['name']} ({seconds:.0f} s): {said['line']}", flush=True)
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
    return failed


# ------------------------------------------------------------------ a worker


def work(options: dict) -> None:
    import torch

    from lora_kit.hardware import hold_to_t4_rules

    if hold_to_t4_rules():
        torch.backends.cuda.enable_cudnn_sdp(False)  # a T4 has no fused attention of cuDNN either
    import gc
    import traceback

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print belongs into the log
    scale = dict(QUICK if options["quick"] else FULL)
    if options["teach_steps"]:
        scale["teach_steps"] = options["teach_steps"]
    for line in sys.stdin:
        job = json.loads(line)
        print(f"--- {job['name']}", flush=True)
        try:
            said = {"line": KINDS[job["kind"]](job, options, scale)}
        except Exception as error:  # a cell that fails must not take the others with it
            traceback.print_exc()
            said = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def command_of(options: dict, part: str, **values) -> str:
    words = ["python", "benchmarks/forgetting.py", "--device", options["device"], "--part", part]
    words += [w for k, v in values.items() for w in (f"--{k}", str(v))]
    return shlex.join(words + (["--quick"] if options["quick"] else []))


def alpaca_rows(scale: dict):
    from lora_kit.data import load_rows

    return load_rows("alpaca", "train", limit=5000)


def material_of(seed: int, scale: dict, alpaca: bool = True):
    from lora_kit.studies.forgetting import SKILLS
    from lora_kit.studies.forgetting_cells import skill_material, with_alpaca

    made = skill_material(SKILLS, scale["train"], scale["test"], seed)
    return with_alpaca(made, alpaca_rows(scale), scale["held_out"]) if alpaca else made


def scaled(cell, scale: dict):
    from dataclasses import replace

    return replace(cell, rows=max(4, round(cell.rows * scale["alpaca"])))


def teach_job(job: dict, options: dict, scale: dict) -> str:
    """Teach, then ask: as taught, and with the weights through NF4."""
    from dataclasses import replace

    from lora_kit import store
    from lora_kit.evaluate.statistics import estimate
    from lora_kit.models import load_model
    from lora_kit.studies.forgetting import Cell, to_bits
    from lora_kit.studies.forgetting_cells import (
        TEACHING,
        alpaca_loss,
        quantised,
        score_all,
        teach,
        tuning_spec,
    )
    from lora_kit.studies.records import new_record, write_record

    started, seed = time.perf_counter(), job["seed"]
    folder = Path(options["work"]) / job["name"]
    material = material_of(seed, scale)
    spec = replace(TEACHING, seed=seed, steps=scale["teach_steps"], batch_size=scale["teach_batch"])
    told = teach(options["model"], folder, material, spec, rounds=scale["rounds"])
    plain = load_model(str(folder))
    found = {"taught": score_all(plain.model, plain.tokenizer, material)}
    model, tokenizer = quantised(folder)
    found["nf4"] = score_all(model, tokenizer, material)
    losses = tuning_spec(Cell())
    loss = alpaca_loss(model, tokenizer, material.held_out, losses)
    metrics: dict = {"alpaca_loss_nf4": loss}
    metrics["alpaca_loss_taught"] = alpaca_loss(
        plain.model, plain.tokenizer, material.held_out, losses
    )
    items = []
    for which, skills in found.items():
        for skill, (*judged, _) in skills.items():
            for judge, scores in zip(("strict", "flexible"), judged, strict=True):
                metrics[f"{skill}_{judge}_{which}"] = estimate(scores).to_metric()
                items.append(
                    {"skill": skill, "judge": judge, "model": which, "scores": to_bits(scores)}
                )
    record = new_record(
        STUDY,
        command_of(options, "teach", seeds=seed),
        parameters={"part": "teach", "recipe": spec.to_dict(), "rows": scale["train"]},
        metrics=metrics,
        tables={"rounds": told["rounds"], "items": items},
        seed=seed,
        seconds=time.perf_counter() - started,
        model={**plain.record(), "name": NAME},
    )
    store.write_json(folder / "before.json", {"scores": found["nf4"], "loss": loss})
    write_record(record, Path(options["out"]) / f"{job['name']}.json")
    return ", ".join(
        f"{skill} {metrics[f'{skill}_strict_taught']['value']:.3f}"
        f" (nf4 {metrics[f'{skill}_strict_nf4']['value']:.3f})"
        for skill in found["nf4"]
    )


def cell_job(job: dict, options: dict, scale: dict) -> str:
    from lora_kit import store
    from lora_kit.studies.forgetting import Cell
    from lora_kit.studies.forgetting_cells import run_cell
    from lora_kit.studies.records import write_record

    cell = Cell(**{**job["cell"], "skills": tuple(job["cell"]["skills"])})
    folder = Path(options["work"]) / job["needs"]
    before = store.read_json(folder / "before.json")
    record = run_cell(
        folder,
        scaled(cell, scale),
        material_of(cell.seed, scale),
        before["scores"],
        command_of(options, "map", seeds=cell.seed),
        before["loss"],
        say=lambda text: print(text, flush=True),
    )
    write_record(record, Path(options["out"]) / f"{job['name']}.json")
    words = [f"loss {record.metrics['alpaca_loss_after']:.3f}"]
    for skill in cell.skills:
        a, b = (record.metrics[f"{skill}_strict_{when}"].value for when in ("before", "after"))
        words.append(f"{skill} {a:.3f} -> {b:.3f}")
    return ", ".join(words)


def tune_job(job: dict, options: dict, scale: dict) -> str:
    """The untaught model after the paper's recipe, merged and saved for the evaluations."""
    from lora_kit import store
    from lora_kit.studies.forgetting import Cell
    from lora_kit.studies.forgetting_cells import (
        Material,
        alpaca_loss,
        mixed_rows,
        save_plain,
        tune,
        tuning_spec,
        with_alpaca,
    )

    cell = scaled(Cell(skills=(), rows=STANDARD_ROWS, seed=job["seed"]), scale)
    material = with_alpaca(Material({}, {}), alpaca_rows(scale), scale["held_out"])
    rows, spec = mixed_rows(material, cell), tuning_spec(cell)
    done = tune(options["model"], rows, spec)
    facts = {"steps": done.steps, "seconds": done.seconds, "tokens": done.tokens}
    facts["alpaca_loss"] = alpaca_loss(done.model, done.tokenizer, material.held_out, spec)
    with store.new_folder(Path(options["work"]) / job["name"]) as folder:
        save_plain(done.model, done.tokenizer, folder)
        facts |= {"recipe": spec.to_dict(), "data": rows.record(), "peak": done.peak_memory}
        store.write_json(folder / "facts.json", facts)
    return f"{done.steps} steps in {done.seconds:.0f} s, Alpaca loss {facts['alpaca_loss']:.3f}"


def quantise_job(job: dict, options: dict, scale: dict) -> str:
    from lora_kit import store
    from lora_kit.studies.forgetting_cells import quantised, save_plain

    model, tokenizer = quantised(options["model"])
    with store.new_folder(Path(options["work"]) / job["name"]) as folder:
        save_plain(model, tokenizer, folder)
        store.write_json(folder / "facts.json", {})
    return "weights through NF4"


def evaluate_job(job: dict, options: dict, scale: dict) -> str:
    from lora_kit import store
    from lora_kit.evaluate import evaluate
    from lora_kit.models import load_model
    from lora_kit.studies.forgetting_tasks import task_record
    from lora_kit.studies.records import write_record

    folder = Path(options["work"]) / job["needs"] if job["needs"] else Path(options["model"])
    loaded = load_model(str(folder))
    compile_templates_once()
    shots = TASKS[job["task"]]
    found = evaluate(
        loaded.model,
        loaded.tokenizer,
        job["task"],
        limit=scale["limit"],
        batch_size=(BATCH if options["device"] == "cuda" else {}).get(job["task"], 4),
        **({} if shots is None else {"num_fewshot": shots}),
    )
    facts = store.read_json(folder / "facts.json") if job["needs"] else {}
    record = task_record(
        found,
        job["task"],
        job["which"],
        command_of(options, "standard", tasks=job["task"]),
        facts,
        {**loaded.record(), "name": NAME if job["which"] == "base" else f"{NAME}, {job['which']}"},
    )
    write_record(record, Path(options["out"]) / f"{job['name']}.json")
    values = {k: v.value for k, v in record.metrics.items() if hasattr(v, "value")}
    return ", ".join(f"{k} {v:.4f}" for k, v in list(values.items())[:4])


def compile_templates_once() -> None:
    """lm-eval compiles a task's Jinja template again for every row and shot: a minute for MMLU."""
    from functools import lru_cache

    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        env.from_string = lru_cache(maxsize=None)(env.from_string)


KINDS = {"teach": teach_job, "cell": cell_job, "tune": tune_job}
KINDS |= {"quantise": quantise_job, "evaluate": evaluate_job}


if __name__ == "__main__":
    main()
