"""What only a GPU can show: the kernels of own slots, and real CUDA graphs against plain passes."""

import pytest
import torch
from serve_models import llama, make_adapter

from lora_kit.lora import read_adapter
from lora_kit.serve.decoder import Decoder
from lora_kit.serve.mixed import MixedLora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rank", "width", "out_widths"),
    [(16, 576, (192, 576, 192)), (21, 300, (130, 70)), (4, 96, (8,))],
)
def test_each_row_is_multiplied_by_its_own_slot(dtype, rank, width, out_widths):
    kernels = pytest.importorskip("lora_kit.serve.kernels")
    place = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(0)}
    x = torch.randn(5, width, **place).to(dtype)
    layers = len(out_widths)
    a = (0.1 * torch.randn(layers, 4, rank, width, **place)).to(dtype)
    factors = [(0.1 * torch.randn(4, rank, n, **place)).to(dtype) for n in out_widths]
    firsts = [sum(out_widths[i + 1 :]) for i in range(layers)]  # the last comes first
    before = torch.randn(5, sum(out_widths), **place).to(dtype)
    own = torch.tensor([0, 3, -1, 2, 3], device="cuda")
    hidden = kernels.first_products(x, a, own)
    together, alone, wanted = before.clone(), before.clone(), before.double()
    kernels.add_second_products(hidden, factors, own, together, firsts)
    for layer, (b, first) in enumerate(zip(factors, firsts, strict=True)):
        part = slice(first, first + b.shape[2])
        kernels.add_second_products(hidden[:, layer:], [b], own, alone, [first])
        for row, slot in enumerate(own.tolist()):
            if slot >= 0:
                low = x[row].double() @ a[layer, slot].double().T
                wanted[row, part] += low @ b[slot].double()
    for out in (together, alone):
        assert torch.equal(out[2], before[2])
        tolerance = 4e-3 if dtype == torch.float16 else 1e-4
        torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


def test_replayed_passes_answer_as_plain_ones(tmp_path):
    folders = [make_adapter(tmp_path / f"a{i}", 4, "all", i) for i in range(2)]
    both = []
    for graphs in (None, False):
        model = llama().half().cuda()
        mixed = MixedLora(model)
        for i, folder in enumerate(folders):
            mixed.put(f"a{i}", mixed.factors(read_adapter(folder)))
        both.append(Decoder(model, mixed, rows=4, graphs=graphs))
    keys = []
    for prompt, key in (([1, 2, 3], "a0"), ([4, 5], None), ([6] * 70, "a1"), ([7, 8], "a0")):
        for decoder in both:
            decoder.prefill([prompt], [key])
        keys.append(key)
        for token in range(4):
            ours, plain = (decoder.step([token] * len(keys), keys) for decoder in both)
            torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    assert both[0].graphs.recorded
    assert not both[0].graphs.broken
