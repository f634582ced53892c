"""Mixed batches: every row as if its adapter had the batch to itself."""

import itertools
import random
import threading
import weakref

import pytest
import torch
from lora_fixtures import close
from serve_models import llama, make_adapter

from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.lora import LoraSpec, add_lora, load_lora, read_adapter
from lora_kit.lora_base import keep_from_repacking
from lora_kit.lora_targets import linear_layers
from lora_kit.serve.gathered import (
    PRODUCT_TOKENS,
    SHARED_TOKENS,
    SLOT_TOKENS,
    _order_of,
    _runs,
)
from lora_kit.serve.mixed import PLANS_KEPT, MixedLora

ADAPTERS = {  # rank, placement, options: all that one batch may hold at once
    "all4": (4, "all", {}),
    "all1": (1, "all", {}),
    "attention8": (8, "attention", {}),
    "mlp2": (2, "mlp", {}),
    "q16": (16, "q_proj", {}),
    "qv3": (3, ["q_proj", "v_proj"], {}),
    "head2": (2, "lm_head", {}),
    "scaled": (4, "attention", {"rslora": True}),
    "pissa": (2, "attention", {"init": "pissa"}),
    "up5": (5, ["up_proj"], {}),
    "all4b": (4, "all", {}),
    "all4c": (4, "all", {}),
    "all4d": (4, "all", {}),
}
MIXES = [
    ["all4"] * 5,
    [None] * 5,
    ["all4", None, "all4", None, None],
    ["all1", "attention8", "mlp2", "q16", None],
    ["qv3", "head2", "scaled", "pissa", "up5"],
    ["q16", "qv3", "q16", None, "attention8"],
    ["up5", None, "mlp2", "up5", None],
    # Neighbours in one page with one, two and six rows: padded products, and one by itself.
    ["all4", "all4b", "all4b", "all4d", *["all4c"] * 6, None, "all4"],
    ["all4d", "all4c", "all4b", "all4"],
    ["all4", "all4", "all4b", "all4b"],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(root / name, rank, targets, i, **options)
        for i, (name, (rank, targets, options)) in enumerate(ADAPTERS.items())
    }


