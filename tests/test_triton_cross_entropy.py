"""The Triton loss is cross_entropy, with the same gradients; without a GPU, Triton interprets it."""

import pytest
import torch
from conftest import T, loud
from test_triton_step import DEVICE
from torch.testing import assert_close

from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.training import triton_cross_entropy
from lightning_gpt.training.losses import features_loss


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("V", [7, 16, 37])
def test_the_triton_loss_and_its_gradients_are_those_of_cross_entropy(V, ignored, monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "BLOCK", 16)
    net = loud(GPT(GPTConfig(V, T, n_layer=1, n_head=2, n_embd=16, dropout=0.0, tie_embeddings=True))).to(DEVICE)
    x, y = torch.randint(V, (2, 2, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y[0, :ignored] = -100
    results = []
    for loss_of in features_loss, triton_cross_entropy.fused_features_loss:
        net.zero_grad()
        loss = loss_of(net, net.features(x), y)
        (3 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
