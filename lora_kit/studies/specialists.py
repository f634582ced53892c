"""One small model, many specialists: the cells of the study that repeats saha2024 as an experiment.

The paper tunes adapters of rank 16 to 128 with `lora_alpha` fixed at 16 and finds higher ranks
better. LoRA scales its update by s = α/r, so at a fixed α the rank 128 has an eighth of the scale
of rank 16: rank and scale move together. Here the scale is a variable of its own. Three rules, one
and the same at the anchor rank 16:

    fixed       α = 16            s = 16/r         the paper's
    constant    α = r             s = 1            α/r held constant
    stabilised  α = 4·√r          s = 4/√r         rank-stabilised (Kalajdzievski 2023)

Nothing here is heavy: models are trained and asked in `specialists_cells`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from lora_kit.architectures import Architecture
from lora_kit.errors import BadInputError, unknown_name

STUDY = "07_specialists"
ALPHA, ANCHOR = 16.0, 16  # saha2024, section 4.2.1; its smallest rank
PLACEMENTS = ("attention", "mlp", "all")
SCALINGS = ("fixed", "constant", "stabilised")
PARTS = ("base", "tune", "full", "route", "serve")
GENERALIST = "all"
TESTS = ("loss", "own", "all")


def scale_of(rank: int, scaling: str) -> float:
    """s of y = W x + s·B A x under a rule of the module's text.

    Raises:
        UnknownNameError: no such rule; BadInputError: rank < 1.
    """
    if scaling not in SCALINGS:
        raise unknown_name("scaling rule", scaling, SCALINGS)
    if rank < 1:
        raise BadInputError(f"rank must be at least 1, not {rank}.")
    rules = {
        "fixed": ALPHA / rank,
        "constant": ALPHA / ANCHOR,
        "stabilised": ALPHA / math.sqrt(ANCHOR * rank),
    }
    return rules[scaling]


def alpha_of(rank: int, scaling: str) -> float:
    """The `lora_alpha` that gives that scale in a layer which divides by the rank: α = s·r."""
    return scale_of(rank, scaling) * rank


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    part: "base" (asked, not trained), "tune" (a LoRA adapter), "full" (every weight), "route"
        (which specialist a router picks), "serve" (memory and latency of the ways to hold many).
    task: a name of `specialists_tasks.TASKS`, or "all": the three tasks together, in one adapter.
    rank, placement, scaling: of the adapter. learning_rate: the peak.
    rows, steps, batch_size: training rows drawn by the seed, optimiser steps, rows a step; steps 0
        means one pass over the rows.
    tests: "loss" (held-out loss alone), "own" (and the task's own tests), "all" (every test at
        hand).
    programs, completions: answers drawn to each problem of HumanEval, and to each number problem; 1
        is greedy. limit: items of each test, four times as many of HellaSwag; 0 for all.
    heldout: rows whose loss is measured. gpu: whose memory the planner holds the cell to.
    """

    part: str = "tune"
    model: str = "smollm2-135m-instruct"
    task: str = "gsm8k"
    rank: int = 16
    placement: str = "all"
    scaling: str = "fixed"
    learning_rate: float = 1e-3
    rows: int = 1920
    steps: int = 120
    batch_size: int = 16
    max_length: int = 512
    tests: str = "own"
    programs: int = 10
    completions: int = 1
    limit: int = 500
    heldout: int = 200
    gpu: str = "t4"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("part", PARTS),
            ("placement", PLACEMENTS),
            ("scaling", SCALINGS),
            ("tests", TESTS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        whole = ("rank", "rows", "batch_size", "max_length", "programs", "completions", "heldout")
        for name, least in (*((n, 1) for n in whole), ("steps", 0), ("limit", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadInputError(
                    f"{name} must be a whole number of at least {least}, not {value!r}."
                )
        if not 0 < self.learning_rate < math.inf:
            raise BadInputError(f"learning_rate must be above 0, not {self.learning_rate}.")

    @property
    def alpha(self) -> float:
        return alpha_of(self.rank, self.scaling)

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.scaling)

    @property
    def setting(self) -> str:
        """The cell without its seed, as a part of a file name: gsm8k_all_r016_fixed_lr1e-03."""
        if self.part in ("base", "route", "serve"):
            return f"{self.part}_{self.model.rstrip('/').rsplit('/', 1)[-1]}"
        rate = f"lr{self.learning_rate:.0e}"
        if self.part == "full":
            return f"{self.task}_full_{rate}"
        scaling = self.scaling if self.rank != ANCHOR else "anchor"
        return f"{self.task}_{self.placement}_r{self.rank:03d}_{scaling}_{rate}"

    @property
    def name(self) -> str:
        return f"{self.setting}_seed{self.seed}"

    def to_dict(self) -> dict:
        return asdict(self)


DEFAULTS = {k: v for k, v in Cell().to_dict().items() if k != "seed"}


def cell_from(parameters: Mapping, seed: int) -> Cell:
    """A cell from the parameters of a sweep.

    Raises:
        UnknownNameError: a parameter that no cell has, or a value that is none of those known.
        BadInputError: a value out of range.
    """
    known = {f.name for f in fields(Cell)} - {"seed"}
    for name in parameters:
        if name not in known:
            raise unknown_name("parameter of specialists", str(name), known)
    values = {**DEFAULTS, **parameters, "seed": seed}
    if isinstance(values["learning_rate"], str):
        raise BadInputError("learning_rate must be a number; YAML reads 1e-3 as a text: 1.0e-3.")
    return Cell(**values)


# ------------------------------------------------------------------ sizes


def module_parameters(shape: Architecture, placement: str) -> int:
    """Trainable numbers of an adapter for each unit of rank: layers · Σ (in + out)."""
    return shape.lora_parameters(1, placement)


def adapter_bytes(shape: Architecture, rank: int, placement: str, width: int = 2) -> int:
    """Bytes of an adapter's numbers; width 2 is fp16, as adapters are served, 4 fp32."""
    return width * rank * module_parameters(shape, placement)


def matched_rank(shape: Architecture, placement: str, rank: int, of: str = "all") -> int:
    """The rank at which `placement` has most nearly the parameters that `of` has at `rank`."""
    wanted = rank * module_parameters(shape, of)
    return max(1, round(wanted / module_parameters(shape, placement)))


def largest_rank(shape: Architecture, placement: str, budget: float, width: int = 2) -> int:
    """The largest rank whose adapter stays within `budget` bytes; 0 where not even rank 1 does. No
    larger than the narrowest layer it sits on: a rank above that says nothing more."""
    from lora_kit.architectures import check_targets

    narrow = min(min(shape.linear_shapes()[t]) for t in check_targets(placement))
    return min(narrow, int(budget // adapter_bytes(shape, 1, placement, width)))


MEGABYTE = 1e6
BUDGETS = (1.0, 5.0, 20.0)  # megabytes of adapter


def size_table(shape: Architecture, budgets: Iterable[float] = BUDGETS) -> list[dict]:
    """For each budget in MB and placement: the largest rank in fp16, and what it takes."""
    rows = []
    for budget in budgets:
        for placement in PLACEMENTS:
            rank = largest_rank(shape, placement, budget * MEGABYTE)
            size = adapter_bytes(shape, rank, placement) / MEGABYTE
            rows.append(
                {
                    "MB allowed": budget,
                    "placement": placement,
                    "rank": rank,
                    "parameters": rank * module_parameters(shape, placement),
                    "MB": round(size, 2),
                }
            )
    return rows


# ------------------------------------------------------------------ the grid, in order


TASKS_AT_HAND = ("gsm8k", "code", "dialogue")
RANKS = (8, 16, 32, 64, 128)
RATES = (3e-4, 1e-3, 3e-3)  # the stated budget of tuning: three rates for every rule and rank alike


def blocks(shape: Architecture) -> dict[str, list[dict]]:
    """The study's settings, most important first; no setting stands in two blocks.

    A sweep runs all seeds of a setting before the next, so a run that is cut off leaves whole
    settings and whole blocks.
    """
    seen: set[str] = set()

    def fresh(settings: Iterable[dict]) -> list[dict]:
        found = []
        for some in settings:
            name = cell_from(some, 0).setting
            if name not in seen:
                found.append(some)
            seen.add(name)
        return found

    ends = (16, 128, 32, 8, 64)

    def tests(task: str, rank: int, place: str) -> dict:
        """HumanEval takes 1,640 programs a cell, and a small model sits on its floor: asked where
        ranks are compared on all layers, at the ends. Everything asks the held-out loss."""
        if (rank, place) == (ANCHOR, "all"):
            return {"tests": "all"}
        seldom = task == "code" and (place, rank) != ("all", 128)
        return {"tests": "loss"} if seldom else {}

    made = {
        "base": [{"part": "base", "tests": "all"}],
        "paper": fresh(
            {"task": task, "rank": rank, "placement": place, "scaling": "fixed"}
            | tests(task, rank, place)
            for rank in ends
            for task in TASKS_AT_HAND
            for place in PLACEMENTS
        ),
        "rules": fresh(
            {"task": task, "rank": rank, "placement": "all", "scaling": scaling}
            | tests(task, rank, "all")
            for task in TASKS_AT_HAND
            for rank in (128, 32, 8, 64)
            for scaling in ("constant", "stabilised")
        ),
        "rates": fresh(
            {"task": task, "rank": rank, "scaling": scaling, "learning_rate": rate, "tests": "loss"}
            for task in TASKS_AT_HAND
            for rate in (3e-3, 3e-4)
            for rank in ends
            for scaling in SCALINGS
            if rank != ANCHOR or scaling == "fixed"
        ),
        "interference": [
            *(
                {"task": GENERALIST, "rank": rank, "scaling": "constant", "tests": "all"}
                | {"rows": 5760, "steps": 360}
                for rank in (16, 48)
            ),
            {"part": "route"},
            {"part": "serve"},
            *(
                {"part": "full", "task": task, "learning_rate": 5e-5, "tests": "all"}
                for task in TASKS_AT_HAND
            ),
        ],
        "sizes": fresh(
            {"task": task, "rank": rank, "placement": place, "scaling": "stabilised"}
            | tests(task, rank, place)
            for task in TASKS_AT_HAND
            for place, rank in _sized(shape)
        ),
        "placements under the other rules": fresh(
            {"task": task, "rank": rank, "placement": place, "scaling": scaling}
            | tests(task, rank, place)
            for scaling in ("constant", "stabilised")
            for rank in (128, 32, 8, 64)
            for task in TASKS_AT_HAND
            for place in ("attention", "mlp")
        ),
    }
    return made


def _sized(shape: Architecture) -> list[tuple[str, int]]:
    """Placements whose parameters match: to the budgets in MB, and to rank 16 and 64 on all."""
    found = [(r["placement"], r["rank"]) for r in size_table(shape)]
    found += [(p, matched_rank(shape, p, rank)) for rank in (16, 64) for p in ("attention", "mlp")]
    return list(dict.fromkeys(found))


def grid_cells(shape: Architecture, seeds: Sequence[int]) -> list[Cell]:
    """Every cell of `blocks`, all seeds of a setting before the next."""
    return [
        cell_from(some, seed)
        for settings in blocks(shape).values()
        for some in settings
        for seed in seeds
    ]


# The paper's own protocol, as it is printed: what is varied for which task, and by which model.
PAPER_RANKS = (16, 32, 64, 128)
PAPER_TASKS = {"code": "python", "mathematics": "math", "text": "text"}


def paper_cells(model: str = "llama-3.2-1b-instruct", seed: int = 0) -> list[Cell]:
    """saha2024's grid for one model: code on all layers, mathematics on all layers (section 4.2.3),
    text on each of three placements; ranks 16 to 128, α = 16; five completions in mathematics, ten
    in code, every test whole. Steps, batch and rate are not printed (`train.papers`, "saha")."""
    from lora_kit.train.recipes import recipe

    spec = recipe("saha")
    common = Cell(
        model=model,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        max_length=spec.max_length,
        steps=0,
        limit=0,
        seed=seed,
    )
    settings = [("python", "all", 1, 14_500), ("math", "all", 5, 12_500)]
    settings += [("text", place, 1, 3_300) for place in PLACEMENTS]
    return [
        replace(common, task=task, placement=place, completions=n, rows=rows, rank=rank)
        for task, place, n, rows in settings
        for rank in PAPER_RANKS
    ]
