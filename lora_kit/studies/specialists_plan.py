"""What a cell will take, before it runs: memory by the planner, minutes by arithmetic.

Minutes are of three parts, each stated: training (4 FLOP a weight and token, at the share of the
card's speed that `benchmarks/training.py` measured), answers (each step of a batch of answers costs
as long as launching its kernels, or as reading the weights where that is longer), and loading.
Expect them within a factor of two; memory within what the planner's own record shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_kit.architectures import Architecture
from lora_kit.memory import GIB, GPUS, plan_memory
from lora_kit.studies.specialists import Cell
from lora_kit.studies.specialists_tasks import AT_HAND, TESTS, known_task, tests_of

# TFLOP/s a large fp16 product reaches, and GB/s of memory: a T4 as Colab's run (its data sheet has
# 65 and 320), others as their data sheets, halved.
SPEED = {"t4": (25e12, 250e9), "h100": (400e12, 2000e9), "a100-80gb": (150e12, 1200e9)}
TOKENS_A_ROW = {"gsm8k": 200, "code": 150, "dialogue": 240, "words": 95, "sums": 60}
TOKENS_A_ROW |= {"python": 150, "math": 330, "text": 330, "all": 200}
ITEMS = {"gsm8k": 1319, "words": 200, "sums": 200, "humaneval": 164, "dialogue": 500}
ITEMS |= {"news": 13_368, "hellaswag": 10_042}
PROMPT_TOKENS = {"gsm8k": 110, "words": 55, "sums": 35, "humaneval": 150, "dialogue": 220}
PROMPT_TOKENS |= {"news": 900, "hellaswag": 190}
LAUNCH_SECONDS = 0.0007  # a layer and step of answers: its kernels' launches
LOAD_SECONDS = 15.0
SANDBOX_SECONDS = 0.03  # a program, on sixteen cores
ANSWERS_AT_ONCE = 256


@dataclass(frozen=True)
class CellPlan:
    """bytes of the smallest way to run the cell (one row at once, checkpointing), and of the way
    it will run; minutes of training and of the tests."""

    cell: Cell
    least: int
    planned: int
    rows_at_once: int
    training_minutes: float
    test_minutes: float

    @property
    def fits(self) -> bool:
        return self.least <= GPUS[self.cell.gpu] * GIB

    def row(self) -> dict:
        """One line of a table."""
        return {
            "cell": self.cell.setting,
            "GiB at least": round(self.least / GIB, 1),
            "GiB as run": round(self.planned / GIB, 1) if self.fits else "does not fit",
            "rows at once": self.rows_at_once,
            "minutes training": round(self.training_minutes, 1),
            "minutes tests": round(self.test_minutes, 1),
        }


def plan_cell(cell: Cell, shape: Architecture) -> CellPlan:
    """Plan one cell for the card it names.

    Raises:
        UnknownNameError: no such card, task or test.
    """
    plans = {}
    for checkpointing in (True, False):
        plans[checkpointing] = _memory(cell, shape, checkpointing)
    rows = max(1, min(cell.batch_size, plans[False].largest_batch))
    run = _memory(cell, shape, False, rows)
    if plans[False].largest_batch < cell.batch_size / 4:
        rows = max(1, min(cell.batch_size, plans[True].largest_batch))
        run = _memory(cell, shape, True, rows)
    return CellPlan(
        cell,
        plans[True].total_bytes,
        run.total_bytes,
        rows,
        _training_seconds(cell, shape, rows) / 60,
        sum(_test_seconds(cell, shape, name) for name in _asked(cell)) / 60,
    )


def _memory(cell: Cell, shape: Architecture, checkpointing: bool, batch: int = 1):
    full = cell.part == "full"
    return plan_memory(
        shape,
        rank=0 if full else cell.rank,
        targets="all-linear" if full else cell.placement,
        batch=batch,
        seq=min(cell.max_length, shape.max_position),
        dtype="float32" if full else "float16",
        quantization=None,
        checkpointing=checkpointing,
        gpu=cell.gpu,
        engine="native",
    )


def why_not(cell: Cell, shape: Architecture) -> str | None:
    """Why a cell cannot be run on its card, in one sentence with the planner's figures; None where
    it can. Cells that train nothing always can: 16-bit weights of every model here fit a T4."""
    if cell.part not in ("tune", "full"):
        return None
    plan = _memory(cell, shape, True)
    if plan.total_bytes <= plan.gpu_bytes:
        return None
    what = "all weights in float32" if cell.part == "full" else f"rank {cell.rank}"
    on = "" if cell.part == "full" else f" on {cell.placement}"
    return (
        f"{shape.name}, {what}{on}, one row of {cell.max_length} tokens with checkpointing: "
        f"{plan.total_bytes / GIB:.1f} GiB planned, {cell.gpu} has {plan.gpu_bytes / GIB:.1f}."
    )


def _asked(cell: Cell) -> Iterable[str]:
    if cell.part in ("route", "serve"):
        return ()
    if cell.part == "base" or cell.tests == "all":  # wherever it is planned, as if all were there
        own = known_task(cell.task).tests if cell.task != "all" and cell.part != "base" else ()
        return dict.fromkeys([*own, *AT_HAND])
    return tests_of(cell.task, cell.tests)


def _training_seconds(cell: Cell, shape: Architecture, rows_at_once: int) -> float:
    from lora_kit.train.report import EFFICIENCY, LAYER_SECONDS

    if cell.part not in ("tune", "full"):
        return LOAD_SECONDS
    speed, _ = SPEED.get(cell.gpu, SPEED["t4"])
    steps = cell.steps or -(-cell.rows // cell.batch_size)
    tokens = min(cell.max_length, TOKENS_A_ROW.get(cell.task, 200)) * cell.batch_size * steps
    flop = (6 if cell.part == "full" else 4) * shape.num_parameters * tokens
    parts = -(-cell.batch_size // rows_at_once)
    launches = LAYER_SECONDS["native"] * shape.num_layers * parts * steps
    return flop / (speed * EFFICIENCY["cuda"]) + launches + LOAD_SECONDS


def _test_seconds(cell: Cell, shape: Architecture, name: str) -> float:
    speed, memory = SPEED.get(cell.gpu, SPEED["t4"])
    test, limit = TESTS[name], cell.limit * (4 if name == "hellaswag" else 1)
    items = min(ITEMS[name], limit or ITEMS[name])
    each = {"code": cell.programs, "number": cell.completions}.get(test.judge, 1)
    reading = 2 * shape.num_parameters * items * each * PROMPT_TOKENS[name] / (speed * 0.4)
    step = max(LAUNCH_SECONDS * shape.num_layers, 2 * shape.num_parameters / memory)
    step += ANSWERS_AT_ONCE * 2 * shape.num_parameters / speed
    batches = -(-items * each // ANSWERS_AT_ONCE)
    judging = SANDBOX_SECONDS * items * each if test.judge == "code" else 0.0
    return reading + batches * test.tokens * step + judging


# ------------------------------------------------------------------ the sweep's grid files

SWEEP = "lora-kit sweep specialists --grid benchmarks/grids/{}"
H100_JOBS = 8


def grid_text(shape: Architecture) -> dict[str, str]:
    """The sweep's grid files, by name: the study on one GPU held to T4 rules, and a quick one that
    goes the same road on a CPU. Each block's comment says what the planner expects of it."""
    from lora_kit.studies.specialists import blocks, cell_from

    lines = [
        "# The specialists study, most important settings first: a sweep that is cut off leaves",
        "# whole settings, each with all its seeds. On one GPU held to T4 rules:",
        f"#   LORA_KIT_T4_RULES=1 {SWEEP.format('specialists.yaml')} \\",
        f"#     --seeds 3 --jobs {H100_JOBS} --budget 540 \\",
        "#     -o data/results/07_specialists --work runs/specialists",
        "# The same command carries on. Where there is no sandbox the programs are kept unjudged:",
        "#   python benchmarks/specialists.py --rescore runs/specialists --into \\",
        "#     data/results/07_specialists",
        "# Minutes: of one process that has the GPU to itself, three seeds, estimated by",
        "# `specialists_plan`, within a factor of two. Fourteen processes on one H200, under MPS,",
        "# made 57 runs of the blocks paper and rules in 350 s. HumanEval takes cores besides. All",
        "# of it has been run: 236 settings, 708 runs, on H200s held to T4 rules, two on an H100.",
    ]
    whole = 0.0
    for name, settings in blocks(shape).items():
        plans = [plan_cell(cell_from({**s, "gpu": "h100"}, 0), shape) for s in settings]
        minutes = 3 * sum(p.training_minutes + p.test_minutes for p in plans)
        whole += minutes
        lines += ["", f"# {name}: {len(settings)} settings, {minutes:.0f} process-minutes"]
        lines += [f"- {_yaml(s)}" for s in settings]
    lines.insert(12, f"# Sum: {whole:.0f} process-minutes.")
    quick = [
        "# The same road on a CPU in a few minutes, generated rows only; no numbers of interest:",
        f"#   {SWEEP.format('specialists_quick.yaml')} --seeds 1 -o runs/specialists_quick",
    ]
    small = {"task": "sums", "rows": 16, "steps": 2, "batch_size": 4, "heldout": 4, "limit": 2}
    small |= {"max_length": 128}
    for rank, scaling in ((8, "fixed"), (8, "stabilised")):
        quick.append(f"- {_yaml({**small, 'rank': rank, 'scaling': scaling})}")
    texts = {"specialists.yaml": lines, "specialists_quick.yaml": quick}
    for model in ("llama-3.2-1b", "qwen2.5-1.5b", "llama-3.2-3b"):
        texts[f"saha2024_{model}.yaml"] = _paper_lines(model)
    return {name: "\n".join(some) + "\n" for name, some in texts.items()}


