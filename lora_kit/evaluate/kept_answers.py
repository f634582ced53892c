"""A model's answers kept on disk while an evaluation runs, so that it can be taken up again.

lm-eval's `CachingLM` asks a model only what its store does not hold yet. Its own store is a data
base that is written to once an answer, which takes longer than a fast model's answer; here answers
are lines of a file, written every few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from lm_eval.api.model import CachingLM

SECONDS_BETWEEN_WRITES = 5.0


class AnswerFile(dict):
    """Answers by request, read from a file of JSON lines and appended to it as they come.

    `found` counts those that were there; `on_answer` is called with the number that came since.
    """

    def __init__(self, path: Path, on_answer: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self._on_answer = on_answer or (lambda count: None)
        self._path, self._unwritten, self._written_at = path, [], time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                request, answer = json.loads(line)
            except ValueError:  # the line a killed run was writing
                continue
            super().__setitem__(request, tuple(answer) if isinstance(answer, list) else answer)
        self.found = len(self)
        if lines and len(lines) != len(self):  # a torn last line: what follows must not join it
            path.write_text("".join(f"{json.dumps(pair)}\n" for pair in self.items()), "utf-8")

    def __setitem__(self, request: str, answer) -> None:
        if request in self:
            return
        super().__setitem__(request, answer)
        self._on_answer(len(self) - self.found)
        self._unwritten.append(json.dumps([request, answer]))
        if time.monotonic() - self._written_at > SECONDS_BETWEEN_WRITES:
            self.commit()

    def commit(self) -> None:
        """Write what came since the last time."""
        if self._unwritten:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._unwritten))
        self._unwritten, self._written_at = [], time.monotonic()


class KeptAnswers(CachingLM):
    """lm-eval's CachingLM over an `AnswerFile`. The file is of one model and one way to load it:
    requests are told apart by what is asked alone."""

    def __init__(self, lm, path: Path, on_answer: Callable[[int], None] | None = None) -> None:
        self.lm, self.cache_db = lm, str(path)
        self.dbdict = AnswerFile(path, on_answer)
        lm.set_cache_hook(self.get_cache_hook())
