"""int8 weights on a CPU: exact products of the rounded weights, and the same text with a cache."""

import json
from copy import deepcopy

import pytest
import torch
from conftest import MODERN, T, V, loud
from torch import nn
from torch.nn import functional as F

from lightning_gpt.checkpoint.io import read_plain
from lightning_gpt.cli.main import main
from lightning_gpt.errors import warn_once
from lightning_gpt.inference.engine import generate_ids
from lightning_gpt.inference.text import PACKAGED_CHECKPOINT, in_precision, load
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.model.int8 import MAX_ROWS, Int8Linear, build_kernel, quantize_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("K", "N"), [(40, 1), (40, 64), (41, 65), (47, 384)])
@pytest.mark.parametrize("compiler", ["c++", "no compiler"])
def test_a_layer_multiplies_by_its_dequantized_weights(K, N, bias, compiler, monkeypatch, capsys, request):
    monkeypatch.setenv("CXX", compiler)
    build_kernel.cache_clear()
    request.addfinalizer(build_kernel.cache_clear)  # other tests have a compiler
    warn_once.cache_clear()
    torch.manual_seed(N)
    linear = nn.Linear(K, N, bias=bias)
    values, scales = quantize_rows(linear.weight.detach())
    int8 = deepcopy(Int8Linear(linear))  # a copy does not use the weights of the original
    assert ("install g++ or clang" in capsys.readouterr().err) == (compiler == "no compiler")
    for shape in (K,), (1, K), (3, 2, K), (2, MAX_ROWS, K):
        x = torch.randn(*shape, 2)[..., 0]  # not contiguous
        expected = F.linear(x.double(), values.double() * scales[:, None], linear.bias.double() if bias else None)
        torch.testing.assert_close(int8(x), expected.float(), rtol=1e-5, atol=1e-5)


def test_int8_values_are_within_half_a_step_of_the_weights():
    w = torch.randn(5, 30) * torch.tensor([[1e-3], [1.0], [100.0], [1.0], [0.0]])
    values, scales = quantize_rows(w)
    assert ((values * scales[:, None] - w).abs() <= 0.501 * scales[:, None]).all()
    assert (values.abs().amax(1) == torch.tensor([127, 127, 127, 127, 0])).all()


@pytest.mark.parametrize("overrides", [{}, MODERN, {"tie_embeddings": True, "activation": "swiglu", "bias": False}])
@pytest.mark.parametrize("rows", [1, 3])
def test_int8_text_is_the_same_with_and_without_a_cache(overrides, rows):
    config = GPTConfig(V, T, **{"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0} | overrides)
    net = in_precision(loud(GPT(config)).float(), "int8")
    assert not any(isinstance(module, nn.Linear) for module in net.modules())
    idx = torch.randint(V, (rows, 3), generator=torch.Generator().manual_seed(2))
    cached, full = (
        generate_ids(net, idx, 2 * T, use_cache=use, context_shift=T // 2, generator=torch.Generator().manual_seed(0))
        for use in (True, False)
    )
    assert torch.equal(cached, full)


def test_tied_embeddings_keep_float32_where_the_head_is_int8():
    net = loud(GPT(GPTConfig(V, T, 1, 2, 16, dropout=0.0, tie_embeddings=True))).float()
    before = net.wte.weight.clone()
    in_precision(net, "int8")
    assert torch.equal(net.wte.weight, before) and isinstance(net.lm_head, Int8Linear)


def test_an_int8_checkpoint_is_used_as_it_is():
    stored = read_plain(PACKAGED_CHECKPOINT.read_bytes())
    net, _ = load(PACKAGED_CHECKPOINT, "cpu")
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            values, scales = quantize_rows(module.weight.detach())
            assert torch.equal(values, stored["state_dict"][f"net.{name}.weight"])
            torch.testing.assert_close(scales, stored["scales"][f"net.{name}.weight"], rtol=3e-7, atol=0)


def test_int8_is_refused_where_there_is_no_cpu():
    with torch.device("meta"):
        net = GPT(GPTConfig(V, T, 1, 2, 16))
    with pytest.raises(ValueError, match="precision=int8 is for a CPU, not meta: add device=cpu"):
        in_precision(net, "int8")


def test_generate_takes_int8_and_says_so(capsys):
    main(["generate", "ROMEO:", "--precision=int8", "--device=cpu", "--max_new_tokens=5", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["precision"] == "int8" and len(result["samples"][0]["tokens"]) == 5
