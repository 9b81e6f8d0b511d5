"""The losses as modules, with the options of the functions."""

from __future__ import annotations

from torch import Tensor, nn

from fusedloss import functional

__all__ = ["CrossEntropyLoss", "MSELoss"]


class CrossEntropyLoss(nn.Module):
    """:func:`fusedloss.cross_entropy` as a module, a drop-in twin of :class:`torch.nn.CrossEntropyLoss`.

    ``weight`` is a buffer: it moves with ``.to()`` and is part of the ``state_dict``.

    >>> CrossEntropyLoss(ignore_index=255)
    CrossEntropyLoss(ignore_index=255, reduction='mean', label_smoothing=0.0)
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class MSELoss(nn.Module):
    """:func:`fusedloss.mse_loss` as a module, a drop-in twin of :class:`torch.nn.MSELoss`, also with ``weight``.

    >>> MSELoss()
    MSELoss(reduction='mean')
    """

    weight: Tensor | None

    def __init__(self, *, reduction: str = "mean", weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction, weight=self.weight)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
