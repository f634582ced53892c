"""What the specialists study measures on a model: sampled answers, and the size of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lora_kit.errors import BadInputError

TEMPERATURE, TOP_P = 0.8, 0.95  # Chen et al. 2021, section 3.2, for pass@10


class SampledHead(nn.Module):
    """An output layer whose argmax is a draw from softmax(logits/T), cut to the nucleus.

    argmax(x + g) with g = −log(−log u), u uniform, is a draw from softmax(x) (Gumbel 1954), so a
    greedy decoder over this layer samples. Nucleus (Holtzman et al. 2020, section 3.1): the fewest
    tokens whose probabilities add up to top_p.

    Raises:
        BadInputError: temperature ≤ 0, or top_p outside (0, 1].
    """

    def __init__(
        self,
        head: nn.Module,
        seed: int,
        device: torch.device,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not 0 < top_p <= 1:
            raise BadInputError(
                f"Sampling needs a temperature above 0 and top_p in (0, 1], not {temperature} and "
                f"{top_p}."
            )
        self.head, self.temperature, self.top_p = head, temperature, top_p
        self.generator = torch.Generator(device).manual_seed(seed)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden).float() / self.temperature
        if self.top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            ordered = ordered.masked_fill(before >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, order, ordered)
        noise = torch.empty_like(logits).exponential_(generator=self.generator)
        return logits - noise.log()


def write_answers(
    model,
    tokenizer,
    prompts: Sequence[str],
    stops: Sequence[str],
    max_new_tokens: int,
    sampled: bool,
    seed: int,
) -> list[str]:
    """Answers to prompts by the kit's fast generation, greedy or drawn (`SampledHead`).

    The draws depend on the seed and on how many rows go at once, which the machine's memory
    decides: a repetition on the same machine gives the same texts.
    """

    from lora_kit.evaluate.fast_generation import answer

    how = answering(model, tokenizer)
    if sampled:
        how = replace(how, head=SampledHead(how.head, seed, how.device))
    return answer(
        how, encode_prompts(model, tokenizer, prompts, max_new_tokens), stops, max_new_tokens
    )


def encode_prompts(model, tokenizer, prompts: Sequence[str], max_new_tokens: int) -> list:
    """Token ids of prompts, cut on the left where prompt and answer would pass the context."""
    import numpy as np

    from lora_kit.prompts import prompt_ids

    room = model.config.max_position_embeddings - max_new_tokens
    return [np.asarray(prompt_ids(tokenizer, p)[-room:], dtype=np.int32) for p in prompts]


def answering(model, tokenizer):
    """What the fast generation needs of a loaded model, greedy."""
    from lora_kit.evaluate.fast_generation import Answering
    from lora_kit.evaluate.fast_sizes import choose_sizes

    weight, sizes = model.get_input_embeddings().weight, choose_sizes(model)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return Answering(
        decoder=model.get_decoder(),
        head=model.get_output_embeddings(),
        device=weight.device,
        dtype=weight.dtype,
        tokenizer=tokenizer,
        end_ids=tuple(sorted(ends)),
        cache_bytes=sizes.cache_bytes,
        prompt_tokens=sizes.batch,
        most_rows=sizes.answers,
    )


@torch.no_grad()
def update_norms(model) -> dict[str, float]:
    """How far an adapter moved its base: ‖s·BA‖ over ‖W‖, all layers together (Frobenius), and the
    mean of the layers' effective ranks.

    The effective rank is ‖M‖_F² / ‖M‖₂² of M = BA ("stable rank"; Rudelson and Vershynin 2007,
    section 1.1): near 1 where one direction carries the update, whatever room it has.
    """
    from lora_kit.lora import active_adapter, lora_layers
    from lora_kit.lora_base import true_weight

    name = active_adapter(model)
    moved, whole, ranks = 0.0, 0.0, []
    for layer in lora_layers(model).values():
        if name not in layer.specs:
            continue
        a, b = layer.lora_A[name].float(), layer.lora_B[name].float()
        # ‖BA‖² and its largest singular value from two r × r matrices, never from out × in.
        inner = torch.linalg.eigvals((b.T @ b) @ (a @ a.T)).real.clamp(min=0)
        total, largest = float(inner.sum()), float(inner.max())
        moved += layer.specs[name].scale ** 2 * total
        whole += float(true_weight(layer.base_layer).float().square().sum())
        if largest > 0:
            ranks.append(total / largest)
    return {
        "update_norm": (moved / whole) ** 0.5,
        "effective_rank": sum(ranks) / len(ranks) if ranks else 0.0,
    }


def run_unstopped(model: str, items: int, command: str):
    """The untuned base's summaries without the stop that the grid's have, an empty line.

    The base begins most answers with one, so that in the grid it scores nothing. Here the empty
    lines in front are dropped and the first paragraph is scored. Returns the record: ROUGE, and
    the share of answers with an empty line in front (`empty in front`).
    """
    import time

    from lora_kit.models import load_model
    from lora_kit.studies.records import new_record
    from lora_kit.studies.specialists import STUDY
    from lora_kit.studies.specialists_generations import item_row, judge
    from lora_kit.studies.specialists_tasks import TESTS

    started, test = time.perf_counter(), TESTS["dialogue"]
    rows, loaded = test.items()[:items], load_model(model)
    prompts = [row["prompt"] for row in rows]
    texts = write_answers(loaded.model, loaded.tokenizer, prompts, (), test.tokens, False, 0)
    judged = judge(test, rows, [[first_paragraph(text)] for text in texts])
    metrics = {f"dialogue {name}": mean.to_metric() for name, mean in judged.means.items()}
    metrics["empty in front"] = sum(t.startswith("\n\n") for t in texts) / len(texts)
    return new_record(
        STUDY,
        command,
        parameters={"part": "unstopped", "task": "dialogue", "model": model, "items": len(rows)},
        metrics=metrics,
        tables={"items": [item_row(judged, name, test.version) for name in judged.means]},
        seed=0,
        seconds=time.perf_counter() - started,
        model=loaded.record(),
    )


def first_paragraph(text: str) -> str:
    """A text up to its first empty line, those in front left out."""
    return text.lstrip().split("\n\n")[0]
