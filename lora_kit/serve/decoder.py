"""Forward passes over rows that come and go: prompts in, the next token's logits out.

Rows are padded on the right: a causal model's real tokens do not look there, so a row's numbers do
not depend on what stands beside it, but for the rounding of differently shaped products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kit.errors import BadInputError
from lora_kit.serve.attention import NAME as ROW_ATTENTION
from lora_kit.serve.attention import use_row_attention
from lora_kit.serve.cache import RowCache
from lora_kit.serve.graphs import StepGraphs, padded
from lora_kit.serve.mixed import MixedLora
from lora_kit.serve.runs import cheapest_runs

PASS_TOKENS = 20  # what a pass costs on a CPU beside its tokens, in tokens


class Decoder:
    """A model, its adapters and the rows it is writing.

    Args:
        model: a causal language model of transformers with plain causal attention; where that is
            torch's (sdpa), it is given `attention`, which answers alike for all other callers too.
        mixed: its adapters; a row's key names one of them, or is None.
        rows: how many are expected side by side; a hint for the first buffers.
        graphs: whether passes are recorded as CUDA graphs (`serve.graphs`); by default on a GPU.

    Raises:
        BadInputError: a model whose attention or output this decoder does not do, or graphs where
            there can be none.
    """

    def __init__(self, model, mixed: MixedLora, rows: int = 1, graphs: bool | None = None):
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        if kinds != {"full_attention"} or sliding:
            raise BadInputError(
                "This model's attention looks through a sliding window, which this engine does not "
                "do: use transformers' generate, or vLLM."
            )
        if getattr(config, "final_logit_softcapping", None):
            raise BadInputError("This model caps its logits, which this engine does not do.")
        use_row_attention(model)
        self.model, self.mixed = model, mixed
        self.layers, self.head = model.get_decoder(), model.get_output_embeddings()
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = RowCache(config.num_hidden_layers)
        self.longest = getattr(config, "max_position_embeddings", None) or 0
        # Products that gather have another shape for every mix, and these tables of positions look
        # at the lengths from Python.
        turned = getattr(config, "rope_parameters", None) or {}
        can = self.device.type == "cuda" and mixed.masked
        can = can and turned.get("rope_type") not in ("dynamic", "longrope")
        if graphs and not can:
            raise BadInputError("This model's passes cannot be recorded as CUDA graphs here.")
        self.graphs = StepGraphs(self, rows) if can and graphs is not False else None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], keys: Sequence[str | None]) -> torch.Tensor:
        """New rows behind the others, each with its prompt read.

        Returns:
            (rows, vocabulary) float32: the logits of each prompt's next token. A pass that raises
            leaves no row.
        """
        lengths = [len(p) for p in prompts]
        before = list(self.cache.lengths)
        rows = self.cache.add(len(prompts))
        try:
            found = [
                (some, self._prefill([prompts[i] for i in some], rows.start, some, keys))
                for some in self._passes(lengths)
            ]
            logits = found[0][1]
            if len(found) > 1:
                logits = torch.empty((len(prompts), logits.shape[1]), device=self.device)
                for some, part in found:
                    logits[some] = part
        except BaseException:
            self.cache.lengths = before
            raise
        self.cache.lengths[rows] = lengths
        return logits

    def _passes(self, lengths: list[int]) -> list[list[int]]:
        """The prompts that are read together. On a CPU those of about one length, for there a token
        read in vain takes as long as one that counts."""
        if self.device.type != "cpu" or self.graphs is not None:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)

        def cost(first: int, last: int) -> int:
            return PASS_TOKENS + (last - first) * lengths[order[last - 1]]

        return [sorted(order[i:j]) for i, j in cheapest_runs(len(order), cost)]

    def _prefill(self, prompts, start: int, some: list[int], keys) -> torch.Tensor:
        """Prompts number `some` of those that begin at row `start`; keys are those of all."""
        lengths, keys = [len(p) for p in prompts], [keys[i] for i in some]
        width = max(lengths)
        if self.graphs is not None and not self.graphs.broken:
            width = min(padded(width), max(width, self.longest))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        logits = None
        if self.graphs is not None:
            logits = self.graphs.prefill(ids, lengths, start, keys)
        if logits is None:
            rows = slice(start, start + len(some))
            if some != list(range(len(some))):
                rows = torch.tensor([start + i for i in some], device=self.device)
            self.cache.prefill(rows, width)
            with self.mixed.rows(keys):
                last = torch.tensor(lengths, device=self.device) - 1
                logits = self.read(ids.to(self.device), last)
        return logits

    def read(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Prompts ids (rows, tokens) → fp32 logits (rows, vocabulary) at place `last` (rows,)."""
        rows = torch.arange(len(ids), device=self.device)
        at = torch.arange(ids.shape[1], device=self.device)[None].expand(len(ids), -1)
        causal = at[0][:, None] >= at[0][None, :]
        hidden = self.forward(ids, at, causal[None, None])
        return self.head(hidden[rows, last]).float()

    @torch.inference_mode()
    def step(
        self, tokens: Sequence[int], keys: Sequence[str | None], rows: list[int] | None = None
    ) -> torch.Tensor:
        """One more token of each row, or of some of them.

        Returns:
            (rows, vocabulary) float32. A pass that raises can be made again: nothing has moved.
        """
        logits = None
        if rows is None and self.graphs is not None:
            logits = self.graphs.step(tokens, keys)
        if logits is None:
            chosen = slice(0, len(self.cache)) if rows is None else rows
            at, mask = self.cache.decode(chosen, self.device)
            with self.mixed.rows(keys):
                hidden = self.forward(torch.tensor(tokens)[:, None], at, mask)
                logits = self.head(hidden[:, 0]).float()
        for row in range(len(self.cache)) if rows is None else rows:
            self.cache.lengths[row] += 1
        return logits

    def forward(self, ids: torch.Tensor, at: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """The last layer's output (rows, tokens, hidden) for tokens `ids` at places `at`.

        allowed (1 or rows, 1, tokens, reach): where a token looks.
        """
        mask = allowed
        if self.model.config._attn_implementation not in ("sdpa", ROW_ATTENTION):
            # Eager attention adds its mask.
            mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
            mask.masked_fill_(~allowed, torch.finfo(self.dtype).min)
        return self.layers(
            input_ids=ids.to(self.device),
            attention_mask=mask.expand(len(ids), -1, -1, -1),
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token by its probability: softmax(logits / temperature), in float64, from a generator of
    the row's own, so that the draw does not depend on its neighbours.

    Args:
        logits: (vocabulary,); temperature above 0; generator: on the CPU.
    """
    weights = torch.softmax(logits.double().cpu() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