def _paper_lines(model: str) -> list[str]:
    """saha2024's own grid for one model as a sweep's settings, each with what it should take."""
    from lora_kit.architectures import architecture
    from lora_kit.studies.specialists import DEFAULTS, paper_cells

    cells = paper_cells(f"{model}-instruct")
    plans = [plan_cell(cell, architecture(model)) for cell in cells]
    training, tests = (sum(getattr(p, f"{n}_minutes") for p in plans) for n in ("training", "test"))
    lines = [
        f"# saha2024's grid for {model}-instruct on a T4, from the hub: code, mathematics, text.",
        f"#   {SWEEP.format(f'saha2024_{model}.yaml')} --seeds 1 -o runs/saha2024_{model}",
        f"# Planned for one seed: {training:.0f} minutes of training, {tests:.0f} of tests (all of",
        "# HumanEval, ten programs a problem; of GSM8K, five completions; of CNN/DailyMail's",
        "# validation rows and HellaSwag). A cell that would not fit is skipped with the reason.",
    ]
    for cell, plan in zip(cells, plans, strict=True):
        row = plan.row()
        told = {k: v for k, v in cell.to_dict().items() if v != DEFAULTS.get(k) and k != "seed"}
        minutes = plan.training_minutes + plan.test_minutes
        lines.append(f"# {row['GiB as run']} GiB, {minutes:.0f} minutes")
        lines.append(f"- {_yaml(told)}")
    return lines


def _yaml(setting: dict) -> str:
    def word(value) -> str:
        # YAML 1.1 takes 1e-3 for a text; 0.001 and 1.0e-3 are numbers.
        return f"{value:.1e}" if isinstance(value, float) else str(value)

    return "{" + ", ".join(f"{k}: {word(v)}" for k, v in setting.items()) + "}"
