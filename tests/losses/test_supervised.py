"""Losses of demonstrations: values worked by hand, gradients from their definition, laws."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.losses import LOSSES, SUPERVISED_LOSSES
from tests.losses.no_sync import NoSync

# Two answers of the research file: tokens of ln p = -1/2, -1, -2 and -1/10, -1/5.
TOKENS = [-0.5, -1.0, -2.0, -0.1, -0.2]
GOLDENS = {
    "nll": 0.76,  # 3.8 / 5; the mean of the two answers' means would be 0.6583333
    # (0.5 e^-0.5 + e^-1 + 2 e^-2 + 0.1 e^-0.1 + 0.2 e^-0.2) / 5
    "dft": (0.3032653 + 0.3678794 + 0.2706706 + 0.0904837 + 0.1637462) / 5,
}


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_goldens(name) -> None:
    row = SUPERVISED_LOSSES[name]
    found = row(torch.tensor(TOKENS, dtype=torch.float64)).mean().item()
    assert found == pytest.approx(GOLDENS[name], abs=1e-7)
    assert found == pytest.approx(row.golden, abs=1e-7)
    assert row.name == name and name not in LOSSES and "arXiv:" in row.paper


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_the_gradient_in_the_logits_is_that_of_the_paper(name) -> None:
    """softmax - onehot for the likelihood, and p times that for DFT: that of -p itself."""
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    token = torch.tensor([0, 3, 3, 6])
    probability = logits.detach().softmax(-1)
    (found,) = torch.autograd.grad(
        SUPERVISED_LOSSES[name](logits.log_softmax(-1)[range(4), token]).sum(), logits
    )
    onehot = torch.nn.functional.one_hot(token, 7).double()
    expected = probability - onehot
    if name == "dft":
        expected = expected * probability[range(4), token][:, None]
        (of_p,) = torch.autograd.grad(-logits.softmax(-1)[range(4), token].sum(), logits)
        torch.testing.assert_close(found, of_p)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SUPERVISED_LOSSES)
def test_laws(name) -> None:
    """No token's loss depends on another's; none is negative; certainty costs nothing; and the
    additive ones are those of which a sum's loss is the sum of losses.
    """
    row, x = SUPERVISED_LOSSES[name], torch.tensor(TOKENS, dtype=torch.float64)
    alone = torch.stack([row(one) for one in x])
    assert torch.equal(row(x), alone) and (alone > 0).all()
    assert row(torch.zeros(1)).item() == 0
    assert math.isclose(row(x.sum()).item(), alone.sum().item(), abs_tol=1e-12) == row.additive
    x.requires_grad_()
    with NoSync():
        torch.autograd.grad(row(x).sum(), x)


def test_dft_leaves_alone_what_the_model_holds_for_impossible() -> None:
    x = torch.tensor([-60.0, -0.1], requires_grad=True)
    (gradient,) = torch.autograd.grad(SUPERVISED_LOSSES["dft"](x).sum(), x)
    assert abs(gradient[0]) < 1e-20 and gradient[1].item() == pytest.approx(-math.exp(-0.1))
