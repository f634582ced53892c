"""A router: which adapter a prompt wants, read off the base's own hidden states.

Saha et al. (2024) propose that a system pick the adapter for each query and do not build it. Here
is a small one. Every adapter has a few centroids, mean states of prompts it was made for:

    h(p)   = pool over tokens of the base's hidden state after layer L        (d numbers)
    z(p)   = (h(p) − m) / ‖h(p) − m‖,   m the mean over all adapters
    c_a,j  = mean of z over the j-th group of adapter a's prompts, scaled to length 1
    s_a(p) = max over j of z(p) · c_a,j

The groups are found by k-means: prompts that say the same in other words lie in other places, and
one mean for all of them would lie between. The adapter with the largest s answers, unless that s
lies below a threshold: then the base does. L and the pooling are chosen on held-out prompts, as is
the threshold. The base runs no further than layer L, so routing costs a part of one forward pass
and no second model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_kit import store
from lora_kit.errors import BadInputError, CorruptFileError, NotAvailableError
from lora_kit.fingerprint import ModelFingerprint, fingerprint_model
from lora_kit.hidden_states import POOLINGS, decoder_layers, hidden_states

WEIGHTS, FACTS = "router.safetensors", "router.json"
BASE = "base"  # how tables call the answer "none of the adapters"


@dataclass(frozen=True)
class Choice:
    """How one layer and pooling did on the held-out prompts.

    right: share of the adapters' prompts that went to their own adapter, the threshold applied.
    refused: share of the other prompts that went to the base (None where there were none).
    """

    layer: int
    pooling: str
    threshold: float
    right: float
    refused: float | None

    @property
    def score(self) -> float:
        return self.right if self.refused is None else (self.right + self.refused) / 2


@dataclass(frozen=True)
class Route:
    """Where one prompt goes. adapter: None for the base. similarity: s of the nearest adapter,
    which is `nearest` even where it was too far."""

    adapter: str | None
    nearest: str
    similarity: float


@dataclass(frozen=True)
class Router:
    """Centroids of adapters in the base's hidden space.

    names: the n adapters. centroids: (m, d) float32, rows of length 1; owners: (m,) int64, which
    adapter each is of. centre: (d,), the mean taken off first. layer: states after so many layers,
    from 1. choices: what was tried, best first.
    """

    names: tuple[str, ...]
    centroids: torch.Tensor = field(repr=False)
    owners: torch.Tensor = field(repr=False)
    centre: torch.Tensor = field(repr=False)
    layer: int
    pooling: str
    threshold: float
    fingerprint: ModelFingerprint = field(repr=False)
    choices: tuple[Choice, ...] = field(default=(), repr=False)

    def route(self, model, tokenizer, prompts: Sequence[str], batch_size: int = 32) -> list[Route]:
        """Where each prompt goes; the model's own adapters, if it carries any, are left out.

        Raises:
            BadInputError: a single text instead of a list, or an empty prompt.
        """
        states = hidden_states(model, tokenizer, prompts, [self.layer], batch_size)
        return self.decide(states[self.layer, self.pooling])

    def decide(self, states: torch.Tensor) -> list[Route]:
        """Where prompts with these pooled states (rows, d) go."""
        best, which = self.similarities(states).max(dim=1)
        routes = []
        for similarity, i in zip(best.tolist(), which.tolist(), strict=True):
            name = self.names[i]
            routes.append(Route(name if similarity >= self.threshold else None, name, similarity))
        return routes

    def similarities(self, states: torch.Tensor) -> torch.Tensor:
        """s of every adapter (rows, n) for pooled states (rows, d)."""
        each = _unit(states - self.centre) @ self.centroids.t()
        return torch.stack([each[:, self.owners == i].amax(1) for i in range(len(self.names))], 1)


def fit_router(
    model,
    tokenizer,
    prompts: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]],
    others: Sequence[str] = (),
    layers: Iterable[int] | None = None,
    poolings: Sequence[str] = POOLINGS,
    groups: int = 3,
    keep: float = 0.98,
) -> Router:
    """Make a router, choosing layer, pooling and threshold on held-out prompts.

    Args:
        model, tokenizer: the base.
        prompts: {adapter: prompts it was made for}; the centroids come from these.
        held_out: {adapter: other prompts of its kind}; the choices are made on these.
        others: prompts no adapter was made for. The threshold is then the one that gives the best
            mean of (adapters' prompts sent right, others sent to the base).
        layers: which to try, from 1; by default every fourth, and the last but one.
        poolings: of "mean" and "last".
        groups: centroids an adapter gets (fewer where it has fewer prompts).
        keep: without `others`, the threshold leaves this share of the held-out prompts above it.

    Returns:
        Router. Measure it on prompts of neither kind: these were used to choose.

    Raises:
        BadInputError: fewer than two adapters, names that differ, nothing to choose from, a prompt
            that is in both sets.
    """
    names = tuple(prompts)
    _check_prompts(prompts, held_out, keep)
    if groups < 1:
        raise BadInputError(f"groups must be at least 1, not {groups}.")
    count = len(decoder_layers(model))
    tried = sorted(set(layers or [*range(4, count, 4), max(1, count - 1)]))
    if not tried or min(tried) < 1 or max(tried) > count or set(poolings) - set(POOLINGS):
        raise BadInputError(
            f"layers must lie in 1 to {count} and poolings be of {', '.join(POOLINGS)}."
        )
    fit = {n: hidden_states(model, tokenizer, prompts[n], tried) for n in names}
    held = {n: hidden_states(model, tokenizer, held_out[n], tried) for n in names}
    foreign = hidden_states(model, tokenizer, others, tried) if others else None
    fingerprint = fingerprint_model(model)
    made: list[tuple[Choice, Router]] = []
    for layer in tried:
        for pooling in poolings:
            key = layer, pooling
            router = _with_centroids({n: fit[n][key] for n in names}, key, groups, fingerprint)
            own = [(n, router.similarities(held[n][key])) for n in names]
            far = router.similarities(foreign[key]).amax(1) if foreign else None
            choice = _choose_threshold(router, own, far, keep)
            made.append((choice, router))
    # Of equally good ones the earliest layer, which is the cheapest.
    made.sort(key=lambda pair: (-pair[0].score, pair[0].layer))
    choice, router = made[0]
    return replace(router, threshold=choice.threshold, choices=tuple(c for c, _ in made))


def confusion(
    router: Router, model, tokenizer, prompts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """One row for each kind of prompt: how many went to each adapter, and to the base.

    Args:
        prompts: {adapter, or "base": prompts}.
    """
    rows = []
    for kind, asked in prompts.items():
        counts = dict.fromkeys([*router.names, BASE], 0)
        for route in router.route(model, tokenizer, asked):
            counts[route.adapter or BASE] += 1
        rows.append({"prompts of": kind, **counts})
    return rows


# ---------------------------------------------------------------------- fitting


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _with_centroids(states: Mapping[str, torch.Tensor], key, groups: int, fingerprint) -> Router:
    centre = torch.stack([s.float().mean(0) for s in states.values()]).mean(0)
    found = [_centroids(_unit(s - centre), groups) for s in states.values()]
    owners = torch.cat([torch.full((len(c),), i) for i, c in enumerate(found)])
    return Router(tuple(states), torch.cat(found), owners, centre, *key, -1.0, fingerprint)


def _centroids(points: torch.Tensor, groups: int) -> torch.Tensor:
    """k-means on the sphere (Dhillon & Modha 2001), without chance: it starts from the first point
    and each time the one farthest from those taken. Fewer where points coincide."""
    centroids = points[:1]
    while len(centroids) < min(groups, len(points)):
        nearest = (points @ centroids.t()).amax(1)
        if nearest.min() > 1 - 1e-6:
            break
        centroids = torch.cat([centroids, points[nearest.argmin()][None]])
    for _ in range(50):
        group = (points @ centroids.t()).argmax(1)
        means = [points[group == j].mean(0) for j in range(len(centroids)) if (group == j).any()]
        moved = _unit(torch.stack(means))
        if moved.shape == centroids.shape and torch.allclose(moved, centroids, atol=1e-7):
            break
        centroids = moved
    return centroids


def _choose_threshold(router: Router, own, far: torch.Tensor | None, keep: float) -> Choice:
    """The threshold that serves these held-out similarities best, and how well."""
    best = torch.cat([s.amax(1) for _, s in own])
    right = torch.cat([s.argmax(1) == router.names.index(n) for n, s in own])
    if far is None:
        threshold = float(torch.quantile(best, 1 - keep))
        return Choice(
            *(router.layer, router.pooling, threshold),
            float((right & (best >= threshold)).float().mean()),
            None,
        )
    # Half-way between neighbouring similarities; what decides is the order, not the exact place.
    values = torch.cat([best, far]).unique()
    cuts = torch.cat([values[:1] - 1e-3, (values[1:] + values[:-1]) / 2])
    kept = ((best[None] >= cuts[:, None]) & right).float().mean(1)
    refused = (far[None] < cuts[:, None]).float().mean(1)
    at = int((kept + refused).argmax())
    return Choice(
        router.layer, router.pooling, float(cuts[at]), float(kept[at]), float(refused[at])
    )


def _check_prompts(prompts, held_out, keep: float) -> None:
    if len(prompts) < 2:
        raise BadInputError("A router needs the prompts of at least two adapters.")
    if set(prompts) != set(held_out):
        odd = sorted(set(prompts) ^ set(held_out))
        raise BadInputError(f"prompts and held_out must name the same adapters; {odd[0]} differs.")
    if BASE in prompts:
        raise BadInputError(f"{BASE!r} stands for no adapter: call that one something else.")
    if not 0 < keep <= 1:
        raise BadInputError(f"keep must lie in (0, 1], not {keep}.")
    for name in prompts:
        if not prompts[name] or not held_out[name]:
            raise BadInputError(f"{name} has no prompts, or none held out.")
        if both := set(prompts[name]) & set(held_out[name]):
            raise BadInputError(f"{min(both)!r} of {name} is held out and fitted on: choose one.")


# ---------------------------------------------------------------------- files


def save_router(router: Router, folder: str | Path) -> Path:
    """Write a router; the folder appears whole, or not at all."""
    facts = {
        "names": list(router.names),
        "layer": router.layer,
        "pooling": router.pooling,
        "threshold": router.threshold,
        "choices": [vars(c) for c in router.choices],
        "fingerprint": router.fingerprint.to_dict(),
    }
    with store.new_folder(Path(folder)) as part:
        parts = {n: getattr(router, n).contiguous() for n in ("centroids", "owners", "centre")}
        save_file(parts, part / WEIGHTS)
        (part / WEIGHTS).chmod(0o644)
        store.write_json(part / FACTS, facts)
    return Path(folder)


def load_router(folder: str | Path, model=None) -> Router:
    """Read a router, and check that it is of this base.

    Raises:
        NotAvailableError: no router there; CorruptFileError: files that are not one;
        BadInputError: it was made with another base.
    """
    folder = Path(folder)
    if not (folder / FACTS).exists() or not (folder / WEIGHTS).exists():
        raise NotAvailableError(f"{folder} holds no router ({FACTS} and {WEIGHTS}).")
    facts = store.read_json(folder / FACTS)
    try:
        tensors = load_file(folder / WEIGHTS)
        router = Router(
            tuple(facts["names"]),
            *(tensors["centroids"], tensors["owners"], tensors["centre"]),
            *(facts["layer"], facts["pooling"], facts["threshold"]),
            ModelFingerprint.from_dict(facts["fingerprint"]),
            tuple(Choice(**c) for c in facts["choices"]),
        )
        whole = (
            router.centroids.shape == (len(router.owners), len(router.centre))
            and router.owners.unique().tolist() == list(range(len(router.names)))
            and router.pooling in POOLINGS
        )
    except (SafetensorError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFileError(f"{folder} does not hold a whole router ({e}); fit it again.") from e
    if not whole:
        raise CorruptFileError(f"{folder} holds a router whose parts do not fit; fit it again.")
    if model is not None:
        sentence = router.fingerprint.mismatch(fingerprint_model(model))
        if sentence:
            raise BadInputError(f"This router was made with another base: {sentence}")
    return router
