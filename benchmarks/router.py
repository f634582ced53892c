"""The router shipped in data/router: fitted, measured on prompts it has not seen, and timed.

    python benchmarks/router.py

Centroids come from prompts in the skills' own form and in two other wordings; layer, pooling and
threshold are chosen on other rows, in the own form and a third wording; everything in the tables is
measured on rows and on a fourth wording that neither saw. Prompts of no adapter are the 32
questions of data/texts: half choose the threshold, half measure. The harder question, what happens
to prompts of a skill the router was not told of, is asked by leaving out each skill in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FIT, CHOOSE, TEST = 30, 20, 40  # prompts of each skill
WORDINGS = {"own form": [None], "wordings it was fitted on": [0, 1], "a wording it never saw": [3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name or a folder")
    parser.add_argument("--out", type=Path, default=Path("data/router"))
    parser.add_argument("--records", type=Path, default=Path("data/results/05_adapter_swapping"))
    parser.add_argument("--quick", action="store_true", help="a quarter of the prompts")
    args = parser.parse_args()
    from lora_kit.evaluate.statistics import proportion
    from lora_kit.models import load_model
    from lora_kit.serve.router import confusion, fit_router, save_router
    from lora_kit.skills import SKILLS
    from lora_kit.studies.records import new_record, write_record

    started = time.perf_counter()
    loaded = load_model(args.model, dtype="float32")
    material = Prompts(list(SKILLS), 4 if args.quick else 1)
    router = fit_router(loaded.model, loaded.tokenizer, *material.fitting(list(SKILLS)))
    save_router(router, args.out)
    metrics, tables = {}, {"choices": [vars(c) | {"score": c.score} for c in router.choices]}
    for wording, ways in WORDINGS.items():
        table = confusion(router, loaded.model, loaded.tokenizer, material.asked(ways))
        own = [row for row in table if row["prompts of"] != "base"]
        right = sum(row[row["prompts of"]] for row in own)
        asked = sum(sum(v for k, v in row.items() if k != "prompts of") for row in own)
        key = wording.replace(" ", "_")
        metrics[f"right_{key}"] = proportion(right, asked).to_metric()
        tables[f"confusion_{key}"] = table
        print(f"{wording}: {proportion(right, asked)}", flush=True)
    base = tables["confusion_own_form"][-1]
    refused = proportion(base["base"], sum(v for k, v in base.items() if k != "prompts of"))
    metrics["foreign_refused"] = refused.to_metric()
    print(f"questions for the base: {refused}")
    metrics["ms_a_prompt"], metrics["ms_a_forward"] = milliseconds(router, loaded, material)
    print(f"{metrics['ms_a_prompt']:.1f} ms a prompt; whole: {metrics['ms_a_forward']:.1f} ms")
    tables["left_out"] = left_out(loaded, material, list(SKILLS))
    record = new_record(
        "05_adapter_swapping",
        "python benchmarks/router.py" + (" --quick" if args.quick else ""),
        parameters={
            "layer": router.layer,
            "pooling": router.pooling,
            "threshold": router.threshold,
            "centroids": len(router.centroids),
        },
        metrics=metrics,
        tables=tables,
        seed=0,
        seconds=time.perf_counter() - started,
        model=loaded.record(),
    )
    print(write_record(record, args.records / "router.json"))


class Prompts:
    """Disjoint rows of every skill, for fitting, choosing and measuring."""

    def __init__(self, skills: list[str], divide: int):
        from lora_kit.skills import draw_skill
        from lora_kit.store import repository

        sizes = {"addition": 2, "subtraction": 2, "case": 2, "dates": 4}
        counts = [n // divide for n in (FIT, CHOOSE, TEST)]
        self.rows = {}
        for skill in skills:
            drawn = draw_skill(skill, sizes.get(skill, 3), sum(counts), seed=0).rows
            a, b = counts[0], counts[0] + counts[1]
            self.rows[skill] = drawn[:a], drawn[a:b], drawn[b:]
        text = (repository() / "data" / "texts" / "questions.tsv").read_text(encoding="utf-8")
        questions = [line.split("\t")[0] for line in text.splitlines()]
        self.questions = questions[::2], questions[1::2]

    def fitting(self, skills: list[str]):
        """(prompts, held_out, others) as `fit_router` takes them."""
        from lora_kit.rewordings import phrased

        return (
            {s: phrased(s, self.rows[s][0], [None, 0, 1]) for s in skills},
            {s: phrased(s, self.rows[s][1], [None, 2]) for s in skills},
            self.questions[0],
        )

    def asked(self, ways: list) -> dict[str, list[str]]:
        from lora_kit.rewordings import phrased

        own = {s: phrased(s, rows[2], ways) for s, rows in self.rows.items()}
        return own | {"base": list(self.questions[1])}


def milliseconds(router, loaded, material) -> tuple[float, float]:
    """Median time to route one prompt, and of one whole forward pass over it."""
    import torch

    asked = [p for ps in material.asked([None]).values() for p in ps][:40]
    times: tuple[list, list] = ([], [])
    for prompt in asked:
        start = time.perf_counter()
        router.route(loaded.model, loaded.tokenizer, [prompt])
        times[0].append(1000 * (time.perf_counter() - start))
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        start = time.perf_counter()
        with torch.inference_mode():
            loaded.model(ids)
        times[1].append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def left_out(loaded, material, skills: list[str]) -> list[dict]:
    """For each skill, a router that was not told of it: where its prompts go."""
    from lora_kit.serve.router import confusion, fit_router

    rows = []
    asked = material.asked([None])
    for skill in skills:
        others = [s for s in skills if s != skill]
        router = fit_router(loaded.model, loaded.tokenizer, *material.fitting(others))
        counts = confusion(router, loaded.model, loaded.tokenizer, {skill: asked[skill]})[0]
        total = sum(v for k, v in counts.items() if k != "prompts of")
        taken = {k: v for k, v in counts.items() if v and k not in ("prompts of", "base")}
        rows.append({"skill": skill, "asked": total, "to_the_base": counts["base"], **taken})
        print(f"without {skill}: {counts['base']} of {total} to the base, {taken}", flush=True)
    return rows


if __name__ == "__main__":
    main()
