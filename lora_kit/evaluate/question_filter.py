"""Multiple-choice questions that somebody wrote: read, checked, and sifted.

A teacher's questions are filtered in the paper's three ways (Alwadhi 2024, section 4.1: "semantic
relevance scoring, redundancy elimination, and retaining only solvable questions"; how, it does not
say) and one of ours:

    well formed   a question, four options that differ, one of them marked as right
    distinct      no near copy of a question kept before
    apart         no near copy of a question to be tested on: that would be leakage
    relevant      near enough to known questions of the subject, by all-MiniLM-L6-v2's embedding
    solvable      whoever solves it blindly (the teacher, asked again) comes to the marked answer
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_kit.errors import BadInputError

OPTIONS = "ABCD"
REASONS = ("malformed", "duplicate", "test question", "irrelevant", "unsolvable")
NEAR_COPY = 0.95  # cosine of embeddings
RELEVANT_SHARE = 0.05  # of known questions that the relevance threshold would refuse


@dataclass(frozen=True)
class Question:
    """A question with four options; `answer` is the right one's index."""

    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int

    @property
    def letter(self) -> str:
        return OPTIONS[self.answer]

    @property
    def text(self) -> str:
        """The question and its options, for reading and embedding."""
        listed = zip(OPTIONS, self.choices, strict=True)
        return "\n".join([self.question, *(f"{o}. {c}" for o, c in listed)])

    def to_row(self) -> dict:
        """As MMLU's rows are."""
        return {
            "subject": self.subject,
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.answer,
        }


def from_row(row: Mapping) -> Question:
    """A question from a row of MMLU.

    Raises:
        BadInputError: another shape.
    """
    try:
        choices = tuple(str(c).strip() for c in row["choices"])
        made = Question(row["subject"], str(row["question"]).strip(), choices, int(row["answer"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"This row is no multiple-choice question: {error!r}.") from None
    if len(choices) != 4 or made.answer not in range(4):
        raise BadInputError("A question needs four choices and an answer from 0 to 3.")
    return made


def read_question(text: str, subject: str) -> Question | None:
    """The question in a teacher's reply; None where there is none that is well formed.

    The reply holds a JSON object {"question", "choices": [four], "answer": "A" … "D"}, perhaps with
    words or a fence around it.
    """
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        said = json.loads(found.group()) if found else None
        question = said["question"].strip()
        choices = tuple(re.sub(r"^[A-D][.):]\s+", "", str(c)).strip() for c in said["choices"])
        letter = str(said["answer"]).strip()[:1].upper()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
    plain = {_plain(c) for c in choices}
    if len(question) < 10 or len(choices) != 4 or len(plain) != 4 or "" in plain:
        return None
    if not letter or letter not in OPTIONS:
        return None
    return Question(subject, question, choices, OPTIONS.index(letter))


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w+\-*/=<>.%]", " ", text.lower()).split())


# ------------------------------------------------------------------ the sieve


@dataclass(frozen=True)
class Sifted:
    """What was kept, in order, and what was dropped: (text, reason of REASONS, number or None)."""

    kept: tuple[Question, ...]
    dropped: tuple[tuple[str, str, float | None], ...] = field(repr=False)
    threshold: float | None = None

    def rows(self) -> list[dict]:
        """A table: how many came, and how many each check took."""
        counts = Counter(reason for _, reason, _ in self.dropped)
        total = len(self.kept) + len(self.dropped)
        table, left = [{"check": "came in", "dropped": 0, "left": total}], total
        for reason in REASONS:
            left -= counts[reason]
            table.append({"check": f"not {reason}", "dropped": counts[reason], "left": left})
        return table


def embed(texts: Sequence[str], encoder=None, batch_size: int = 32):
    """Unit embeddings of texts, (n, 384): the mean of all-MiniLM-L6-v2's token states, as its card
    says. Texts beyond 512 tokens are cut."""
    import torch

    from lora_kit.models import load_encoder

    loaded = encoder or load_encoder()
    found = []
    for start in range(0, len(texts), batch_size):
        inputs = loaded.tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=loaded.model.config.max_position_embeddings,
            return_tensors="pt",
        ).to(loaded.model.device)
        with torch.inference_mode():
            states = loaded.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        found.append(((states * mask).sum(1) / mask.sum(1)).float().cpu())
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def relevance(vectors, reference):
    """Mean cosine of each vector with its three nearest reference vectors, (n,)."""
    near = (vectors @ reference.T).topk(min(3, len(reference)), dim=1).values
    return near.mean(1)


def relevance_threshold(reference, share: float = RELEVANT_SHARE) -> float:
    """The relevance that all but a `share` of the reference questions reach, each against the
    others.

    Raises:
        BadInputError: fewer than four to learn it from.
    """
    if len(reference) < 4:
        raise BadInputError(
            f"{len(reference)} known questions are too few to say what is relevant; give four."
        )
    similar = reference @ reference.T
    similar.fill_diagonal_(-2)
    nearest = similar.topk(3, dim=1).values.mean(1)
    return float(nearest.quantile(share))


def sift(
    questions: Sequence[Question | str],
    reference: Sequence[Question],
    avoid: Sequence[Question] = (),
    solve: Callable[[Sequence[Question]], Sequence[str]] | None = None,
    threshold: float | None = None,
    encoder=None,
) -> Sifted:
    """Keep the questions worth training on.

    Args:
        questions: read ones, or the texts that could not be read (dropped as malformed).
        reference: known questions of the subject (MMLU's dev rows): what is relevant.
        avoid: questions to be tested on; near copies are dropped.
        solve: gives a letter for each question, without seeing the marked one; None leaves the
            check out.
        threshold: of relevance; `relevance_threshold(reference)` by default.
    """
    dropped: list[tuple[str, str, float | None]] = []
    read = [q for q in questions if isinstance(q, Question)]
    dropped += [(q, "malformed", None) for q in questions if not isinstance(q, Question)]
    if not read:
        return Sifted((), tuple(dropped), threshold)
    known = embed([q.text for q in reference], encoder)
    tested = embed([q.text for q in avoid], encoder) if avoid else None
    if threshold is None:
        threshold = relevance_threshold(known)
    vectors = embed([q.text for q in read], encoder)
    near = relevance(vectors, known)
    kept: list[int] = []
    for i, question in enumerate(read):
        copy = max((float(vectors[i] @ vectors[j]) for j in kept), default=0.0)
        leak = float((tested @ vectors[i]).max()) if tested is not None else 0.0
        if copy >= NEAR_COPY:
            dropped.append((question.text, "duplicate", copy))
        elif leak >= NEAR_COPY:
            dropped.append((question.text, "test question", leak))
        elif float(near[i]) < threshold:
            dropped.append((question.text, "irrelevant", float(near[i])))
        else:
            kept.append(i)
    good = [read[i] for i in kept]
    if solve is not None and good:
        letters = solve(good)
        dropped += [
            (q.text, "unsolvable", None)
            for q, letter in zip(good, letters, strict=True)
            if letter != q.letter
        ]
        good = [q for q, letter in zip(good, letters, strict=True) if letter == q.letter]
    return Sifted(tuple(good), tuple(dropped), threshold)
