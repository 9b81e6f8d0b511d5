"""The losses that are trained: a sum of terms, by fusedloss or written in PyTorch, and the memory that it takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import fusedloss

# Cross-entropy, soft IoU loss, Brier loss.
TERMS = ("ce", "iou", "brier")
Terms = tuple[str, ...]
# From logits (N, C, H, W) and uint8 labels (N, H, W) to the loss and, where it has several terms, each of them.
Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def make_loss(
    name: str, terms: Terms, *, weight: Tensor | None, ignore_index: int, label_smoothing: float, compile: bool
) -> Loss:
    """The one place that knows which loss is trained."""

    def fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if terms == ("ce",):
            loss = fusedloss.cross_entropy(
                logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
            )
            return loss, {}
        loss, parts = fusedloss.segmentation_loss(
            logits,
            labels,
            weight,
            cross_entropy=1.0 if "ce" in terms else 0.0,
            iou=1.0 if "iou" in terms else 0.0,
            brier=1.0 if "brier" in terms else 0.0,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            return_terms=True,
        )
        return loss, {term: parts["cross_entropy" if term == "ce" else term] for term in terms if len(terms) > 1}

    def torch_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        labels = labels.long()  # F.cross_entropy and F.one_hot take no uint8
        parts: dict[str, Tensor] = {}
        if "ce" in terms:
            parts["ce"] = F.cross_entropy(
                logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing
            )
        if "iou" in terms or "brier" in terms:
            classes = logits.shape[1]
            class_weight = logits.new_ones(classes) if weight is None else weight
            counted = labels != ignore_index
            # float32 for the logits of bfloat16 training too, whose sums over all pixels would round to nothing.
            probability = logits.softmax(dim=1, dtype=torch.float32) * counted.unsqueeze(1)
            one_hot = F.one_hot(labels.where(counted, 0), classes).movedim(-1, 1).float() * counted.unsqueeze(1)
        if "iou" in terms:
            intersection = (probability * one_hot).sum(dim=(0, 2, 3))
            labelled = one_hot.sum(dim=(0, 2, 3))
            union = probability.sum(dim=(0, 2, 3)) + labelled - intersection
            present_weight = class_weight * (labelled > 0)
            iou = intersection / union.clamp_min(1e-7)
            parts["iou"] = (present_weight * (1 - iou)).sum() / present_weight.sum()
        if "brier" in terms:
            square = (probability - one_hot) ** 2
            parts["brier"] = (class_weight[:, None, None] * square).sum() / counted.sum()
        if len(parts) == 1:
            return next(iter(parts.values())), {}
        return torch.stack(list(parts.values())).sum(), {term: part.detach() for term, part in parts.items()}

    loss = {"fused": fused, "torch": torch_loss}[name]
    return torch.compile(loss) if compile else loss


def peak_bytes(loss: Loss, logits: Tensor, labels: Tensor) -> int:
    """The most memory that PyTorch's allocator had handed out at once during forward and backward of the loss, on top
    of what was there before. Read from the memory events in the trace of torch.profiler, which every tensor makes when
    it is allocated and when it is freed, whoever asked for it; but for memory that fusedloss reuses, so it may not."""

    def forward_and_backward() -> None:
        value, _ = loss(logits.detach().requires_grad_(), labels)
        value.backward()

    forward_and_backward()  # what the first time keeps for good is not part of a step
    before = fusedloss.set_memory_reuse(False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward()
    fusedloss.set_memory_reuse(before)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    allocated = np.cumsum([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    return int(max(allocated, default=0))
