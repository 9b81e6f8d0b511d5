"""The programs of docs/trainers.md run where their trainer is installed, and train."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedloss

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "trainers.md"
PROGRAMS = dict(re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL))
LIGHTNING, TRANSFORMERS = "Lightning", "Hugging Face's Trainer"

# Ours are errors here; theirs, at their import too, are their own.
pytestmark = pytest.mark.filterwarnings("ignore")


def need(*names):
    for name in names:
        pytest.importorskip(name, exc_type=ImportError, reason=f"{name} is not installed")


@pytest.fixture
def run_program(tmp_path, monkeypatch):
    """A function that runs a program, by its heading, in an empty folder. Returns its names."""
    monkeypatch.chdir(tmp_path)
    # Nothing is looked up in a network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(heading):
        torch.manual_seed(0)
        names = {"__name__": "__main__"}
        exec(compile(PROGRAMS[heading], f"{DOCUMENT.name}, {heading}", "exec"), names)
        return names

    return run


@pytest.fixture
def dtypes(monkeypatch):
    """Those of the logits that came, and of the losses that left."""
    seen = set()
    forward = fusedloss.SegmentationLoss.forward

    def watched(self, input, *others):
        result = forward(self, input, *others)
        seen.add((input.dtype, (result[0] if self.return_terms else result).dtype))
        return result

    monkeypatch.setattr(fusedloss.SegmentationLoss, "forward", watched)
    return seen


def loss_of(network, names):
    """Of the network on all of the program's data, by the reference."""
    with torch.no_grad():
        logits = network(names["images"]).float()
    return fusedloss.reference.segmentation_loss(logits, names["labels"].long(), iou=0.5, ignore_index=255).item()


def test_every_program_is_run():
    assert set(PROGRAMS) == {LIGHTNING, TRANSFORMERS}
    assert DOCUMENT.read_text().count("```python") == len(PROGRAMS)


def test_lightning(run_program, dtypes):
    need("lightning")
    names = run_program(LIGHTNING)
    assert dtypes == {(torch.bfloat16, torch.float32)}
    untrained = loss_of(names["Segmenter"](classes=3).network, names)
    assert loss_of(names["model"].network, names) < 0.6 * untrained
    logged = names["trainer"].callback_metrics
    assert set(logged) == {"loss", "cross_entropy", "iou"}
    torch.testing.assert_close(logged["loss"], logged["cross_entropy"] + 0.5 * logged["iou"])


def test_transformers(run_program, dtypes):
    need("transformers", "accelerate")
    names = run_program(TRANSFORMERS)
    assert dtypes == {(torch.bfloat16, torch.float32)}
    model, trainer = names["model"].eval(), names["trainer"]
    untrained = names["SegformerForSemanticSegmentation"](names["config"])
    untrained = names["Segmenter"](untrained, names["criterion"]).eval()
    first, last = (loss_of(lambda images, m=m: m(images)["logits"], names) for m in (untrained, model))
    assert last < 0.6 * first
    epochs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert epochs[-1] < 0.6 * epochs[0]
    # Not accumulated, so the mean over batches of 8 images; in bfloat16.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=0.1)


class Pointwise(nn.Module):
    """A network small enough to say what one step of training does to it."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(3, 3, 1)
        self.criterion = criterion

    def forward(self, pixel_values, labels):
        logits = self.layer(pixel_values)
        return {"loss": self.criterion(logits, labels), "logits": logits}


def test_transformers_divides_what_it_accumulates(run_program, tmp_path):
    """docs/trainers.md: a loss from `forward` is divided by the number of steps: their gradients are averaged."""
    need("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator)
    labels = images.argmax(1)
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    # Each image for itself, and as many pixels in each: then it does not matter in which order they come.
    options = {"per_image": True, "absent": "count"}
    settings = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trained = Pointwise(fusedloss.SegmentationLoss(**options))
    Trainer(trained, settings, train_dataset=data).train()
    by_hand = Pointwise(lambda input, target: fusedloss.reference.segmentation_loss(input, target, **options))
    before = by_hand.layer.weight.detach().clone()
    by_hand(images, labels)["loss"].backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()
    torch.testing.assert_close(trained.layer.weight, by_hand.layer.weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(by_hand.layer.weight, before, atol=1e-3)
