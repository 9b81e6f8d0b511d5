"""Fused losses for PyTorch: hand-written kernels, forward and backward, under torch's own names."""

from importlib.metadata import version as _version

from fusedloss import reference
from fusedloss._ops import show_config
from fusedloss.functional import cross_entropy, mse_loss
from fusedloss.modules import CrossEntropyLoss, MSELoss

__version__ = _version("fusedloss")

__all__ = [
    "CrossEntropyLoss",
    "MSELoss",
    "__version__",
    "cross_entropy",
    "mse_loss",
    "reference",
    "show_config",
]
