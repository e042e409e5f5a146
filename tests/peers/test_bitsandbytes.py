"""Agreement with bitsandbytes' CPU build, bit for bit: codes, scales, values, and the linear map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectra.methods import QLoRA, inject, save_adapter
from spectra.quantize import INT8, QuantizedLinear, quantize
from spectra.quantize.scales import DoubleScales, dynamic_map

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [64, 128, 256, 512, 1024, 2048, 4096]


def weights(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Gaussian, with a block of zeros, a constant one, and blocks of very different size."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.03
    flat = w.view(-1)
    flat[4096:8192] = 0.0
    flat[8192:12288] = -0.02
    flat[12288:16384] *= 50.0
    return w.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The stored bits, so that zeros of either sign differ and nothing is compared by value."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_codes_scales_and_values(format, block, dtype, double):
    # 300 × 130: no block divides it; 256 × 1024: every one does, and their scales fill no block of 256 beyond 64.
    for shape in ((300, 130), (256, 1024)):
        w = weights(*shape, dtype=dtype)
        packed, state = functional.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type=format)
        q = quantize(w, format, block=block, double=double)
        assert torch.equal(q.codes, packed.view(-1))
        assert torch.equal(bits(q.scales.absmax), bits(state.absmax))
        if double:
            assert torch.equal(bits(q.scales.nested_absmax), bits(state.state2.absmax))
            assert torch.equal(bits(q.scales.offset), bits(state.offset))
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(bits(q.dequantize(backend="torch")), bits(theirs))
        assert torch.equal(bits(q.dequantize(backend="bitsandbytes")), bits(theirs))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_an_odd_number_of_entries(format):
    """There bitsandbytes leaves its kernel for Python, which drops the sign of FP4's second zero: values agree."""
    w = weights(129, 129, dtype=torch.float32)
    packed, state = functional.quantize_4bit(w, compress_statistics=True, quant_type=format)
    with torch.compiler.set_stance("force_eager"):  # that Python is compiled otherwise, for many seconds
        theirs = functional.dequantize_4bit(packed, state)
    q = quantize(w, format)
    assert torch.equal(q.codes, packed.view(-1))
    assert torch.equal(q.dequantize(), theirs)


def test_the_dynamic_map():
    assert torch.equal(torch.tensor(dynamic_map().levels), functional.create_dynamic_map())


def test_double_quantization_at_its_rounding_boundaries():
    """Scales spread over every code, a few float32 steps around each boundary, in the order of a real spread."""
    levels = torch.tensor(dynamic_map().levels)
    middles = (levels[:-1] + levels[1:]) / 2
    steps = torch.linspace(-1, 1, 65536)
    spread = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scales = torch.cat([middles, levels, steps, (steps[:-1] + steps[1:]) / 2, spread]) + 1.5
    ours = DoubleScales.of(scales)
    codes, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(ours.absmax, codes)
    assert torch.equal(ours.values(), functional.dequantize_blockwise(codes, state) + scales.mean())


def test_int8_is_blockwise_quantization_with_even_levels():
    """bitsandbytes looks up one of 65536 steps for its code: an entry near a boundary may land on the other side."""
    w = weights(256, 1024, dtype=torch.float32)
    q = quantize(w, "int8", double=False)
    codes, state = functional.quantize_blockwise(w, code=torch.tensor(INT8.levels), blocksize=64)
    ours, theirs = q.dequantize(), functional.dequantize_blockwise(codes, state)
    level = q.scales.values().repeat_interleave(64).view_as(w) / 127
    off = (ours - theirs).abs()
    assert bool((off <= 1.001 * level).all())  # one level, and two float32 roundings
    # 254 boundaries of 65536 steps: 0.4 % of the interval.
    assert float((off > 0).float().mean()) < 0.004


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_the_linear_map_and_its_gradient(dtype, double):
    torch.manual_seed(0)
    dense = nn.Linear(128, 96)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, compress_statistics=double, quant_type="nf4", compute_dtype=dtype)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu").to(dtype)
    ours = QuantizedLinear.of(dense, "nf4", double=double).to(dtype)
    x = torch.randn(4, 7, 128).to(dtype).requires_grad_()
    y = torch.randn(4, 7, 96).to(dtype)
    # One shape, one library, one product either way: the same bits.
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(*(torch.autograd.grad((m(x) * y).sum(), x)[0] for m in (ours, theirs)))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_qlora_opens_in_peft_on_a_bitsandbytes_base(tmp_path, rslora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rival = copy.deepcopy(model)
    injection = inject(model, "_proj$", QLoRA(rank=4, rslora=rslora))
    with torch.no_grad():
        for part in injection.parts.values():
            part.lora_B.normal_(0.0, 0.1)
    save_adapter(injection, tmp_path, base_model="base", task_type="CAUSAL_LM")
    for name in injection.parts:
        module = rival.get_submodule(name)
        four = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
        four.load_state_dict(module.state_dict())
        holder, _, attribute = name.rpartition(".")
        setattr(rival.get_submodule(holder), attribute, four.to("cpu"))
    rival.is_loaded_in_4bit = True
    opened = peft.PeftModel.from_pretrained(rival, tmp_path).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        # The update is added in one product here and by a product, a factor and a sum there.
        torch.testing.assert_close(model(input_ids=ids).logits, opened(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
