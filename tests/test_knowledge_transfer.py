"""From a teacher's questions to a tuned student, with a scripted teacher and a tiny student."""

import json
import types

import pytest
import torch

from lora_kit.errors import BadInputError, NotAvailableError, UnknownNameError
from lora_kit.evaluate.question_filter import (
    Question,
    from_row,
    read_question,
    relevance,
    relevance_threshold,
    sift,
)
from lora_kit.studies.knowledge_transfer import (
    Plan,
    ask_prompt,
    expected_cost,
    general_prompts,
    knowledge_gaps,
    mmlu_questions,
    read_letter,
    run_pipeline,
    student_letters,
    targeted_prompt,
)
from lora_kit.studies.leakage_cells import halves, paired_scores, run_cell, turned
from lora_kit.studies.records import read_record, write_record
from lora_kit.teacher import FileTeacher, Reply

WORDS = "gradient tree kernel layer loss margin prior cluster vector bias".split()


def question(i, subject="machine_learning", answer=None):
    word = WORDS[i % len(WORDS)]
    choices = tuple(f"{word} {n} of {i}" for n in ("one", "two", "three", "four"))
    return Question(
        subject, f"What is the {word} number {i} for?", choices, i % 4 if answer is None else answer
    )


def reply(q):
    body = {"question": q.question, "choices": list(q.choices), "answer": q.letter}
    return f"Here you are:\n```json\n{json.dumps(body)}\n```"


@pytest.fixture
def encoder():
    """Embeds a text as counts of its words, hashed: texts alike in words are alike."""
    width = 64

    class Tokenizer:
        def __call__(self, texts, **_):
            rows = [[1 + hash_of(w) for w in t.lower().split()] for t in texts]
            longest = max(map(len, rows))
            ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
            return Inputs(input_ids=ids, attention_mask=(ids > 0).long())

    class Inputs(dict):
        def to(self, _):
            return self

    class Model:
        config = types.SimpleNamespace(max_position_embeddings=512)
        device = "cpu"
        table = torch.nn.functional.normalize(
            torch.randn(1000, width, generator=torch.Generator().manual_seed(0)), dim=1
        )

        def __call__(self, input_ids, attention_mask):
            return types.SimpleNamespace(last_hidden_state=self.table[input_ids])

    def hash_of(word):
        return sum(ord(c) * 31**i for i, c in enumerate(word)) % 990

    return types.SimpleNamespace(model=Model(), tokenizer=Tokenizer())


class Teacher:
    """Writes question i for request i; solves everything rightly but what is in `wrong`."""

    name = "scripted"

    def __init__(self, known, wrong=()):
        self.known = {ask_prompt(q): q for q in known}
        self.wrong, self.asked, self.written = set(wrong), [], 100

    def ask(self, prompt):
        self.asked.append(prompt)
        if prompt in self.known:
            q = self.known[prompt]
            return Reply("The answer is " + ("D" if q.question in self.wrong else q.letter), 5, 5)
        self.written += 1
        q = question(self.written)
        self.known[ask_prompt(q)] = q
        return Reply(reply(q), 50, 40)


# ------------------------------------------------------------------ questions


def test_questions_are_read_from_replies():
    q = question(2)
    assert read_question(reply(q), q.subject) == q
    lettered = {
        "question": q.question,
        "choices": [f"{o}. {c}" for o, c in zip("ABCD", q.choices, strict=True)],
    }
    assert read_question(json.dumps(lettered | {"answer": "c) three"}), q.subject) == q
    good = {"question": "Is this long enough?", "choices": ["a1", "b", "c", "d"], "answer": "B"}
    assert read_question(json.dumps(good), "x").answer == 1
    for broken in (
        {"answer": "E"},
        {"answer": ""},
        {"answer": None},
        {"choices": ["a", "b", "c"]},
        {"choices": ["a", "A", "b", "c"]},
        {"choices": ["a", "", "b", "c"]},
        {"choices": None},
        {"question": "Eh?"},
        {"question": None},
    ):
        assert read_question(json.dumps(good | broken), "x") is None, broken
    for text in ("", "no question", "[1, 2]", '{"question": "…'):
        assert read_question(text, "x") is None


