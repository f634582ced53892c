"""Greedy generation for evaluation: many prompts at once, and finished rows leave.

A row is finished at the model's end of sequence, at a stop text, or at its length. The rows that
are left are gathered in a smaller cache, so that a few long answers do not carry all the others
along. The answers are those of lm-eval's HFLM, which runs every row until the last has finished and
cuts the texts afterwards; with one difference that is HFLM's own: where a stop text is a special
token that the model does not end at, HFLM lets a row run on behind it as long as its neighbours
need, and here it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STEPS_BETWEEN_CHECKS = 8  # of stop texts: a GPU runs so many steps without waiting for the host
# Settings of a generation config that change which token is the greedy one, and their idle values.
_IDLE = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
}


@dataclass(frozen=True)
class Answering:
    """What `answer` needs of a model.

    decoder, head: its body and output layer; device and dtype: theirs. cache_bytes: for keys and
    values. prompt_tokens: padded prompt tokens a forward pass. most_rows: at once.
    """

    decoder: torch.nn.Module
    head: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    tokenizer: object
    end_ids: tuple[int, ...]
    cache_bytes: int
    prompt_tokens: int
    most_rows: int


def is_plain_greedy(generation_config, options: dict) -> bool:
    """Whether greedy decoding of this config and these options is the argmax of every step."""
    if options.get("do_sample") or options.get("temperature", 0.0):
        return False
    if set(options) - {"do_sample", "temperature"}:
        return False
    return all(getattr(generation_config, name, None) in idle for name, idle in _IDLE.items())


def answer(
    model: Answering,
    prompts: Sequence[np.ndarray],
    stops: Sequence[str],
    max_new_tokens: int,
    on_answers: Callable[[dict[int, str]], None] = lambda found: None,
) -> list[str]:
    """Greedy answers to prompts of token ids, each cut at the first stop text.

    Args:
        model: see `Answering`.
        prompts: token ids, none empty.
        stops: texts that end an answer and are no part of it.
        max_new_tokens: at most so many tokens an answer.
        on_answers: called with the answers of each batch, by the prompt's number.

    Returns:
        The answers, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    start = 0
    with torch.inference_mode():
        while start < len(order):
            rows = max(1, _rows_that_fit(model, len(prompts[order[start]]) + max_new_tokens))
            chosen = order[start : start + rows]
            try:
                texts = _answer_batch(model, [prompts[i] for i in chosen], stops, max_new_tokens)
            except torch.cuda.OutOfMemoryError:
                if rows == 1:
                    raise
                torch.cuda.empty_cache()
                model = _with_half_the_cache(model, rows)
                continue
            found = dict(zip(chosen, texts, strict=True))
            for i, text in found.items():
                answers[i] = text
            start += len(chosen)
            on_answers(found)
    return answers


