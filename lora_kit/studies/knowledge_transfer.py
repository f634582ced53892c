"""Knowledge from a teacher: the two pipelines of Alwadhi 2024 (Algorithms 1 and 2), end to end.

    general    the teacher writes questions on a subject; they are sifted; the student learns them
    targeted   teacher and student answer the test questions; where only the teacher is right, it
               writes a new question on the same knowledge; sifted; the student learns those

Every stage leaves a file in the run's folder and is not done again: the teacher's answers
(`answers.jsonl`, appended one by one), the questions kept (`questions.json`), the adapter, the
scores. What asking costs is estimated first, and refused above a limit.

Where the paper says two things, or nothing, we chose. Its Algorithm 2 takes every question on which
teacher and student *differ*, its text those that only the teacher gets right: the second, here. It
fine-tunes inside the loop, after each question: here once, on all. The targeted
pipeline reads the test set, as the paper says of itself: its scores there carry leakage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_kit import store
from lora_kit.data import Dataset, load_rows
from lora_kit.errors import BadInputError, unknown_name
from lora_kit.evaluate.question_filter import (
    OPTIONS,
    Question,
    Sifted,
    from_row,
    read_question,
    sift,
)
from lora_kit.studies.records import Record, new_record
from lora_kit.teacher import AnswerLog, Cost, Teacher, ask_all, check_budget, estimate_cost

STUDY = "10_mmlu"
FOLDER = "10_arithmetic/mmlu"  # of the records, under data/results
PIPELINES = ("general", "targeted")
SUBJECTS = ("machine_learning", "professional_psychology")
# What a question may turn on, taken in turn, so that a hundred requests are not one request.
ANGLES = (
    "the meaning of a term",
    "an application to a described case",
    "a comparison of two methods or theories",
    "a small calculation or derivation",
    "a common misunderstanding",
    "the cause of an observed effect",
    "the limits of a method or theory",
    "what follows from a stated assumption",
)
FORMAT = (
    'Reply with one JSON object and nothing else: {"question": "...", "choices": ["...", "...", '
    '"...", "..."], "answer": "A"}, where "answer" is the letter of the one right choice.'
)


def title(subject: str) -> str:
    """A subject as people write it."""
    return subject.replace("_", " ")


def ask_prompt(question: Question) -> str:
    """How a question is put to teacher and student (after listing 1, in other words)."""
    return (
        f"This is an exam in {title(question.subject)}. Choose the right answer and give its "
        f"letter only.\n\n{question.text}\nAnswer:"
    )


def general_prompts(subject: str, n: int) -> list[str]:
    """n requests for a new question each, from easy to hard (after listing 2, in other words)."""
    return [
        f"You write exam questions from which a small language model will learn "
        f"{title(subject)}. Write question {i + 1} of {n}: multiple choice, four choices, exactly "
        f"one right. Difficulty: {1 + 9 * i // max(n - 1, 1)} on a scale from 1 (a first course) "
        f"to 10 (an expert). It should turn on {ANGLES[i % len(ANGLES)]}, and be understood "
        f"without any other text. {FORMAT}"
        for i in range(n)
    ]


def targeted_prompt(question: Question) -> str:
    """A request for a sister of a question the student missed (after listing 3, in our words)."""
    return (
        "A small language model answered the exam question below wrongly. Think of the knowledge "
        "or the reasoning that it takes. Then write another question that takes the same, so that "
        "whoever can answer yours can answer this one. Keep every fact that this one states. Four "
        f"choices, exactly one right. {FORMAT}\n\n{question.text}\nRight answer: {question.letter}"
    )


def read_letter(text: str) -> str:
    """The letter a reply chooses; "" where it chooses none."""
    found = re.search(r"\b([A-D])\b", text.strip())
    return found.group(1) if found else ""


# ------------------------------------------------------------------ the student


def student_letters(model, tokenizer, questions: Sequence[Question], batch_size: int = 0) -> list:
    """The letter whose token the model finds likeliest after `ask_prompt`, for each question."""
    import torch

    from lora_kit.prompts import prompt_ids

    batch_size = batch_size or (64 if model.device.type == "cuda" else 8)
    letters = [tokenizer(f" {o}", add_special_tokens=False)["input_ids"][-1] for o in OPTIONS]
    prompts = [prompt_ids(tokenizer, ask_prompt(q)) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    dtype = model.get_input_embeddings().weight.dtype
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [prompts[i] for i in rows]}, return_tensors="pt", padding_side="left"
        ).to(model.device)
        half = torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), half:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1, letters]
        for i, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
            found[i] = OPTIONS[best]
    return found


def training_rows(questions: Sequence[Question], name: str) -> Dataset:
    """Questions as the student is asked them, with the letter as the answer."""
    rows = tuple({"prompt": ask_prompt(q), "completion": f" {q.letter}"} for q in questions)
    return Dataset(name, "train", rows, "generated", store.sha256_json(list(rows))[:16])


def mmlu_questions(subject: str, split: str) -> list[Question]:
    """MMLU's questions of a subject.

    Raises:
        UnknownNameError: a subject without rows; and what `load_rows` raises.
    """
    rows = load_rows("mmlu", split).rows
    found = [from_row(row) for row in rows if row["subject"] == subject]
    if not found:
        raise unknown_name("subject of MMLU", subject, {row["subject"] for row in rows})
    return found


# ------------------------------------------------------------------ the pipelines


@dataclass(frozen=True)
class Plan:
    """One run. price_in, price_out: for a million tokens; most_money: refuse beyond. epochs: the
    paper's 1. rank and the rest: recipe "alwadhi"."""

    pipeline: str = "general"
    subject: str = SUBJECTS[0]
    student: str = "smollm2-135m-instruct"
    questions: int = 200
    test_rows: int = 0  # of each subject; 0 for all
    price_in: float = 0.0
    price_out: float = 0.0
    most_money: float = 5.0
    check_solvable: bool = True
    quantization: str = "nf4"
    learning_rate: float = 2e-4
    epochs: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pipeline not in PIPELINES:
            raise BadInputError(f"pipeline must be one of {', '.join(PIPELINES)}.")
        if self.questions < 1 or self.test_rows < 0:
            raise BadInputError("questions must be at least 1, test_rows 0 or more.")