def test_rows_of_mmlu_become_questions_and_back():
    row = {
        "subject": "machine_learning",
        "question": " Why? ",
        "choices": list("wxyz"),
        "answer": 2,
    }
    q = from_row(row)
    assert q.letter == "C"
    assert q.to_row() == row | {"question": "Why?"}
    assert turned(q).choices == ("z", "w", "x", "y")
    assert turned(q).choices[turned(q).answer] == "y"
    for wrong in ({"answer": 4}, {"choices": ["a"]}, {"question": None, "choices": 3}):
        with pytest.raises(BadInputError):
            from_row(row | wrong)


def test_the_sieve_drops_each_fault_for_its_reason(encoder):
    known = [question(i) for i in range(20)]
    alien = Question("x", "Bonjour madame le professeur", ("un", "deux", "trois", "quatre"), 0)
    tested = question(40)
    came = ["no question", question(30), question(30), tested, alien, question(31)]
    solved = {question(31).question: "D" if question(31).letter != "D" else "A"}
    found = sift(
        came, known, avoid=[tested], encoder=encoder,
        solve=lambda qs: [solved.get(q.question, q.letter) for q in qs],
    )  # fmt: skip
    assert found.kept == (question(30),)
    reasons = [reason for _, reason, _ in found.dropped]
    assert reasons == ["malformed", "duplicate", "test question", "irrelevant", "unsolvable"]
    assert [row["left"] for row in found.rows()] == [6, 5, 4, 3, 2, 1]
    assert sift(["nothing"], known, encoder=encoder).kept == ()