def _rows_that_fit(model: Answering, tokens: int) -> int:
    config = model.decoder.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size
    a_row = tokens * a_token * model.dtype.itemsize
    return min(model.most_rows, model.cache_bytes // a_row)


def _with_half_the_cache(model: Answering, rows: int) -> Answering:
    return replace(model, most_rows=max(1, min(rows, model.most_rows) // 2))


def _answer_batch(model: Answering, prompts, stops, max_new_tokens: int) -> list[str]:
    device, dtype = model.device, model.dtype
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max())
    capacity = width + max_new_tokens
    layers = [_Slots(len(prompts), capacity) for _ in range(model.decoder.config.num_hidden_layers)]
    tokens = _read_prompts(model, prompts, layers)
    # A row's slots: its prompt, padding up to the longest prompt, what it generates.
    slots = torch.arange(capacity, device=device)
    padding = (slots >= lengths[:, None]) & (slots < width)
    mask = torch.zeros(padding.shape, dtype=dtype, device=device)
    mask.masked_fill_(padding, torch.finfo(dtype).min)
    written: list[list[int]] = [[] for _ in prompts]
    owners, fresh, count = list(range(len(prompts))), [tokens], 1
    lookback = STEPS_BETWEEN_CHECKS + 2 + _longest(model.tokenizer, stops)
    with grouped_attention(model.decoder.config):
        while True:
            if len(fresh) == STEPS_BETWEEN_CHECKS or count == max_new_tokens:
                for row, ids in zip(owners, torch.stack(fresh, dim=1).tolist(), strict=True):
                    written[row] += ids
                fresh = []
                tails = [written[row][-lookback:] for row in owners]
                going = _unfinished(model, tails, stops)
                if not going or count == max_new_tokens:
                    break
                if len(going) < len(owners):
                    keep = torch.tensor(going, device=device)
                    owners = [owners[i] for i in going]
                    tokens, lengths, mask = tokens[keep], lengths[keep], mask[keep]
                    for layer in layers:
                        layer.keep(keep)
            hidden = model.decoder(
                input_ids=tokens[:, None],
                position_ids=(lengths + count - 1)[:, None],
                attention_mask=mask[:, None, None, : width + count],
                past_key_values=Cache(layers),
                use_cache=True,
            )[0]
            tokens = model.head(hidden[:, -1]).float().argmax(-1)
            fresh.append(tokens)
            count += 1
    return [_text(model, ids, stops) for ids in written]


def _read_prompts(model: Answering, prompts, layers: list[_Slots]) -> torch.Tensor:
    """Fill the cache with the prompts, some rows at a time; return each row's first new token."""
    device = model.device
    first, start = [], 0
    while start < len(prompts):
        wide = len(prompts[start])  # longest first
        some = prompts[start : start + max(1, model.prompt_tokens // wide)]
        ids = np.zeros((len(some), wide), dtype=np.int64)
        for row, prompt in zip(ids, some, strict=True):
            row[: len(prompt)] = prompt
        for layer in layers:
            layer.first_row = start
        # Padding stands on the right, where causal attention does not look.
        hidden = model.decoder(
            input_ids=torch.from_numpy(ids).to(device),
            past_key_values=Cache(layers),
            use_cache=True,
            attention_mask=None,
            position_ids=torch.arange(wide, device=device)[None],
        )[0]
        ends = torch.tensor([len(p) - 1 for p in some], device=device)
        hidden = hidden[torch.arange(len(some), device=device), ends]
        first.append(model.head(hidden).float().argmax(-1))
        start += len(some)
    width = len(prompts[0])
    for layer in layers:
        layer.first_row, layer.length = None, width
    return torch.cat(first)


def _unfinished(model: Answering, tails: list[list[int]], stops) -> list[int]:
    """The numbers of the rows whose last tokens hold neither an end nor a stop text."""
    ends = set(model.end_ids)
    texts = model.tokenizer.batch_decode(tails)
    return [
        i
        for i, (tail, text) in enumerate(zip(tails, texts, strict=True))
        if ends.isdisjoint(tail) and not any(stop and stop in text for stop in stops)
    ]


def _text(model: Answering, ids: list[int], stops) -> str:
    end = next((i for i, token in enumerate(ids) if token in model.end_ids), len(ids))
    text = model.tokenizer.decode(ids[: end + 1], skip_special_tokens=True)
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def _longest(tokenizer, stops: Sequence[str]) -> int:
    return max((len(tokenizer.encode(s, add_special_tokens=False)) for s in stops), default=0)


class _Slots(DynamicLayer):
    """One layer's keys and values of a batch, in storage made once: (rows, heads, capacity, size).

    While `first_row` is a number, prompts are written from that row on and attend to themselves
    alone; afterwards each call adds one slot to every row.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity
        self.first_row: int | None = 0
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        heads, size = key_states.shape[1], key_states.shape[3]
        # Zeros, not whatever lies in memory: a hidden slot that holds NaN would still count.
        self.keys = key_states.new_zeros(self.rows, heads, self.capacity, size)
        self.values = value_states.new_zeros(self.rows, heads, self.capacity, size)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, new, _ = key_states.shape
        if self.first_row is not None:
            here = slice(self.first_row, self.first_row + rows)
            self.keys[here, :, :new] = key_states
            self.values[here, :, :new] = value_states
            return key_states, value_states
        end = self.length + new
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self.keys, self.values = self.keys[rows], self.values[rows]


@contextlib.contextmanager
def grouped_attention(config) -> Iterator[None]:
    """Attention for one new token a row that reads each key once.

    Grouped-query attention lets g query heads share a head of keys. Transformers copies keys and
    values g times wherever there is a mask; with one query token the g heads can stand in the
    place of g query tokens instead, which is the same sum without the copies.
    """
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("lora_kit_grouped", _attend)
    config._attn_implementation = "lora_kit_grouped"
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    rows, heads, _, size = query.shape
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    mask = attention_mask.expand(rows, 1, folded.shape[2], key.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, size), None
