"""The load parts of `benchmarks/adapters.py`: Tables 7-10 of Zhao et al. (2024), at our scale.

The same quantities (total request time, time to first token, token streaming time; average and
p90), the same users and adapters; random prompts of 30 to 500 tokens and answers of 1 to 120, times
`--scale`. Not the same: the model, the hardware, the number of requests instead of two minutes, and
no network between users and server. Each load runs untimed first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapters_timing import base, ratio, write_adapters

USERS = (1, 5, 10, 20, 50)
MANY = 25  # adapters of LoRA Land's one server


class Numbers:
    """In a tokenizer's place: a model with random weights has none."""

    eos_token_id = None

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))


def open_engine(args, folder: Path):
    """A running engine with 25 adapters as LoRA Land's: rank 8 on the query and value layers."""
    from lora_kit.serve import handle
    from lora_kit.serve.engine import Engine
    from lora_kit.serve.pool import AdapterPool

    if args.clock == "cpu" and args.device == "cpu":
        handle.clock = time.process_time
    found = write_adapters(args, folder, MANY, 8, ["q_proj", "v_proj"])
    model = base(args)
    pool = AdapterPool(model)
    for name, path in found.items():
        pool.add(name, path)
        pool.load(name)
    engine = Engine(model, Numbers(), pool, max_rows=64, max_waiting=256)
    engine.start()
    return engine


def asked(args, users: int, adapters, lengths=None):
    from lora_kit.serve.traffic import Traffic

    scaled = lambda n: max(1, round(n * args.scale))  # noqa: E731
    if lengths is None:
        lengths = (scaled(30), scaled(500)), (1, scaled(120))
    return Traffic(users, args.requests or max(users, 16), tuple(adapters), *lengths)


def warm_up(args, engine, traffic) -> None:
    """The traffic before it is timed, as a server of some minutes has seen its like: on a CPU once,
    for the memory it takes; on a GPU twice, for its graphs."""
    from lora_kit.serve.traffic import drive

    for _ in range(2 if args.device == "cuda" else 1):
        drive(engine, traffic)


def total(load) -> float:
    return load.average("Total request time")


def lorax(args, folder: Path):
    """Base alone and 25 adapters answer the same requests (but for the adapters), in turns. A row
    of a table is the load with the median total; ratios are medians of the turns' ratios."""
    from lora_kit.serve.traffic import drive

    engine = open_engine(args, folder)
    names = [f"a{i}" for i in range(MANY)]
    tables: dict[str, list[dict]] = {"table 7": [], "table 8": [], "table 9": []}
    metrics = {}
    drive(engine, asked(args, 2, names, ((8, 8), (4, 4))))  # everything has run once
    short = ((1, 1), (1, 1))
    for label, users, adapters in (
        ("0 adapters, 1 user", 1, [None]),
        ("25 adapters, 100 users", 100, names),
    ):
        warm_up(args, engine, asked(args, users, adapters, short))
        load = drive(engine, asked(args, users, adapters, short))
        tables["table 7"].append({"what": label, "users": users, **load.row()})
    for users in USERS:
        ways = {"table 8": [None], "table 9": names}
        found: dict[str, list] = {table: [] for table in ways}
        for adapters in ways.values():
            warm_up(args, engine, asked(args, users, adapters))
        for turn in range(args.loads):
            for table in list(ways) if turn % 2 else list(ways)[::-1]:
                found[table].append(drive(engine, asked(args, users, ways[table])))
        for table, loads in found.items():
            load = sorted(loads, key=total)[len(loads) // 2]
            cpu = 1000 * load.cpu_seconds / sum(a.tokens_in + a.tokens_out for a in load.answered)
            row = {"users": users, "requests": len(load.answered), **load.row()}
            tables[table].append(row | {"CPU ms a token": round(cpu, 3)})
        over, said = ratio(*(list(map(total, found[t])) for t in ("table 9", "table 8")))
        spent = ratio(*([load.cpu_seconds for load in found[t]] for t in ("table 9", "table 8")))[0]
        tables["table 9"][-1]["total over table 8"] = said
        metrics |= {f"total_over_base_{users}": over, f"cpu_over_base_{users}": spent}
        print(f"{users} users: total {said}, CPU {spent:.3f}", flush=True)
    engine.stop()
    metrics["adapters_over_base"] = metrics[f"total_over_base_{USERS[-1]}"]
    return metrics, tables


# ------------------------------------------------------------------ replicas


def one_replica(args) -> None:
    """A process of its own: 50 users and 25 adapters, its times on the last line."""
    import torch

    from lora_kit.serve.traffic import drive

    cores = sorted(os.sched_getaffinity(0))
    if args.device == "cpu" and len(cores) > 1:
        os.sched_setaffinity(0, {cores[args.replica % len(cores)]})
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(args, Path(folder))
        names = [f"a{i}" for i in range(MANY)]
        drive(engine, asked(args, 2, names, ((8, 8), (4, 4))))
        warm_up(args, engine, asked(args, 50, names))
        print("ready", flush=True)
        sys.stdin.readline()
        load = drive(engine, asked(args, 50, names))
        engine.stop()
    print(json.dumps({**load.row(), "seconds": load.seconds}), flush=True)


def replicas(args, folder: Path):
    """Two replicas get equal shares, as from a balancer that deals requests out in turn. On a CPU
    each has one core to itself; on GPUs its own, where there are as many."""
    rows = []
    for count in (1, 2):
        running = []
        for i in range(count):
            environment = dict(os.environ)
            if args.device == "cuda":
                import torch

                environment["CUDA_VISIBLE_DEVICES"] = str(i % torch.cuda.device_count())
            words = [sys.executable, sys.argv[0], "--device", args.device, "--replica", str(i)]
            words += [
                "--layers",
                str(args.layers),
                "--scale",
                str(args.scale),
                "--clock",
                args.clock,
            ]
            words += ["--requests", str(args.requests)] if args.requests else []
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(words, env=environment, **pipes))
        for process in running:
            if process.stdout.readline().strip() != "ready":
                raise SystemExit("a replica did not start")
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
        mean = {k: round(statistics.fmean(e[k] for e in ended), 2) for k in ended[0]}
        mean["tokens a second"] = round(sum(e["tokens a second"] for e in ended), 2)
        rows.append({"users": 50 * count, "replicas": count, **mean})
    over = [r["Total request time / average"] for r in rows]
    speed = [r["tokens a second"] for r in rows]
    return {"two_over_one_total": over[1] / over[0], "two_over_one_tokens": speed[1] / speed[0]}, {
        "table 10": rows
    }
