"""The one place that says how close is close enough.

The truth is the reference in float64, from the same numbers as the tested call got. Two errors are granted:

- what PyTorch's own operation makes on the same call, or one rounding to the result's dtype, whichever is more;
- a few roundings of the dtype that is computed in, relative to the largest value of the tensor, because a sum that
  is taken in another order differs by that much.

Half dtypes are computed in float32, so there PyTorch's error grants nothing: what it loses by summing in half is not
lost here.
"""

import torch
from torch import Tensor

# Roundings in the dtype that is computed in: an exponential (half a rounding for every unit of its argument), a
# logarithm, a product and a difference, of which the tensor's largest value may be a tenth.
COMPUTE_ROUNDINGS = 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def allowed_error(truth: Tensor, dtype: torch.dtype, theirs: Tensor | None = None, scale: float = 0.0) -> Tensor:
    """For every element of ``truth`` (float64), how far a result of ``dtype`` may be from it.

    scale: size of the numbers whose difference the result is, where they cancel in the whole tensor.
    """
    info = torch.finfo(dtype)
    magnitude = torch.where(truth.isfinite(), truth, 0.0).abs()
    allowed = magnitude * info.eps + info.smallest_normal * info.eps  # one rounding, also below the normal numbers
    if theirs is not None and dtype == compute_dtype(dtype) and truth.numel():
        error = (theirs.double() - truth).abs()
        allowed = allowed.clamp_min(torch.where(error.isfinite(), error, 0.0).max().item())
    largest = max(scale, magnitude.max().item() if truth.numel() else 0.0)
    return allowed + COMPUTE_ROUNDINGS * torch.finfo(compute_dtype(dtype)).eps * largest


def assert_no_worse(ours: Tensor, theirs: Tensor | None, truth: Tensor, what: str = "", scale: float = 0.0) -> None:
    """``ours`` is as close to the truth as PyTorch's own operation; NaN and infinity stand where the truth has them."""
    assert truth.dtype == torch.float64
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    ours, truth = ours.detach(), truth.detach()
    theirs = None if theirs is None else theirs.detach()
    expected = truth.to(ours.dtype).double()  # a number too large for the dtype is infinite there
    got = ours.double()
    allowed = allowed_error(truth, ours.dtype, theirs, scale)
    special = ~expected.isfinite() | ~got.isfinite()
    same = (expected == got) | (expected.isnan() & got.isnan())
    error = (got - truth).abs()
    bad = torch.where(special, ~same, error > allowed)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements differ; first at {where}: "
            f"got {got[where].item()!r}, expected {truth[where].item()!r}"
            + ("" if theirs is None else f", torch gives {theirs[where].item()!r}")
            + f" (allowed error {allowed[where].item():.3g})"
        )
