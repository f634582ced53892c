"""From token ids to text, as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

BROKEN = "�"  # what a decoder writes for the first bytes of a character


class TextStream:
    """The text of a growing list of tokens.

    A token may be a part of a character, and a tokenizer may write a token differently at the start
    of a text; so each piece is the difference of two decodings that begin a little earlier. What
    could be the beginning of a stop text is held back until it is known not to be one.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._ids: list[int] = []
        self._from = self._told = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now that this token has come; may be empty."""
        self._ids.append(token)
        before, after = self._decode(self._from, self._told), self._decode(self._from, None)
        if len(after) <= len(before) or after.endswith(BROKEN):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What was held back; no token follows."""
        before, after = self._decode(self._from, self._told), self._decode(self._from, None)
        rest = self._release(after[len(before) :]) if not self.stopped else ""
        held, self._held = self._held, ""
        return rest + held

    def _decode(self, start: int, end: int | None) -> str:
        return self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        at = len(self._held) - keep
        text, self._held = self._held[:at], self._held[at:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are the stop's first, at most all but one of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def end_tokens(model, tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and the model's generation config's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {i for i in (tokenizer.eos_token_id, *listed) if i is not None}