def wanted_prompts(plan: Plan, gaps: Sequence[Question] = ()) -> list[str]:
    """The requests for new questions."""
    if plan.pipeline == "general":
        return general_prompts(plan.subject, plan.questions)
    return [targeted_prompt(q) for q in gaps][: plan.questions]


def knowledge_gaps(
    questions: Sequence[Question], teacher: Sequence[str], student: Sequence[str]
) -> list[Question]:
    """The questions that the teacher answers rightly and the student does not."""
    return [
        q
        for q, t, s in zip(questions, teacher, student, strict=True)
        if t == q.letter and s != q.letter
    ]


def expected_cost(plan: Plan, teacher: Teacher, folder: Path, test: Sequence[Question]) -> Cost:
    """What a run would cost at most, before any call: the requests, for "targeted" the teacher's
    own answers and one request for each test question, and one blind solution a question."""
    log = AnswerLog(Path(folder) / "answers.jsonl")
    prompts = wanted_prompts(plan, list(test))
    costs = [(prompts, 400)]
    if plan.pipeline == "targeted":
        costs.append(([ask_prompt(q) for q in test], 8))
    if plan.check_solvable:
        costs.append((["x" * 600] * len(prompts), 8))
    found = [
        estimate_cost(teacher, some, log, plan.price_in, plan.price_out, tokens)
        for some, tokens in costs
    ]
    return Cost(
        sum(c.calls for c in found),
        sum(c.prompt_tokens for c in found),
        sum(c.answer_tokens for c in found),
        sum(c.money for c in found),
    )


