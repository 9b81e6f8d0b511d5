"""Fused losses for PyTorch: hand-written kernels, forward and backward, under torch's own names."""

from importlib.metadata import version as _version

from fusedloss import reference
from fusedloss._ops import show_config
from fusedloss.functional import (
    brier_loss,
    cross_entropy,
    dice_loss,
    mse_loss,
    overlap_statistics,
    segmentation_loss,
    soft_iou_loss,
    tversky_loss,
)
from fusedloss.labels import check_labels, set_label_checks
from fusedloss.memory import set_memory_reuse
from fusedloss.modules import (
    BrierLoss,
    CrossEntropyLoss,
    DiceLoss,
    MSELoss,
    SegmentationLoss,
    SoftIoULoss,
    TverskyLoss,
)

__version__ = _version("fusedloss")

__all__ = [
    "BrierLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "MSELoss",
    "SegmentationLoss",
    "SoftIoULoss",
    "TverskyLoss",
    "__version__",
    "brier_loss",
    "check_labels",
    "cross_entropy",
    "dice_loss",
    "mse_loss",
    "overlap_statistics",
    "reference",
    "segmentation_loss",
    "set_label_checks",
    "set_memory_reuse",
    "show_config",
    "soft_iou_loss",
    "tversky_loss",
]
