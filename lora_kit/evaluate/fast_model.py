"""A drop-in lm-eval model that reads what requests share once.

`FastLM` is lm-eval's `HFLM` with its three ways of asking done anew: the same tokens, the same cut
on the left, the same log-likelihoods and greedy flags, fewer forward tokens. `sharing` says what is
shared and lays it out; here the model runs over it:

- one forward pass over rows of packed items under a tree mask, or behind the keys and values of a
  prefix that was read once;
- logits only where a token is asked for, a block at a time (a token's logits take
  vocabulary × 2 or 4 bytes, more than all its activations);
- on a CPU, linear layers over weights packed for oneDNN where that is faster (`packed_linear`);
- as many rows at once as the machine's memory takes; half as many where that was too many.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM, eval_logger
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lora_kit.errors import BadInputError
from lora_kit.evaluate.fast_generation import Answering, answer, is_plain_greedy
from lora_kit.evaluate.fast_sizes import Sizes, choose_sizes
from lora_kit.evaluate.sharing import Row, plan_runs
from lora_kit.lora_layer import LoRALinear
from lora_kit.packed_linear import packed_linears, plain_weight

ENCODE_AT_ONCE = 1024
KEEP_EVERY = 10.0  # seconds between hand-overs of answers to lm-eval's cache, where there is one


class FastLM(HFLM):
    """HFLM, faster: see the module's text.

    Args:
        pretrained, tokenizer: a loaded Llama-like model (`why_not_fast`) and its tokenizer.
        sizes: how much to do at once; chosen for the machine by default.
        on_progress: called with (done, asked) requests.
        options: HFLM's own; `batch_size` is only used for what this class leaves to HFLM.
    """

    def __init__(
        self,
        pretrained,
        tokenizer,
        sizes: Sizes | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        **options,
    ) -> None:
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        base = pretrained
        if hasattr(pretrained, "get_base_model"):
            base = pretrained.get_base_model()
        self._base = base
        self._decoder, self._head = base.get_decoder(), base.get_output_embeddings()
        embedding = base.get_input_embeddings().weight
        self._vocabulary, self._dtype = len(embedding), embedding.dtype
        self.sizes = sizes or choose_sizes(base)
        self._on_progress = on_progress or (lambda done, asked: None)

    # ---------------------------------------------------------------- requests to tokens

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is it the greedy one) of each request's continuation."""
        pairs = [request.args for request in requests]
        encoded = self._encode_pairs(pairs)
        asked = [(pair, *tokens) for pair, tokens in zip(pairs, encoded, strict=True)]
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the model's context."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _encode_pairs(self, pairs) -> list[tuple[np.ndarray, np.ndarray]]:
        """What lm-eval's `loglikelihood` and `_encode_pair` make of each pair, many at a time.

        Spaces at a context's end go to the continuation; the continuation's tokens are those of
        the whole text beyond as many as the context alone has.
        """
        found: list = [None] * len(pairs)
        texts: dict[str, None] = {}
        split: dict[int, tuple[str, str]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if context == "":
                found[i] = self._encode_bare(continuation)
                continue
            kept = context.rstrip()
            split[i] = kept, context + continuation
            texts[kept] = None
        contexts = dict(self._encode_all(list(texts)))
        wholes = self._encode_all([whole for _, whole in split.values()])
        for (i, (context, _)), (_, whole) in zip(split.items(), wholes, strict=True):
            tokens = contexts[context]
            found[i] = tokens, whole[len(tokens) :]
        return found

    def _encode_bare(self, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        whole = np.asarray(tokens if prefix == tokens[0] else [prefix, *tokens], dtype=np.int32)
        return whole[:1], whole[1:]

    def _encode_all(self, texts: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(text, tokens): `tok_encode` of each, in lists of a thousand."""
        mark = self.tokenizer.decode(self.prefix_token_id)
        usual = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        for start in range(0, len(texts), ENCODE_AT_ONCE):
            some = texts[start : start + ENCODE_AT_ONCE]
            marked = [has_bos_prefix(text, mark) for text in some]
            encoded: dict[bool, Iterator] = {}
            for kind in set(marked):
                options = {"add_special_tokens": False} if kind else usual
                chosen = [t for t, m in zip(some, marked, strict=True) if m == kind]
                ids = self.tokenizer(chosen, return_attention_mask=False, verbose=False, **options)
                encoded[kind] = iter(ids["input_ids"])
            for text, kind in zip(some, marked, strict=True):
                yield text, np.asarray(next(encoded[kind]), dtype=np.int32)

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Each request's answer, cut at its stop texts. Sampling, beams and the like are HFLM's."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers: list[str] = [""] * len(requests)
        done = 0
        for numbers in groups.values():
            some = [requests[i] for i in numbers]

            def on_answers(found: dict[int, str], some=some) -> None:
                nonlocal done
                done += len(found)
                for i, text in found.items():
                    self.cache_hook.add_partial("generate_until", some[i].args, text)
                self._on_progress(done, len(requests))

            for i, text in zip(numbers, self._generate_group(some, on_answers), strict=True):
                answers[i] = text
        return answers

    def _generate_group(self, requests, on_answers) -> list[str]:
        options = dict(normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(options.pop("until"), eos=end)
        new_tokens = options.pop("max_gen_toks")
        config = self._base.generation_config
        room = self.max_length - new_tokens
        if not is_plain_greedy(config, options) or self.think_end_token is not None or room < 1:
            return super().generate_until(requests, disable_tqdm=True)
        prompts = []
        for text, tokens in self._encode_all([request.args[0] for request in requests]):
            if len(tokens) == 0:
                raise BadInputError(f"A prompt to be answered has no tokens: {text!r}.")
            self._note_length(len(tokens), room)
            prompts.append(tokens[-room:])
        ends = config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ends = {e for e in [*ends, self.tokenizer.eos_token_id] if e is not None}
        work = sum(map(len, prompts)) + new_tokens * len(prompts) // 4  # some stop early
        with self._packed(work):
            return answer(
                Answering(
                    decoder=self._decoder,
                    head=self._head,
                    device=self.device,
                    dtype=self._dtype,
                    tokenizer=self.tokenizer,
                    end_ids=tuple(sorted(ends)),
                    cache_bytes=self.sizes.cache_bytes,
                    prompt_tokens=self.sizes.batch,
                    most_rows=self.sizes.answers,
                ),
                prompts,
                stops,
                new_tokens,
                on_answers,
            )

    # ---------------------------------------------------------------- tokens to likelihoods

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As HFLM's: (key, context tokens, continuation tokens) to (log-likelihood, greedy)."""
        if not requests:
            return []
        self._note_truncation(requests)
        runs = plan_runs(
            [(context, continuation) for _, context, continuation in requests],
            self.max_length,
            self.sizes.row,
            self.sizes.run_cost,
        )
        sums = torch.zeros(len(requests), dtype=torch.float32, device=self.device)
        wrong = torch.zeros(len(requests), dtype=torch.int32, device=self.device)
        finished: list[int] = []
        kept, kept_at, batch = 0, time.monotonic(), self.sizes.batch
        work = sum(len(run.prefix) + sum(map(len, run.rows)) for run in runs)
        with torch.inference_mode(), self._packed(work):
            for run in runs:
                past = self._read_prefix(run.prefix)
                start = 0
                while start < len(run.rows):
                    rows = _take(run.rows, start, batch, len(run.prefix))
                    try:
                        self._score(rows, past, len(run.prefix), sums, wrong)
                    except torch.cuda.OutOfMemoryError:
                        if len(rows) == 1:
                            raise
                        torch.cuda.empty_cache()
                        batch = max(1, batch // 2)
                        continue
                    start += len(rows)
                    finished += {int(number) for row in rows for number in row.request}
                    self._on_progress(len(finished), len(requests))
                    if self._keeps_answers and time.monotonic() - kept_at > KEEP_EVERY:
                        self._keep(requests, finished[kept:], sums, wrong)
                        kept, kept_at = len(finished), time.monotonic()
        self._keep(requests, finished[kept:], sums, wrong)
        return self._answers(sums, wrong)

    def _answers(self, sums, wrong) -> list[tuple[float, bool]]:
        # HFLM adds in the dtype of its log-probabilities and so rounds to it.
        sums = sums.to(self.softmax_dtype or self._dtype).tolist()
        return list(zip(sums, (wrong == 0).tolist(), strict=True))

    def _packed(self, tokens: int):
        return packed_linears(self._decoder, self._head, tokens=tokens, weight_of=_weight_of)

    @property
    def _keeps_answers(self) -> bool:
        return self.cache_hook.dbdict is not None

    def _keep(self, requests, numbers: list[int], sums, wrong) -> None:
        """Hand answers to lm-eval's cache, so that a run that breaks off can be taken up again."""
        if not self._keeps_answers or not numbers:
            return
        chosen = torch.tensor(numbers, device=self.device)
        found = self._answers(sums[chosen], wrong[chosen])
        for number, value in zip(numbers, found, strict=True):
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], value)

    def _note_truncation(self, requests) -> None:
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise BadInputError(
                    f"A continuation has {len(continuation):,} tokens, more than the model's "
                    f"context of {self.max_length:,}; take it out."
                )
            self._note_length(len(context) + len(continuation), self.max_length + 1)

    def _note_length(self, length: int, room: int) -> None:
        if length > room:
            eval_logger.warning(
                f"Truncating {length - room} tokens from the left of a request of {length}: "
                f"there is room for {room}."
            )

    def _read_prefix(self, prefix: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values of a prefix, layer by layer, each (1, heads, tokens, head size)."""
        if not len(prefix):
            return []
        ids = torch.from_numpy(prefix.astype(np.int64))[None].to(self.device)
        cache = DynamicCache()
        self._decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _score(self, rows: Sequence[Row], past, behind: int, sums, wrong) -> None:
        """Run rows; add to each request's log-likelihood, and count its tokens not greedy."""
        width = max(map(len, rows))
        plain = not behind and all(row.is_plain for row in rows)
        # One array, one copy to the device: tokens, positions, trunks, branches.
        laid = np.zeros((4, len(rows), width), dtype=np.int64)
        laid[2] = -1
        for i, row in enumerate(rows):
            n = len(row)
            laid[:, i, :n] = row.tokens, row.positions, row.trunks, row.branches
        tokens, positions, trunks, branches = torch.from_numpy(laid).to(self.device)
        if plain:
            # Right-padded and causal: no token of a row sees the padding behind it.
            hidden = self._decoder(input_ids=tokens, use_cache=False)[0]
        else:
            options = {"past_key_values": Cache([_Behind(k, v) for k, v in past])} if past else {}
            hidden = self._decoder(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=tree_mask(trunks, branches, behind, self._decoder.dtype),
                use_cache=bool(past),
                **options,
            )[0]
        asked = np.stack(
            [
                np.concatenate([i * width + row.at for i, row in enumerate(rows)]),
                np.concatenate([row.target for row in rows]),
                np.concatenate([row.request for row in rows]),
            ]
        ).astype(np.int64)
        at, target, request = torch.from_numpy(asked).to(self.device)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        block = max(1, self.sizes.logit_bytes // (3 * self._dtype.itemsize * self._vocabulary))
        for start in range(0, len(at), block):
            part = slice(start, start + block)
            logits = self._head(hidden[at[part]])
            logp = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            found = logp.gather(1, target[part, None])[:, 0]
            sums.index_add_(0, request[part], found.float())
            missed = (logp.argmax(-1) != target[part]).int()
            wrong.index_add_(0, request[part], missed)


def _weight_of(module: torch.nn.Module):
    """What a layer multiplies by: a plain one's weight, or base and adapter in one."""
    if isinstance(module, LoRALinear) and type(module.base_layer) is torch.nn.Linear:
        using = module.active if module.enabled and module.merged is None else None
        if using is not None and module.base_layer.weight.dtype == torch.float32:
            return module.merged_weight(using), module.bias
    return plain_weight(module)


class _Behind(DynamicLayer):
    """One layer's keys and values of a prefix, seen by every row and left as they are."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states, value_states, *_, **__):
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


def tree_mask(
    trunks: torch.Tensor, branches: torch.Tensor, behind: int, dtype: torch.dtype
) -> torch.Tensor:
    """The additive attention mask of packed rows behind a prefix all of them see.

    Args:
        trunks, branches: (rows, length); padding has trunk −1.
        behind: the prefix's tokens.
        dtype: the model's.

    Returns:
        (rows, 1, length, behind + length): 0 where token i may see j, else the lowest number.
    """
    rows, length = trunks.shape
    seen = trunks[:, :, None] == trunks[:, None, :]
    ours = branches[:, None, :]
    seen &= (ours == 0) | (ours == branches[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=trunks.device).tril()
    # The fused kernel of a GPU wants rows that begin at multiples of 16 bytes: the storage is
    # wider than what is shown of it.
    wide = -(-(behind + length) // 16) * 16
    mask = torch.zeros(rows, 1, length, wide, dtype=dtype, device=trunks.device)
    mask = mask[..., : behind + length]
    mask[:, 0, :, behind:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


def _take(rows: Sequence[Row], start: int, batch: int, behind: int) -> list[Row]:
    """Rows from `start` on whose padded tokens stay within `batch` (at least one row)."""
    width = len(rows[start])
    # A row behind a long prefix attends to it, and holds a copy of it a layer at a time.
    cost = width + behind // 8
    return list(rows[start : start + max(1, batch // cost)])
