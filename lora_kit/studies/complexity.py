"""How hard a task looks before anything is trained: LoRA Land's heuristics over any rows.

Zhao et al. 2024, section 5.5.1, names them: the number of training examples; the lengths of inputs,
outputs and whole examples (mean µ, deviation σ, 95th percentile) in tokens; compressibility (µ, σ);
and the ROUGE-L similarity of input and output (µ, σ). What the paper leaves open is chosen here:

    length           tokens of a text, by any tokenizer (the paper: tiktoken). An example is the
                     input and the output in one text, so its length need not be the sum.
    compressibility  bytes of gzip(example) / bytes of the example, at gzip's own level 9. Short
                     texts exceed 1: gzip's header and trailer take 18 bytes. A lower value is a
                     more repetitive text.
    similarity       ROUGE-L's F1 of the output against the input, no stemming.
    σ                over the rows as a whole population (n below, not n − 1).
    95th percentile  linear between the neighbouring ranks, as numpy's default.
"""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import BadInputError, NotAvailableError

# Our short names, and the headings of the paper's table 13.
HEURISTICS = {
    "input_p95": "Input length p95",
    "input_mean": "Input length µ",
    "input_std": "Input length σ",
    "output_p95": "Output length p95",
    "output_mean": "Output length µ",
    "output_std": "Output length σ",
    "example_mean": "Example length µ",
    "example_p95": "Example length p95",
    "example_std": "Example length σ",
    "similarity_mean": "I/O rougeL similarity µ",
    "similarity_std": "I/O rougeL similarity σ",
    "compressibility_mean": "Compressibility µ",
    "compressibility_std": "Compressibility σ",
    "examples": "# training examples",
}
MOST_ROWS = 5000


@dataclass(frozen=True)
class Complexity:
    """The heuristics of one set of rows, by the names of `HEURISTICS`.

    `measured`: the rows that were read, `examples` of which may be more. `counter`: what counted
    the tokens.
    """

    values: Mapping[str, float]
    measured: int
    counter: str

    def __getitem__(self, name: str) -> float:
        return self.values[name]


def measure_complexity(
    rows: Iterable[Mapping],
    count: Callable[[str], int] | None = None,
    counter: str = "words",
    limit: int = MOST_ROWS,
    seed: int = 0,
) -> Complexity:
    """All heuristics of a set of rows.

    Args:
        rows: of any shape `prompts.to_example` knows; the bare prompt is the input.
        count: tokens of a text; `count_words` by default. See `token_counter`.
        counter: what to call `count` in the result.
        limit: of more rows than this a random sample is read (`examples` counts all of them).
        seed: of that sample.

    Raises:
        BadInputError: no rows, or a row of no known shape.
    """
    from lora_kit.prompts import to_example

    rows = list(rows)
    if not rows:
        raise BadInputError("There are no rows to measure.")
    chosen = rows if len(rows) <= limit else random.Random(seed).sample(rows, limit)
    count = count or count_words
    examples = [_texts(to_example, row) for row in chosen]
    lengths = {
        "input": [count(given) for given, _ in examples],
        "output": [count(answer) for _, answer in examples],
        "example": [count(join(given, answer)) for given, answer in examples],
    }
    values: dict[str, float] = {}
    for side, numbers in lengths.items():
        values[f"{side}_mean"] = float(np.mean(numbers))
        values[f"{side}_std"] = float(np.std(numbers))
        values[f"{side}_p95"] = float(np.percentile(numbers, 95))
    found = {
        "similarity": [similarity(given, answer) for given, answer in examples],
        "compressibility": [compressibility(join(given, answer)) for given, answer in examples],
    }
    for name, numbers in found.items():
        values[f"{name}_mean"] = float(np.mean(numbers))
        values[f"{name}_std"] = float(np.std(numbers))
    values["examples"] = float(len(rows))
    return Complexity({name: values[name] for name in HEURISTICS}, len(chosen), counter)


def join(given: str, answer: str) -> str:
    """Input and output as one text, a space between them where neither side has white space."""
    apart = not given or not answer or given[-1].isspace() or answer[0].isspace()
    return given + answer if apart else f"{given} {answer}"


def compressibility(text: str) -> float:
    """Bytes of gzip(text) over bytes of the text (UTF-8); lower is more repetitive.

    Raises:
        BadInputError: an empty text.
    """
    raw = text.encode()
    if not raw:
        raise BadInputError("An empty text has no compressibility.")
    return len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw)


def similarity(given: str, answer: str) -> float:
    """ROUGE-L F1 of output against input: 2PR/(P + R), with P and R the share of the output's and
    the input's words in their longest common subsequence (Lin 2004, section 3)."""
    from rouge_score import rouge_scorer

    global _SCORER
    if _SCORER is None:
        _SCORER = rouge_scorer.RougeScorer(["rougeL"])
    return float(_SCORER.score(given, answer)["rougeL"].fmeasure)


_SCORER = None


def count_words(text: str) -> int:
    """Words and signs, each one token: what counts where no tokenizer is at hand."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def token_counter(model: str | None = None) -> tuple[Callable[[str], int], str]:
    """A counter of tokens and its name: a model's tokenizer, or `count_words`.

    Args:
        model: a registry name or folder; None takes the default model's tokenizer where it is
            cached, and words where it is not.
    """
    from lora_kit.model_registry import DEFAULT_MODEL
    from lora_kit.models import cached_models, fetch_model, load_tokenizer

    if model is None and DEFAULT_MODEL not in cached_models():
        return count_words, "words"
    try:
        tokenizer = load_tokenizer(fetch_model(model or DEFAULT_MODEL))
    except NotAvailableError:
        if model is not None:
            raise
        return count_words, "words"

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return count, model or DEFAULT_MODEL


def _texts(to_example, row: Mapping) -> tuple[str, str]:
    if "messages" in row:  # no template: the heuristics are of the text, not of a model's marks
        *turns, last = row["messages"] or [{}]
        if not turns:
            raise BadInputError("A messages row needs turns that end with the assistant's.")
        return "\n".join(str(turn.get("content", "")) for turn in turns), str(last["content"])
    example = to_example(row, "bare")
    return example.prompt, example.completion