def build(kind):
    model = llama()
    if kind == "nf4":
        from lora_kit.linear4bit import NF4Linear
        from lora_kit.lora_state import swap_module

        for path, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and "lm_head" not in path:
                swap_module(model, path, NF4Linear.from_linear(layer, block_size=64))
    if kind == "bitsandbytes":
        import bitsandbytes as bnb

        from lora_kit.lora_state import swap_module

        for path, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear and "lm_head" not in path:
                kind_of = {"quant_type": "nf4", "compress_statistics": False}
                made = bnb.nn.Linear4bit(
                    *(layer.in_features, layer.out_features, False),
                    compute_dtype=torch.float32,
                    **kind_of,
                )
                weight = layer.weight.data.clone()
                made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kind_of)
                swap_module(model, path, made.to("cpu"))
        model.eval()
    return model.to({"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float32))


def ids(rows, columns, seed=1):
    return torch.randint(64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def alone(kind, folders, names, batch):
    """Each row by itself, its adapter loaded the ordinary way."""
    rows = []
    for name, row in zip(names, batch, strict=True):
        model = build(kind)
        for layer in linear_layers(model).values():
            keep_from_repacking(layer)
        if name is not None:
            load_lora(model, folders[name])
        with torch.inference_mode():
            rows.append(model(row[None]).logits[0])
    return torch.stack(rows)


def both_ways(folders):
    made = {}
    for way, masked in (("gathered", False), ("masked", True)):
        made[way] = MixedLora(build("float32"), masked=masked)
        for name, folder in folders.items():
            made[way].put(name, made[way].factors(read_adapter(folder)))
    return made


@pytest.fixture(scope="module")
def ways(folders):
    return both_ways(folders)


@pytest.fixture
def dense(ways):
    return ways["gathered"]


@pytest.mark.parametrize("way", ["gathered", "masked"])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("names", MIXES, ids=str)
def test_every_row_is_as_alone(ways, folders, names, tokens, way):
    dense = ways[way]
    batch = ids(len(names), tokens)
    with torch.inference_mode(), dense.rows(names):
        together = dense.model(batch).logits
    close(together, alone("float32", folders, names, batch), 1e-5)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("nf4", 1e-5), ("bitsandbytes", 1e-5), ("float16", 4e-3), ("bfloat16", 3e-2)],
)
@pytest.mark.parametrize("masked", [False, True], ids=["gathered", "masked"])
def test_over_every_kind_of_base(folders, kind, tolerance, masked):
    names = ["all4", None, "attention8", "qv3", "all4b"]
    mixed = MixedLora(build(kind), masked=masked)
    for name in filter(None, names):
        mixed.put(name, mixed.factors(read_adapter(folders[name])))
    for tokens in (1, 6):
        batch = ids(5, tokens)
        with torch.inference_mode(), mixed.rows(names):
            together = mixed.model(batch).logits
        expected = alone(kind, folders, names, batch)
        close(together.float(), expected.float(), tolerance)


def test_outside_of_rows_and_after_close_the_base_answers(folders):
    model = llama()
    batch = ids(3, 5)
    with torch.inference_mode():
        bare = model(batch).logits
        mixed = MixedLora(model)
        mixed.put("a", mixed.factors(read_adapter(folders["all4"])))
        assert torch.equal(model(batch).logits, bare)
        with mixed.rows(["a", None, "a"]):
            assert not torch.equal(model(batch).logits, bare)
            with mixed.rows([None] * 3):  # its products made another way
                close(model(batch).logits, bare, 1e-5)
            assert not torch.equal(model(batch).logits, bare)
        assert torch.equal(model(batch).logits, bare)
        mixed.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_another_thread_meets_the_base(dense):
    batch, found = ids(2, 4), {}

    def other():
        with torch.inference_mode():
            found["other"] = dense.model(batch).logits

    with torch.inference_mode():
        bare = dense.model(batch).logits
        with dense.rows(["all4", "mlp2"]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert torch.equal(found["other"], bare)


@pytest.mark.parametrize("masked", [False, True], ids=["gathered", "masked"])
def test_another_adapters_overflow_is_not_this_rows(folders, masked):
    """In half precision an adapter may overflow on an input it never serves."""
    mixed = MixedLora(build("float16"), masked=masked)
    for name in ("all4", "all4b"):
        mixed.put(name, mixed.factors(read_adapter(folders[name])))
    page, slot = mixed.slots.at["all4b"]
    assert mixed.slots.at["all4"][0] is page
    for a in page.a.values():
        a[:, slot].mul_(3e4)
    batch = ids(2, 3)
    with torch.inference_mode():
        with mixed.rows(["all4", "all4b"]):
            together = mixed.model(batch).logits
        with mixed.rows(["all4", None]):
            without = mixed.model(batch).logits
    assert not torch.isfinite(together[1]).all()  # the test does reach an overflow
    assert torch.isfinite(together[0]).all()
    close(together[0].float(), without[0].float(), 4e-3)


@pytest.mark.parametrize(
    ("names", "tokens", "products"),
    [  # of one layer: (batched products, single ones)
        (["all4", "all4b", "all4c", "all4d"], 1, (0, 4)),  # so few rows are not gathered
        (["all4", "all4", None], 1, (0, 2)),
        (["all4", "all4b", "all4c", "all4d"], 2, (1, 0)),
        (["all4", "all4b", "all4c", "all4d"] * 2, 1, (1, 0)),
        (["all4", "all4", "all4c", "all4d"], 2, (1, 0)),  # all4b's slot between is read in vain
        (["all4"] * 4, 1, (0, 1)),
        (["all4"] * 5, 1, (0, 1)),
        (["all4"] * 5 + ["all4b", "all4c"], 1, (1, 0)),
        (["all4"] * 20 + ["all4b", "all4c"], 1, (1, 1)),
        (["all4"] * 20 + ["all4b"] * 20, 1, (1, 0)),
        (["all4", "all4b"], 64, (1, 0)),
        (["all4", "all4b"], 65, (0, 2)),
    ],
)
def test_neighbours_share_a_product(folders, names, tokens, products):
    mixed = MixedLora(build("float32"), masked=False)
    for name in ("all4", "all4b", "all4c", "all4d"):
        mixed.put(name, mixed.factors(read_adapter(folders[name])))
    batch = mixed._plan(tuple(names))
    order = _order_of(batch, batch.by_path["model.layers.0.mlp.up_proj"], tokens)
    many = sum(part.last - part.first > 1 for part in order.parts)
    assert (many, len(order.parts) - many) == products
    rows = {row for part in order.parts for row in range(part.start, part.stop)}
    assert sorted(rows) == list(range(order.places))  # every place is made by one product


@pytest.mark.parametrize("tokens", [1, 3, 40, 100])
def test_the_products_of_a_plan_cost_least(tokens):
    """Against every way to cut the slots in play into runs."""
    draw = random.Random(tokens)

    def cost(first, last, width):
        return PRODUCT_TOKENS + (last - first) * (width * tokens + SLOT_TOKENS)

    for _ in range(40):
        slots = sorted(draw.sample(range(20), draw.randint(1, 7)))
        rows = {slot: draw.choice((1, 1, 2, 3, 9, 30)) for slot in slots}
        ways = []
        for cuts in itertools.product((False, True), repeat=len(slots) - 1):
            runs = [[slots[0]]]
            for slot, cut in zip(slots[1:], cuts, strict=True):
                runs.append([slot]) if cut else runs[-1].append(slot)
            found = [(r[0], r[-1] + 1, max(rows[s] for s in r)) for r in runs]
            shared = [w for (_, _, w), run in zip(found, runs, strict=True) if len(run) > 1]
            if all(w * tokens <= SHARED_TOKENS for w in shared):
                ways.append(sum(cost(*run) for run in found))
        found = _runs(rows, tokens)
        assert sum(cost(*run) for run in found) == min(ways)
        held = [slot for first, last, _ in found for slot in range(first, last) if slot in rows]
        assert held == slots
        assert all(
            rows[s] <= w for first, last, w in found for s in range(first, last) if s in rows
        )


def test_masked_layers_that_share_an_input_share_the_first_product(ways, monkeypatch):
    products = []
    plain = torch.Tensor.mm
    monkeypatch.setattr(
        torch.Tensor, "mm", lambda a, b, *rest: products.append(1) or plain(a, b, *rest)
    )
    with torch.inference_mode(), ways["masked"].rows(["all4", "all4b"]):
        ways["masked"].model(ids(2, 1))
    # Two layers; q-k-v, o, gate-up and down each have one product besides the one added in place.
    assert len(products) == 2 * 4


def test_plans_are_kept_and_bounded(dense):
    dense._plans.clear()
    for names in (["all4"], ["all4", None], ["all1"], ["all4"]):
        with dense.rows(names):
            pass
    assert list(dense._plans) == [("all4", None), ("all1",), ("all4",)]  # the last one used last
    for count in range(1, 2 * PLANS_KEPT):
        with dense.rows(["q16"] * count):
            pass
    assert len(dense._plans) == PLANS_KEPT


def test_slots_are_used_again_and_pages_given_back(folders):
    mixed = MixedLora(llama())
    factors = mixed.factors(read_adapter(folders["all4"]))
    other = mixed.factors(read_adapter(folders["qv3"]))
    whole = mixed.slots.page_slots
    for i in range(whole + 2):
        mixed.put(f"a{i}", factors)
    mixed.put("other", other)
    pages = mixed.slots.pages[factors.shape]
    assert [len(p.free) for p in pages] == [0, whole - 2]
    mixed.drop("a2")
    mixed.put("again", factors)
    assert mixed.slots.at["again"] == (pages[0], 2)
    for name in (f"a{whole}", f"a{whole + 1}"):
        mixed.drop(name)
    assert mixed.slots.pages[factors.shape] == [pages[0]]
    mixed.drop("other")
    assert other.shape not in mixed.slots.pages


def test_dropping_forgets_what_was_stacked(folders):
    mixed = MixedLora(llama())
    factors = {n: mixed.factors(read_adapter(folders[n])) for n in ("all4", "all1")}
    mixed.put("x", factors["all4"])
    batch = ids(1, 4)
    with torch.inference_mode():
        with mixed.rows(["x"]):
            first = mixed.model(batch).logits
        mixed.drop("x")
        with pytest.raises(UnknownNameError, match="Unknown adapter 'x'"), mixed.rows(["x"]):
            pass
        mixed.put("x", factors["all1"])
        with mixed.rows(["x"]):
            assert not torch.equal(mixed.model(batch).logits, first)
    assert mixed.names == ["x"]


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_slot_used_again_never_answers_with_what_lay_there(folders, tokens):
    """What a plan has cut out of a page must go with the adapter it was cut for."""
    mixed = MixedLora(llama(), masked=False)
    factors = {n: mixed.factors(read_adapter(folders[n])) for n in ("all4", "all4b", "all4c")}
    for name in ("all4", "all4b"):
        mixed.put(name, factors[name])
    batch = ids(2, tokens)

    def answer(*names):
        with torch.inference_mode(), mixed.rows(list(names)):
            return mixed.model(batch).logits.clone()

    answer("all4", "all4b"), answer("all4b", "all4b")
    page, slot = mixed.slots.at["all4b"]
    mixed.drop("all4b")
    mixed.put("all4b", factors["all4c"])  # another's numbers under the same name, in the same slot
    assert mixed.slots.at["all4b"] == (page, slot)
    fresh = MixedLora(llama(), masked=False)
    for name, key in (("all4", "all4"), ("all4b", "all4c")):
        fresh.put(name, factors[key])
    for names in (["all4", "all4b"], ["all4b", "all4b"]):
        with torch.inference_mode(), fresh.rows(names):
            assert torch.equal(answer(*names), fresh.model(batch).logits)
    kept = weakref.ref(page.b["model.layers.0.mlp.up_proj"])
    for name in ("all4", "all4b"):
        mixed.drop(name)
    del page
    assert kept() is None  # nor does a plan keep a page that nobody uses


def test_slots_that_nobody_has_filled_are_not_read(folders):
    mixed = MixedLora(llama(), masked=False)
    for name in ("all4", "all4b", "all4c"):
        mixed.put(name, mixed.factors(read_adapter(folders[name])))
    page, slot = mixed.slots.at["all4b"]
    mixed.drop("all4b")
    for path in page.place:
        for factor in page.slot(path, slot):
            factor.fill_(float("nan"))
        page.b[path][3:] = float("nan")
    names, batch = ["all4", "all4c", None], ids(3, 1)
    with torch.inference_mode(), mixed.rows(names):
        together = mixed.model(batch).logits
    close(together, alone("float32", folders, names, batch), 1e-5)


def test_what_does_not_fit_is_refused(folders, tmp_path):
    mixed = MixedLora(llama())
    other = make_adapter(tmp_path / "other", 4, "all", 0, base=5)
    with pytest.raises(BadInputError, match="trained on another base"):
        mixed.factors(read_adapter(other))
    dora = make_adapter(tmp_path / "dora", 4, "all", 0, dora=True)
    with pytest.raises(BadInputError, match="DoRA"):
        mixed.factors(read_adapter(dora))
    files = read_adapter(folders["all4"])
    for parts in files.tensors.values():
        parts["lora_A"] = parts["lora_A"][:, :-1]
    with pytest.raises(BadInputError, match=r"for model\.layers.* belongs to another base"):
        mixed.factors(files)
    mixed.put("a", mixed.factors(read_adapter(folders["all4"])))
    with pytest.raises(BadInputError, match="there already"):
        mixed.put("a", mixed.factors(read_adapter(folders["all4"])))
    with pytest.raises(UnknownNameError, match="Unknown adapter 'b'"):
        mixed.drop("b")
    with pytest.raises(BadInputError, match="carries adapters already"):
        MixedLora(add_lora(llama(), LoraSpec(2, 2), seed=0))


def test_bytes_are_those_of_the_factors(folders):
    mixed = MixedLora(llama())
    files = read_adapter(folders["attention8"])
    numbers = sum(t.numel() for parts in files.tensors.values() for t in parts.values())
    assert mixed.factors(files).bytes == 4 * numbers