def test_threshold_lets_the_known_questions_pass():
    vectors = torch.nn.functional.normalize(
        torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    threshold = relevance_threshold(vectors, share=0.1)
    others = [
        relevance(vectors[i : i + 1], torch.cat([vectors[:i], vectors[i + 1 :]])) for i in range(40)
    ]
    assert sum(float(o) < threshold for o in others) == 4
    with pytest.raises(BadInputError, match="too few"):
        relevance_threshold(vectors[:3])


# ------------------------------------------------------------------ pipelines


def test_prompts_differ_and_say_what_they_must():
    prompts = general_prompts("professional_psychology", 40)
    assert len(set(prompts)) == 40
    assert all("professional psychology" in p for p in prompts)
    assert "scale from 1 " in prompts[0]
    assert "Difficulty: 1 " in prompts[0]
    assert "Difficulty: 10 " in prompts[-1]
    told = targeted_prompt(question(1))
    assert question(1).text in told
    assert "Right answer: B" in told
    assert read_letter("I choose B, not C.") == "B"
    assert read_letter("banana") == ""


def test_gaps_are_what_only_the_teacher_knows():
    asked = [question(i, answer=0) for i in range(4)]
    assert knowledge_gaps(asked, ["A", "A", "B", "B"], ["A", "B", "A", "C"]) == [asked[1]]


def test_student_letters_are_the_likeliest(tiny):
    asked = [question(i) for i in range(5)]
    found = student_letters(tiny.model, tiny.tokenizer, asked, batch_size=2)
    for q, letter in zip(asked, found, strict=True):
        ids = tiny.tokenizer(ask_prompt(q), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = tiny.model(input_ids=ids).logits[0, -1]
        letters = [
            tiny.tokenizer(f" {o}", add_special_tokens=False)["input_ids"][-1] for o in "ABCD"
        ]
        assert letter == "ABCD"[int(logits[letters].argmax())]


def small(pipeline, tiny_folder, **changes):
    return Plan(pipeline, student=str(tiny_folder), questions=6, quantization="none", **changes)


@pytest.mark.parametrize("pipeline", ["general", "targeted"])
def test_a_pipeline_from_end_to_end_and_again(pipeline, tiny_folder, tmp_path, encoder):
    test = {
        "machine_learning": [question(i) for i in range(12)],
        "professional_psychology": [question(i, "professional_psychology") for i in range(20, 26)],
    }
    reference = [question(i) for i in range(50, 70)]
    teacher = Teacher(test["machine_learning"], wrong=[question(0).question])
    plan = small(pipeline, tiny_folder)
    run = dict(test=test, reference=reference, encoder=encoder, say=lambda _: None)
    run |= dict(steps=2, batch_size=2, rank=4, alpha=4)
    record = run_pipeline(plan, teacher, tmp_path / "run", **run)
    again = read_record(write_record(record, tmp_path / "r.json"))
    assert again.parameters["leakage"] is (pipeline == "targeted")
    assert again.metrics["machine_learning_after"].n == 12
    assert again.metrics["professional_psychology_before"].n == 6
    assert 0 < again.metrics["questions_kept"] <= 6
    assert again.tables["filter"][0]["left"] <= 6
    asked = len(teacher.asked)
    repeated = run_pipeline(plan, teacher, tmp_path / "run", **run)
    assert len(teacher.asked) == asked, "a second run asks for nothing"
    assert repeated.metrics == record.metrics
    # The log is a file of answers: the same run from it alone, with no teacher.
    from_file = FileTeacher(tmp_path / "run" / "answers.jsonl", name="scripted")
    copy = run_pipeline(plan, from_file, tmp_path / "copy", **run)
    assert copy.tables == record.tables


def test_nothing_is_asked_above_the_limit(tiny_folder, tmp_path, encoder):
    test = {"machine_learning": [question(i) for i in range(4)]}
    teacher = Teacher([])
    plan = small("targeted", tiny_folder, price_in=10.0, price_out=1000.0, most_money=1.0)
    cost = expected_cost(plan, teacher, tmp_path, test["machine_learning"])
    assert cost.calls == 4 + 4 + 4
    with pytest.raises(BadInputError, match="limit"):
        run_pipeline(
            plan, teacher, tmp_path, test=test, reference=[question(9)], say=lambda _: None
        )
    assert teacher.asked == []


def test_plans_out_of_range_are_refused():
    for wrong in (dict(pipeline="both"), dict(questions=0), dict(test_rows=-1)):
        with pytest.raises(BadInputError):
            Plan(**wrong)


# ------------------------------------------------------------------ leakage


def test_halves_are_disjoint_and_keep_copies_together():
    asked = [question(i % 30) for i in range(40)]
    for seed in range(3):
        leaked, unseen = halves(asked, 0.5, seed)
        assert len(leaked) + len(unseen) == 40
        assert 20 <= len(leaked) <= 21
        assert {q.question for q in leaked} & {q.question for q in unseen} == set()
    assert halves(asked, 0.5, 0) != halves(asked, 0.5, 1)


def test_paired_scores_pair():
    test = {"some": [question(i, answer=0) for i in range(4)], "none": []}
    metrics, items = paired_scores(test, {"some": list("AABB")}, {"some": list("AAAC")})
    assert metrics["some_before"]["value"] == 0.5
    assert metrics["some_after"]["value"] == 0.75
    assert metrics["some_difference"]["value"] == pytest.approx(0.25)
    assert metrics["some_p"] == 1.0
    assert items == [{"questions": "some", "before": "1100", "after": "1110"}]


def test_a_leak_cell_trains_on_its_half_and_asks_four_groups(
    tiny_folder, tmp_path, write_rows, monkeypatch
):
    rows = [question(i).to_row() for i in range(12)]
    rows += [question(i, "professional_psychology").to_row() for i in range(12, 20)]
    write_rows(tmp_path / "data" / "mmlu" / "test.jsonl.gz", rows)
    monkeypatch.setenv("LORA_KIT_DATA", str(tmp_path / "data"))
    with pytest.raises(UnknownNameError):
        mmlu_questions("cookery", "test")
    setting = dict(model=str(tiny_folder), quantization="none", epochs=2.0, rows_a_step=6, rank=4)
    record = run_cell(setting, 0, tmp_path / "cell")
    assert record.parameters["part"] == "leakage"
    counts = {row["questions"]: len(row["after"]) for row in record.tables["items"]}
    assert counts == {"leaked": 6, "leaked, turned": 6, "unseen": 6, "other subject": 8}
    assert record.data["rows"] == 6, "only the leaked half is trained on"
    assert sum(record.metrics[f"letter_{o}"] for o in "ABCD") == pytest.approx(1)
    again = run_cell(setting, 0, tmp_path / "cell")
    assert again.tables == record.tables, "the adapter is taken from the cell's folder"
    with pytest.raises(BadInputError, match="another subject"):
        run_cell(setting | {"other": "machine_learning"}, 0, tmp_path / "cell")


def test_a_teacher_that_is_away_says_so(tiny_folder, tmp_path, encoder):
    (tmp_path / "empty.jsonl").write_text("")
    away = FileTeacher(tmp_path / "empty.jsonl")
    test = {"machine_learning": [question(i) for i in range(2)]}
    plan, known = small("general", tiny_folder), [question(i) for i in range(5)]
    with pytest.raises(NotAvailableError, match="no answer"):
        run_pipeline(plan, away, tmp_path / "run", test, known, lambda _: None, encoder)