def run_pipeline(
    plan: Plan,
    teacher: Teacher,
    folder: Path,
    test: dict[str, Sequence[Question]] | None = None,
    reference: Sequence[Question] | None = None,
    say: Callable[[str], None] = print,
    encoder=None,
    **changes: Any,
) -> Record:
    """Run a pipeline; the same call carries on where one was cut off.

    Args:
        plan: what is to be done.
        teacher: who writes the questions.
        folder: the run's own.
        test: questions of each subject; MMLU's test rows by default.
        reference: known questions of the subject for the filter; MMLU's dev rows by default.
        changes: of the training recipe (`steps`, `batch_size`, …).

    Returns:
        A record: accuracy before and after on each subject, paired; how many questions came, and
        how many each check of the filter took.

    Raises:
        BadInputError: it would cost more than `plan.most_money`, or no question is left; and what
            the teacher raises.
    """
    from lora_kit.lora import load_lora
    from lora_kit.models import load_model
    from lora_kit.studies.leakage_cells import paired_scores
    from lora_kit.train.finetune import finetune
    from lora_kit.train.recipes import recipe

    folder = Path(folder)
    test = test or {
        subject: mmlu_questions(subject, "test")[: plan.test_rows or None] for subject in SUBJECTS
    }
    reference = reference or mmlu_questions(plan.subject, "dev")
    cost = expected_cost(plan, teacher, folder, test[plan.subject])
    say(f"at most {cost}")
    check_budget(cost, plan.most_money)
    loaded = load_model(plan.student, quantization=plan.quantization)
    before = {s: student_letters(loaded.model, loaded.tokenizer, qs) for s, qs in test.items()}
    log = AnswerLog(folder / "answers.jsonl")
    gaps: list[Question] = []
    if plan.pipeline == "targeted":
        asked = [ask_prompt(q) for q in test[plan.subject]]
        right = [read_letter(text) for text in ask_all(teacher, asked, log, say)]
        gaps = knowledge_gaps(test[plan.subject], right, before[plan.subject])
        say(f"{len(gaps)} of {len(asked)} questions only the teacher answers rightly")
    sifted = new_questions(plan, teacher, log, gaps, reference, test, say, encoder)
    store.write_json(folder / "questions.json", [q.to_row() for q in sifted.kept])
    if not sifted.kept:
        raise BadInputError("The filter left no question to learn from: look at answers.jsonl.")
    spec = replace(
        recipe("alwadhi", seed=plan.seed, quantization=plan.quantization, epochs=plan.epochs),
        learning_rate=plan.learning_rate,
        **changes,
    )
    rows = training_rows(sifted.kept, f"{plan.pipeline}-{plan.subject}")
    made = finetune(plan.student, rows, spec, output=folder / "adapter", engine="native")
    load_lora(loaded.model, made.adapter)
    after = {s: student_letters(loaded.model, loaded.tokenizer, qs) for s, qs in test.items()}
    metrics, items = paired_scores(test, before, after)
    answered = list(log.answers.values())
    return new_record(
        STUDY,
        "lora_kit.studies.knowledge_transfer.run_pipeline",
        parameters={
            "part": "transfer",
            "teacher": teacher.name,
            **{k: getattr(plan, k) for k in plan.__dataclass_fields__},
            "leakage": plan.pipeline == "targeted",
        },
        metrics=metrics
        | {"questions_kept": float(len(sifted.kept)), "gaps": float(len(gaps))}
        | {"teacher_tokens_read": float(sum(a["prompt_tokens"] for a in answered))}
        | {"teacher_tokens_written": float(sum(a["answer_tokens"] for a in answered))},
        tables={"filter": sifted.rows(), "items": items},
        seed=plan.seed,
        seconds=made.seconds,
        peak_memory_bytes=made.peak_memory,
        model=loaded.record(),
        data=rows.record(),
    )


def new_questions(plan, teacher, log, gaps, reference, test, say, encoder=None) -> Sifted:
    """The teacher's new questions, sifted. Near copies of test questions are dropped from the
    general pipeline; a targeted question is meant to be near one, and only copies go there too."""

    def solve(questions: Sequence[Question]) -> list[str]:
        prompts = [ask_prompt(q) for q in questions]
        return [read_letter(text) for text in ask_all(teacher, prompts, log, say)]

    replies = ask_all(teacher, wanted_prompts(plan, gaps), log, say)
    read = [read_question(text, plan.subject) or text for text in replies]
    return sift(
        read,
        reference,
        avoid=[q for some in test.values() for q in some],
        solve=solve if plan.check_solvable else None,
        encoder=encoder,
    )
