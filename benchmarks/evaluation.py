"""lm-eval's own model against the kit's fast one: seconds, and whether the answers are the same.

    python benchmarks/evaluation.py --device cpu
    python benchmarks/evaluation.py --device cuda --json evaluation.json
    python benchmarks/evaluation.py --device cuda --gsm8k 128           # generation too

HellaSwag (0-shot) and MMLU (5-shot) on the default model, fp32 on a CPU, fp16 on a GPU. Both score
the same requests in one process, in turns; timed is the whole of lm-eval's `loglikelihood`, from
texts to numbers. HFLM has the best of a few batch sizes, tried on a part of the requests. On a CPU
the ratio is of processor seconds, which other programs on the machine disturb less. Beside the
times: the largest difference of two log-likelihoods, the share of items with the same best
answer, the share of requests with the same greedy flag; and, as a yardstick of what rounding does,
HFLM against itself at another batch size. LORA_KIT_DATA names the rows; offline, `--model` names a
folder with the default model (safetensors, or the GGUF file).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAME = "smollm2-135m-instruct"
# Eight subjects of different areas and lengths.
SUBJECTS = (
    *("college_computer_science", "astronomy", "professional_accounting", "philosophy"),
    *("high_school_us_history", "marketing", "formal_logic", "anatomy"),
)
BATCHES = {
    "cpu": {"hellaswag": (1, 4, 8, 16), "mmlu": (1, 2, 4), "gsm8k": (4, 16)},
    "cuda": {"hellaswag": (32, 128, 512), "mmlu": (16, 64, 128), "gsm8k": (64, 128)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--model", help="folder of the default model; else fetched")
    parser.add_argument("--only", choices=("hellaswag", "mmlu"), help="one of the two")
    parser.add_argument("--limit", type=int, help="HellaSwag items (cuda 1000, cpu 40)")
    parser.add_argument("--subjects", type=int, help="MMLU subjects (cuda 8, cpu 2)")
    parser.add_argument("--questions", type=int, help="of each subject (cuda 100, cpu 16)")
    parser.add_argument("--gsm8k", type=int, default=0, help="GSM8K questions to answer as well")
    parser.add_argument("--rounds", type=int, default=2, help="timed turns of each")
    parser.add_argument("--tune", action="store_true", help="also time other row sizes")
    parser.add_argument("--json", type=Path, help="also write everything measured here")
    args = parser.parse_args()
    small = args.device == "cpu"
    args.limit = args.limit or (40 if small else 1000)
    args.subjects = args.subjects or (2 if small else len(SUBJECTS))
    args.questions = args.questions or (16 if small else 100)
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(args, Path(folder))
        found = {"machine": machine(args, loaded)}
        print(f"{time.perf_counter() - started:5.0f} s  model loaded", flush=True)
        for name, tasks, shots, limit in (
            ("hellaswag", ["hellaswag"], 0, args.limit),
            ("mmlu", [f"mmlu_{s}" for s in SUBJECTS[: args.subjects]], 5, args.questions),
        ):
            if args.only not in (None, name):
                continue
            found[name] = side_by_side(name, requests(tasks, shots, limit), loaded, args)
            found[name]["shots"] = shots
            print(f"{time.perf_counter() - started:5.0f} s  {name} done", flush=True)
            report(name, found[name], args)
        if args.gsm8k:
            found["gsm8k"] = answers(requests(["gsm8k"], 5, args.gsm8k), loaded, args)
            print(f"{time.perf_counter() - started:5.0f} s  gsm8k done", flush=True)
    found["seconds"] = time.perf_counter() - started
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def load(args, scratch: Path):
    from lora_kit.models import load_model, unpacked

    folder = str(unpacked(args.model, scratch / NAME)) if args.model else NAME
    dtype = "float32" if args.device == "cpu" else "float16"
    return load_model(folder, dtype, device=args.device)


def machine(args, loaded) -> dict:
    from importlib.metadata import version

    import torch

    from lora_kit.hardware import detect

    names = ("torch", "transformers", "lm_eval")
    return {
        "hardware": detect().name,
        "threads": torch.get_num_threads(),
        "dtype": loaded.dtype,
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in names},
    }


def requests(tasks: list[str], shots: int, limit: int) -> list:
    """lm-eval's requests of `limit` items of each task, spread evenly over its rows: benchmarks
    stand in an order of their own (HellaSwag's first third is its shorter source)."""
    from lora_kit.evaluate.harness import quiet_lm_eval
    from lora_kit.evaluate.tasks import plan_tasks

    made = []
    with quiet_lm_eval():
        for plan in plan_tasks(tasks, None, shots or None):
            plan.task.set_config("num_fewshot", shots)
            plan.task.set_fewshot_seed(0)
            rows = range(0, plan.available, max(1, plan.available // limit))[:limit]
            plan.task.build_all_requests(samples=rows)
            made += plan.task.instances
    return made


def timed(lm, asked) -> tuple[float, list]:
    """(seconds, answers); the answers are plain numbers, so a GPU has done its work by then."""
    start = clock()
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    return clock() - start, answers


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def side_by_side(name: str, asked: list, loaded, args) -> dict:
    from dataclasses import asdict, replace

    from lm_eval.models.huggingface import HFLM

    from lora_kit.evaluate.fast_model import FastLM

    fast = FastLM(loaded.model, loaded.tokenizer)
    timed(fast, asked[:32])
    part = asked[: max(16, len(asked) // 4) // 4 * 4]
    tried, answers = {}, {}
    for batch in BATCHES[args.device][name]:
        lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)
        timed(lm, asked[:8])
        tried[batch], answers[batch] = timed(lm, part)
        print(f"       HFLM {name} batch {batch}: {tried[batch]:.2f} s a part", flush=True)
    best = min(tried, key=tried.get)
    slow = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=best)
    times = {"fast": [], "hflm": []}
    for turn in range(args.rounds):
        for way, lm in (("fast", fast), ("hflm", slow)):
            seconds, found = timed(lm, asked)
            times[way].append(seconds)
            if turn == 0:
                answers[way] = found
    other = next(b for b in tried if b != best)
    measured = {
        "requests": len(asked),
        "hflm_batch": best,
        "hflm_part_seconds": tried,
        "sizes": asdict(fast.sizes),
        "seconds": times,
        "ratio": statistics.median(times["hflm"]) / statistics.median(times["fast"]),
        "parity": parity(asked, answers["fast"], answers["hflm"]),
        "hflm_against_itself": {
            "batches": [best, other],
            **parity(part, answers[best], answers[other]),
        },
    }
    if args.tune:
        rows = (256, 512, 1024) if args.device == "cuda" else (128, 192, 384)
        batches = (32_768, 131_072, 262_144) if args.device == "cuda" else (256, 512, 2048)
        tuned = []
        for row in rows:
            for batch in batches:
                fast.sizes = replace(fast.sizes, row=row, batch=batch)
                tuned.append({"row": row, "batch": batch, "seconds": timed(fast, asked)[0]})
        measured["tuned"] = tuned
    return measured


def answers(asked: list, loaded, args) -> dict:
    """GSM8K's answers, generated: seconds, and how many are the same text."""
    from lm_eval.models.huggingface import HFLM

    from lora_kit.evaluate.fast_model import FastLM

    ways = {f"HFLM, batch {b}": b for b in BATCHES[args.device]["gsm8k"]} | {"fast": None}
    times, texts = {}, {}
    for way, batch in ways.items():
        made = {"tokenizer": loaded.tokenizer}
        lm = (
            FastLM(loaded.model, **made)
            if batch is None
            else HFLM(pretrained=loaded.model, batch_size=batch, **made)
        )
        start = clock()
        texts[way] = lm.generate_until(asked, disable_tqdm=True)
        times[way] = clock() - start
    print(f"\ngsm8k, 5-shot: {len(asked)} answers")
    print(f"{'model':<24}{'s':>10}{'ratio':>10}{'same text':>12}")
    best = min((w for w in times if w != "fast"), key=times.get)
    same = {}
    for way, seconds in times.items():
        same[way] = sum(a == b for a, b in zip(texts[way], texts[best], strict=True)) / len(asked)
        print(f"{way:<24}{seconds:>10.2f}{times[best] / seconds:>10.2f}{same[way]:>12.1%}")
    return {"answers": len(asked), "seconds": times, "same_text_as": best, "same_text": same}


def parity(asked, ours, theirs) -> dict:
    """How far two lists of (log-likelihood, greedy) are apart."""
    groups: dict[tuple, list[int]] = {}
    for i, request in enumerate(asked):
        groups.setdefault((request.task_name, request.doc_id), []).append(i)

    def best(answers, numbers):
        return max(numbers, key=lambda i: answers[i][0])

    pairs = list(zip(ours, theirs, strict=True))
    return {
        "items": len(groups),
        "max_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "same_best": sum(best(ours, g) == best(theirs, g) for g in groups.values()) / len(groups),
        "same_greedy": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
    }


def report(name: str, found: dict, args) -> None:
    own, noise = found["parity"], found["hflm_against_itself"]
    print(f"\n{name}, {found['shots']}-shot: {own['items']} items, {found['requests']} requests")
    print(f"{'model':<24}{'median s':>10}{'range':>18}{'ratio':>8}")
    for way, label in (("hflm", f"HFLM, batch {found['hflm_batch']}"), ("fast", "fast")):
        times = found["seconds"][way]
        spread = f"{min(times):.2f}-{max(times):.2f}"
        ratio = found["ratio"] if way == "fast" else 1.0
        print(f"{label:<24}{statistics.median(times):>10.2f}{spread:>18}{ratio:>8.2f}")
    print(f"{'':<24}{'max |difference|':>18}{'same best':>11}{'same greedy':>13}")
    label = "HFLM, batch {} and {}".format(*noise["batches"])
    for who, p in (("fast and HFLM", own), (label, noise)):
        print(
            f"{who:<24}{p['max_difference']:>18.2e}{p['same_best']:>11.2%}{p['same_greedy']:>13.2%}"
        )
    for tuned in found.get("tuned", []):
        print(f"  rows of {tuned['row']}, batch {tuned['batch']}: {tuned['seconds']:.2f} s")
    print(flush=True)


if __name__ == "__main__":
    from lora_kit.errors import LoraKitError

    try:
        main()
    except LoraKitError as e:
        sys.exit(f"evaluation.py: {e}")
