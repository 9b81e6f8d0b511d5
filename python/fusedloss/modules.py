"""The losses as modules, with the options of the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fusedloss import functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BrierLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "MSELoss",
    "SegmentationLoss",
    "SoftIoULoss",
    "TverskyLoss",
]


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


class _SegmentationModule(nn.Module):
    """A loss on probabilities whose options are those of its function.

    ``weight`` and ``pos_weight`` are buffers: they move with ``.to()`` and are part of the ``state_dict``.
    """

    _function: ClassVar[Callable[..., Any]]
    _buffer_names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in self._buffer_names:
            self.register_buffer(name, options.pop(name))
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, input: Tensor, target: Tensor, pixel_weight: Tensor | None = None) -> Any:
        options = {name: getattr(self, name) for name in (*self._buffer_names, *self._option_names)}
        return type(self)._function(input, target, pixel_weight=pixel_weight, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._option_names)


class _OverlapModule(_SegmentationModule):
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        activation: str = "softmax",
        ignore_index: int = -100,
        classes: Sequence[int] | None = None,
        per_image: bool = False,
        absent: str = "skip",
        smooth: float = 0.0,
        eps: float = 1e-7,
        log: bool = False,
        gamma: float = 1.0,
        intersection: str = "min",
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            activation=activation,
            ignore_index=ignore_index,
            classes=classes,
            per_image=per_image,
            absent=absent,
            smooth=smooth,
            eps=eps,
            log=log,
            gamma=gamma,
            intersection=intersection,
            reduction=reduction,
            process_group=process_group,
        )


class SoftIoULoss(_OverlapModule):
    """:func:`fusedloss.soft_iou_loss` as a module; ``forward(input, target, pixel_weight=None)``.

    >>> SoftIoULoss(ignore_index=255, per_image=True)  # doctest: +ELLIPSIS
    SoftIoULoss(activation='softmax', ignore_index=255, classes=None, per_image=True, ...)
    """

    _function = staticmethod(functional.soft_iou_loss)


class DiceLoss(_OverlapModule):
    """:func:`fusedloss.dice_loss` as a module; ``forward(input, target, pixel_weight=None)``."""

    _function = staticmethod(functional.dice_loss)


class TverskyLoss(_SegmentationModule):
    """:func:`fusedloss.tversky_loss` as a module; ``forward(input, target, pixel_weight=None)``."""

    _function = staticmethod(functional.tversky_loss)
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float,
        beta: float,
        activation: str = "softmax",
        ignore_index: int = -100,
        classes: Sequence[int] | None = None,
        per_image: bool = False,
        absent: str = "skip",
        smooth: float = 0.0,
        eps: float = 1e-7,
        log: bool = False,
        gamma: float = 1.0,
        intersection: str = "min",
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            alpha=alpha,
            beta=beta,
            activation=activation,
            ignore_index=ignore_index,
            classes=classes,
            per_image=per_image,
            absent=absent,
            smooth=smooth,
            eps=eps,
            log=log,
            gamma=gamma,
            intersection=intersection,
            reduction=reduction,
            process_group=process_group,
        )


class BrierLoss(_SegmentationModule):
    """:func:`fusedloss.brier_loss` as a module; ``forward(input, target, pixel_weight=None)``."""

    _function = staticmethod(functional.brier_loss)
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        activation: str = "softmax",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            weight=weight,
            activation=activation,
            ignore_index=ignore_index,
            reduction=reduction,
        )


class SegmentationLoss(_SegmentationModule):
    """:func:`fusedloss.segmentation_loss` as a module; ``forward(input, target, pixel_weight=None)``.

    >>> import torch
    >>> criterion = SegmentationLoss(cross_entropy=1.0, iou=0.5, ignore_index=255)
    >>> logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    >>> criterion(logits, labels)
    tensor(1.4319)
    """

    _function = staticmethod(functional.segmentation_loss)
    _buffer_names = ("weight", "pos_weight")
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        cross_entropy: float = 1.0,
        iou: float = 1.0,
        brier: float = 0.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        label_smoothing: float = 0.0,
        pos_weight: Tensor | None = None,
        activation: str = "softmax",
        ignore_index: int = -100,
        classes: Sequence[int] | None = None,
        per_image: bool = False,
        absent: str = "skip",
        smooth: float = 0.0,
        eps: float = 1e-7,
        log: bool = False,
        gamma: float = 1.0,
        intersection: str = "min",
        return_terms: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            weight=weight,
            cross_entropy=cross_entropy,
            iou=iou,
            brier=brier,
            alpha=alpha,
            beta=beta,
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            activation=activation,
            ignore_index=ignore_index,
            classes=classes,
            per_image=per_image,
            absent=absent,
            smooth=smooth,
            eps=eps,
            log=log,
            gamma=gamma,
            intersection=intersection,
            return_terms=return_terms,
            process_group=process_group,
        )
