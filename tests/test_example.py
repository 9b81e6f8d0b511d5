"""The training example computes the same losses with either library."""

import sys
from pathlib import Path

import pytest
import torch

from fusedloss import _C


@pytest.mark.parametrize("terms", [("ce",), ("iou",), ("brier",), ("ce", "iou"), ("ce", "iou", "brier")], ids="+".join)
def test_both_losses_of_the_example_agree(terms, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.delitem(sys.modules, "losses", raising=False)
    from losses import make_loss

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 12, 9, generator=generator)
    labels = torch.randint(0, 4, (2, 12, 9), generator=generator).to(torch.uint8)  # class 4 is absent
    labels[:, :3] = 255
    weight = torch.rand(5, generator=generator) + 0.1
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1, "compile": False}
    (fused, fused_terms), (plain, plain_terms) = (
        make_loss(name, terms, **options)(logits, labels) for name in ("fused", "torch")
    )
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused_terms, plain_terms, rtol=0, atol=1e-5)


def test_the_example_counts_the_gradient(monkeypatch):
    """Also one so large that its memory is reused, which torch's profiler does not see."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.delitem(sys.modules, "losses", raising=False)
    from losses import make_loss, peak_bytes

    loss = make_loss("fused", ("ce",), weight=None, ignore_index=255, label_smoothing=0.0, compile=False)
    logits = torch.randn(1, 3, 2048, 2048)
    assert logits.nbytes > _C.LEAST_REUSED_BYTES
    assert (
        logits.nbytes <= peak_bytes(loss, logits, torch.zeros(1, 2048, 2048, dtype=torch.uint8)) < 1.1 * logits.nbytes
    )
