"""What Alpaca makes a model forget: the records that notebook 06 reads.

    python benchmarks/forgetting.py --device cuda --jobs 12  # an H200 under MPS: eight minutes
    python benchmarks/forgetting.py --quick                  # a CPU: all of it, tiny

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
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_kit.studies.forgetting_jobs import NAME, STUDY, TASKS

PARTS = ("teach", "map", "standard")


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
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = plan(args)
    left = [job for job in jobs if not job["done"]]
    print(f"{len(jobs)} cells, {len(jobs) - len(left)} of them there already", flush=True)
    if not left:
        return
    failed = side_by_side(args, jobs, prepare(args), started)
    missing = [job["name"] for job in plan(args) if not job["done"]]
    print(f"{time.monotonic() - started:.0f} s in all; {len(missing)} cells missing")
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
    from lora_kit.models import unpacked

    return str(unpacked(args.model or NAME, args.work / NAME))


def side_by_side(args, jobs: list[dict], model: str, started: float) -> list[str]:
    """Run what is not done in warm processes, each job once its needs are met; the names that
    failed, twice."""
    from lora_kit.studies.jobs import Clock, Job, run_jobs
    from lora_kit.studies.pool import local_pool

    options = {"model": model, "out": str(args.out), "work": str(args.work)}
    options |= {"quick": args.quick, "device": args.device, "teach_steps": args.teach_steps}
    clock = Clock(args.budget, started)

    def on_end(job, outcome, again: bool) -> None:
        what = f"{clock.passed:5.0f} s  {job.name}"
        if outcome.error is None:
            print(f"{what} ({outcome.seconds:.0f} s): {outcome.value}", flush=True)
        else:
            said = "failed, and again" if again else "FAILED"
            last = "\n".join(outcome.traceback.splitlines()[-12:])
            print(f"{what} {said}: {outcome.error}\n{last}", flush=True)

    waiting = [
        Job(
            name=job["name"],
            function=f"{Path(__file__).resolve()}:work",
            arguments={"job": job, "options": options},
            kind=job["kind"],
            needs=(job["needs"],) if job["needs"] else (),
            log=args.work / "logs" / f"{job['name']}.log",
        )
        for job in jobs
        if not job["done"]
    ]
    engine = local_pool(args.work / "logs", args.jobs, args.device, most=len(waiting))
    done = [job["name"] for job in jobs if job["done"]]
    return list(run_jobs(waiting, engine, clock, done, on_end=on_end).failed)


# ------------------------------------------------------------------ in a process of the pool


def work(job: dict, options: dict) -> str:
    from dataclasses import replace

    from lora_kit.studies.forgetting_jobs import QUICK, Scale, Setting, run_job

    scale = QUICK if options["quick"] else Scale()
    if options["teach_steps"]:
        scale = replace(scale, teach_steps=options["teach_steps"])
    folders = Path(options["out"]), Path(options["work"])
    return run_job(job, Setting(options["model"], *folders, options["device"], scale))


if __name__ == "__main__":
    main()
