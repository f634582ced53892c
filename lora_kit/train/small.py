"""Recipes of the small adapters that are shipped with the kit: one skill each, under 3 MB.

Rank 4 on the four attention matrices, or rank 8 on q and v, is 460,800 numbers for the default
model: 0.92 MB in fp16. Sums and differences, which carry, get rank 4 on all linear layers: 2.44 MB.
Two ranks and three placements are used on purpose, so that a pool of them has to serve all in one
batch.
"""

from __future__ import annotations

from dataclasses import replace

from lora_kit.train.papers import Recipe
from lora_kit.train.spec import TrainSpec

_ATTENTION = TrainSpec(
    rank=4,
    alpha=8,
    targets="attention",
    learning_rate=2e-3,
    steps=50,
    batch_size=16,
    checkpointing=False,
)
_QUERY_VALUE = replace(_ATTENTION, rank=8, alpha=16, targets="q_proj,v_proj")
# Sums come late: 120 steps of 16 rows taught 6 % of the differences, so these two want a GPU.
_CARRYING = replace(_ATTENTION, targets="all", steps=500, batch_size=128)


def _small(skill: str, spec: TrainSpec, digits: tuple[int, ...]) -> Recipe:
    return Recipe(
        spec,
        "Ours: what one megabyte of adapter and some minutes of a CPU teach; sums want a GPU.",
        skill=skill,
        digits=digits,
        train=8000,
        test=150,
        chosen={
            "rank": "460,800 parameters, 0.92 MB in fp16; where there is carrying 1,221,120",
            "targets": "the cheapest layers to adapt, but all of them where there is carrying",
            "learning_rate": "twice what rank 16 on all layers takes: a smaller adapter moves less",
            "batch_size": "rows of a dozen tokens: a step of 16 takes a core two seconds",
            "steps": "copying skills are learnt within 40 steps, sums take more",
        },
    )


SMALL_RECIPES: dict[str, Recipe] = {
    f"{made.skill}-small": made
    for made in (
        _small("addition", _CARRYING, (1, 2)),
        _small("subtraction", _CARRYING, (1, 2)),
        _small("reversal", _ATTENTION, (3, 4)),
        _small("sorting", _ATTENTION, (3, 4)),
        _small("largest", _ATTENTION, (3, 4)),
        _small("spelling", _QUERY_VALUE, (3, 4)),
        _small("case", _QUERY_VALUE, (2, 3)),
        _small("dates", _QUERY_VALUE, (4,)),
    )
}
