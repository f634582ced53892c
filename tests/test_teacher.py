"""Teachers: an endpoint on this machine that answers by a script, files of answers, and the log."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError, RunFailedError
from lora_kit.teacher import (
    AnswerLog,
    Cost,
    EndpointTeacher,
    FileTeacher,
    Reply,
    ask_all,
    check_budget,
    estimate_cost,
)

SECRET = "sk-never-to-be-seen-4711"


class Scripted:
    """A teacher in this process. stop_after: how many answers it gives before it breaks."""

    name = "scripted"

    def __init__(self, stop_after=10**9):
        self.asked, self.stop_after = [], stop_after

    def ask(self, prompt):
        if len(self.asked) == self.stop_after:
            raise NotAvailableError("The line broke.")
        self.asked.append(prompt)
        return Reply(f"{prompt}! ({len(self.asked)})", 3, 2)


@pytest.fixture
def endpoint():
    """An endpoint of OpenAI's protocol on 127.0.0.1: `endpoint.answer(prompt)` gives (status,
    text); `endpoint.seen` holds paths, authorisations and bodies."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            status, text = server.answer(body["messages"][0]["content"])
            if status == 200:
                message = {"role": "assistant", "content": text}
                said = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
                }
            else:
                said = {"error": {"message": text, "type": "error"}}
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.answer = [], lambda prompt: (200, prompt.upper())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_by_its_protocol(endpoint, monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)
    teacher = EndpointTeacher("big", endpoint.url, "SOME_KEY", temperature=0.0, most_tokens=9)
    assert teacher.ask("two") == Reply("TWO", 7, 5)
    path, authorisation, body = endpoint.seen[0]
    assert path == "/v1/chat/completions"
    assert authorisation == f"Bearer {SECRET}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.0, 9)
    assert body["messages"] == [{"role": "user", "content": "two"}]


def test_a_key_is_in_no_repr_file_or_message(endpoint, monkeypatch, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", SECRET)
    teacher = EndpointTeacher("big", endpoint.url, "SOME_KEY", retries=0)
    log = AnswerLog(tmp_path / "answers.jsonl")
    ask_all(teacher, ["two"], log)
    endpoint.answer = lambda prompt: (401, f"Incorrect API key provided: {SECRET}")
    with pytest.raises(RunFailedError, match="refused") as refusal:
        teacher.ask("three")
    assert refusal.value.__cause__ is None
    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    told = repr(teacher) + str(refusal.value) + "".join(capsys.readouterr()) + caplog.text
    assert SECRET not in told + files.decode() + repr(vars(teacher))


def test_an_endpoint_that_cannot_be_asked_says_so(endpoint, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(NotAvailableError, match="SOME_KEY is not set"):
        EndpointTeacher("big", endpoint.url, "SOME_KEY").ask("two")
    assert endpoint.seen == []
    monkeypatch.setenv("SOME_KEY", SECRET)
    away = EndpointTeacher("big", "http://127.0.0.1:9/v1", "SOME_KEY", retries=0, timeout=5)
    with pytest.raises(NotAvailableError, match="cannot be reached"):
        away.ask("two")
    endpoint.answer = lambda prompt: (200, "")
    with pytest.raises(RunFailedError, match="nothing"):
        EndpointTeacher("big", endpoint.url, "SOME_KEY").ask("two")


def test_a_refusal_is_tried_again(endpoint, monkeypatch):
    monkeypatch.setenv("SOME_KEY", SECRET)
    replies = [(500, "busy"), (200, "done")]
    endpoint.answer = lambda prompt: replies.pop(0)
    assert EndpointTeacher("big", endpoint.url, "SOME_KEY", retries=1).ask("x").text == "done"
    assert len(endpoint.seen) == 2


def test_a_broken_run_asks_for_nothing_twice(tmp_path):
    path, prompts = tmp_path / "answers.jsonl", ["a", "b", "a", "c"]
    first = Scripted(stop_after=2)
    with pytest.raises(NotAvailableError):
        ask_all(first, prompts, AnswerLog(path), say=lambda _: None)
    second = Scripted()
    said = ask_all(second, prompts, AnswerLog(path), say=lambda _: None)
    assert first.asked == ["a", "b"]
    assert second.asked == ["a", "c"], "a is asked for a second time, as the list wants it"
    assert said == ["a! (1)", "b! (2)", "a! (1)", "c! (2)"]
    third = Scripted()
    assert ask_all(third, prompts, AnswerLog(path), say=lambda _: None) == said
    assert third.asked == []


def test_a_line_cut_short_is_dropped_and_asked_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    ask_all(Scripted(), ["a", "b"], AnswerLog(path), say=lambda _: None)
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        log = AnswerLog(path)
        assert len(log) == 1
        assert path.read_bytes() == whole.splitlines(keepends=True)[0]
    teacher = Scripted()
    ask_all(teacher, ["a", "b"], log, say=lambda _: None)
    assert teacher.asked == ["b"]


def test_another_teachers_answers_are_not_taken(tmp_path):
    log = AnswerLog(tmp_path / "answers.jsonl")
    ask_all(Scripted(), ["a"], log, say=lambda _: None)
    other = Scripted()
    other.name = "other"
    ask_all(other, ["a"], log, say=lambda _: None)
    assert other.asked == ["a"]


def test_a_file_answers_as_often_as_it_can(tmp_path):
    path = tmp_path / "big.jsonl"
    lines = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher = FileTeacher(path)
    assert teacher.name == "big"
    assert [teacher.ask("a").text for _ in range(3)] == ["1", "2", "2"]
    with pytest.raises(NotAvailableError, match="no answer to the prompt"):
        teacher.ask("b")
    with pytest.raises(NotAvailableError, match="no file"):
        FileTeacher(tmp_path / "none.jsonl")
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(CorruptFileError, match="line 1"):
        FileTeacher(path)


def test_a_log_is_a_file_teacher(tmp_path):
    path = tmp_path / "answers.jsonl"
    said = ask_all(Scripted(), ["a", "b"], AnswerLog(path), say=lambda _: None)
    assert [FileTeacher(path).ask(p).text for p in ("a", "b")] == said


def test_costs_are_known_before_and_refused(tmp_path):
    log = AnswerLog(tmp_path / "answers.jsonl")
    teacher = Scripted()
    ask_all(teacher, ["known"], log, say=lambda _: None)
    cost = estimate_cost(teacher, ["known", "x" * 350, "known"], log, 2.0, 10.0, most_tokens=100)
    assert cost.calls == 2
    assert cost.answer_tokens == 200
    assert cost.money == pytest.approx((cost.prompt_tokens * 2 + 200 * 10) / 1e6)
    assert cost.prompt_tokens == pytest.approx(100 + 16 + 1, abs=2)
    check_budget(cost, 1.0)
    with pytest.raises(BadInputError, match=r"above the limit of 0\.00"):
        check_budget(cost, 0.0)
    with pytest.raises(BadInputError, match="0 or more"):
        estimate_cost(teacher, [], log, -1, 0)
    assert str(Cost(2, 1000, 200, 0.5)).endswith("0.50")
    assert len(teacher.asked) == 1
