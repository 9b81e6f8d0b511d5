"""Train a small U-Net to segment images, with fusedloss, with the same loss in plain PyTorch, or with both in turn.

Without arguments it needs no files: it draws street scenes and trains on them. With a folder of images and one of label
maps (8 bits per pixel, each pixel the number of its class; files with the same name belong together):

    python examples/train_segmentation.py --images train/images --labels train/labels \\
        --val-images val/images --val-labels val/labels --classes 11 --ignore-index 11

The loss is cross-entropy, or the sum of the terms that `--terms` names: ce (cross-entropy), iou (soft IoU loss), brier
(Brier loss). `--terms` said several times compares:

    python examples/train_segmentation.py --loss fused --terms ce --terms ce,iou

Losses, also the held-out ones, are means over batches: soft IoU over a batch is not the mean of that over its images.
All trainings start from the same weights and see the same batches in the same order. The results (metrics.json,
metrics.csv, predictions.png, curves.png) go into the folder `--output`. docs/training.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Kineto, under torch.profiler, reads this when torch is loaded; without it, it writes about its stages onto the screen.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import numpy as np
import report
import torch
from data import (
    DrawnPairs,
    InputError,
    Pairs,
    SegmentationDataset,
    evenly_spaced,
    find_pairs,
    shuffled,
    split_pairs,
    survey,
)
from losses import TERMS, Terms, make_loss, peak_bytes
from numpy.typing import NDArray
from report import Epoch, Run
from rich.console import Console
from scenes import CLASS_NAMES, VOID
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from unet import UNet

import fusedloss

console = Console(highlight=False)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    train: Pairs
    held_out: Pairs
    class_names: Sequence[str]
    ignore_index: int
    size: tuple[int, int]
    train_pixels: NDArray[np.int64]  # number of pixels per label value
    held_out_pixels: NDArray[np.int64]


def bar(iterable: Any, what: str, **options: Any) -> Any:
    """A progress bar on a terminal, nothing in a log file."""
    return tqdm(iterable, desc=what, leave=False, disable=None, dynamic_ncols=True, **options)


def load_data(args: argparse.Namespace) -> Data:
    if args.images is None:
        return drawn_data(args)
    if args.labels is None:
        raise InputError("--images needs --labels, the folder of the label maps")
    if (args.val_images is None) != (args.val_labels is None):
        raise InputError("--val-images and --val-labels belong together, but only one of them is there")
    classes = args.classes or len(args.class_names or ())
    if not classes:
        raise InputError("--images needs --classes, the number of classes")
    if not 1 <= classes <= 256:
        raise InputError(f"--classes is {classes}, but 8-bit label maps have 1 to 256 classes")
    class_names = args.class_names or [f"class {number}" for number in range(classes)]
    if len(class_names) != classes:
        raise InputError(f"--class-names has {len(class_names)} names for {classes} classes")
    ignore_index = 255 if args.ignore_index is None else args.ignore_index

    train = find_pairs(args.images, args.labels)
    if args.val_images is None:
        train, held_out = split_pairs(train, args.val_share)
    else:
        held_out = find_pairs(args.val_images, args.val_labels)
    surveys = [
        survey(pairs, bar(range(len(pairs)), what), classes, ignore_index)
        for pairs, what in ((train, "looking at training images"), (held_out, "looking at held-out images"))
    ]
    size = args.size or surveys[0].size
    if size is None:
        raise InputError(
            f"the images in {args.images} differ in size: say --size WIDTHxHEIGHT, to which all are scaled"
        )
    return Data(train, held_out, class_names, ignore_index, size, surveys[0].pixels, surveys[1].pixels)


def drawn_data(args: argparse.Namespace) -> Data:
    for option in ("labels", "classes", "val_images", "val_labels", "class_names", "ignore_index"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} needs --images")
    size = args.size or (128, 96)
    held_out_count = max(1, round(args.val_share * args.scenes))
    seeds = range(args.scenes + held_out_count)
    train = DrawnPairs(bar(seeds[: args.scenes], "drawing"), size)
    held_out = DrawnPairs(bar(seeds[args.scenes :], "drawing"), size)
    pixels = [survey(pairs, range(len(pairs)), len(CLASS_NAMES), VOID).pixels for pairs in (train, held_out)]
    return Data(train, held_out, CLASS_NAMES, VOID, size, *pixels)


def class_weights(text: str, data: Data) -> Tensor | None:
    """Numbers, or "balanced": one over the square root of a class's share of the pixels, 1 on average."""
    if text == "none":
        return None
    classes = len(data.class_names)
    if text == "balanced":
        counts = torch.from_numpy(data.train_pixels[:classes]).double()
        weight = counts.clamp(min=1).rsqrt() * (counts > 0)
        return (weight * (classes / weight.sum())).float()
    try:
        weight = torch.tensor([float(part) for part in text.split(",")])
    except ValueError:
        raise InputError(
            f'--class-weights is "{text}", but wanted are {classes} numbers or the word balanced'
        ) from None
    if weight.numel() != classes or not bool((weight >= 0).all() & (weight > 0).any()):
        raise InputError(f"--class-weights wants {classes} numbers, none below 0 and not all 0, but got {text}")
    return weight


# ---- training --------------------------------------------------------------------------------------------------------


def learning_rate(peak: float, progress: float) -> float:
    """Rises over the first twentieth of the training, then falls along a cosine to 0."""
    warm_up = 0.05
    if progress < warm_up:
        return peak * (progress / warm_up + 0.02)
    return peak * 0.5 * (1 + float(np.cos(np.pi * (progress - warm_up) / (1 - warm_up))))


def numbers(loss: Tensor, terms: dict[str, Tensor]) -> dict[str, float]:
    return {"loss": loss.item(), **{term: value.item() for term, value in terms.items()}}


def terms_text(terms: dict[str, float]) -> str:
    return f" ({', '.join(f'{term} {value:.4f}' for term, value in terms.items())})" if terms else ""


class Trainer:
    def __init__(self, loss: str, terms: Terms, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data = args, data
        self.name = f"{loss} {'+'.join(terms)}" if len(args.terms) > 1 else loss
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.run = Run(self.name, loss, terms)
        self.step_seconds: list[float] = []
        self.loss_seconds: list[float] = []

        torch.manual_seed(args.seed)
        self.network = UNet(len(data.class_names), args.width).to(memory_format=self.layout)
        self.loss = make_loss(
            loss,
            terms,
            weight=class_weights(args.class_weights, data),
            ignore_index=data.ignore_index,
            label_smoothing=args.label_smoothing,
            compile=args.compile,
        )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        self.forward: nn.Module | Callable[[Tensor], Tensor] = self.network
        if args.compile:
            self.forward = torch.compile(self.network)
        self.train_set = SegmentationDataset(data.train, data.size, augment=args.augment, seed=args.seed)
        self.held_out_set = SegmentationDataset(data.held_out, data.size)
        if args.resume is not None:
            self.resume(self.file_for(args.resume))

    def file_for(self, path: Path) -> Path:
        """Where there are several networks, the name of the training goes into the file name."""
        if self.args.loss != "both" and len(self.args.terms) == 1:
            return path
        return path.with_name(f"{path.stem}-{self.name.replace(' ', '-')}{path.suffix}")

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16)

    def logits(self, images: Tensor) -> Tensor:
        with self.precision():
            return self.forward(images.contiguous(memory_format=self.layout))

    def train_batches(self, epoch: int) -> DataLoader[tuple[Tensor, Tensor]]:
        count, batch_size = len(self.train_set), self.args.batch_size
        self.train_set.epoch = epoch
        return DataLoader(
            self.train_set,
            batch_size,
            sampler=shuffled(count, self.args.seed, epoch),
            num_workers=self.args.workers,
            # The last batch may be too small for batch normalization.
            drop_last=count >= batch_size,
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """The means over the batches of the loss and of its terms."""
        self.network.train()
        batches = self.train_batches(epoch)
        steps: list[dict[str, float]] = []
        progress = bar(batches, f"{self.name} epoch {epoch}/{self.args.epochs}")
        for step, (images, labels) in enumerate(progress):
            # No pixel counts: the mean would be 0 / 0.
            if bool((labels == self.data.ignore_index).all()):
                continue
            done = (epoch - 1 + step / len(batches)) / self.args.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.args.lr, done)
            steps.append(self.train_step(images, labels))
            if not np.isfinite(steps[-1]["loss"]):
                raise InputError(f"the {self.name} loss is {steps[-1]['loss']} in epoch {epoch}: try a smaller --lr")
            if not progress.disable:
                progress.set_postfix(loss=f"{statistics.fmean(step['loss'] for step in steps[-20:]):.3f}")
        if not steps:
            raise InputError("every pixel of every training image is ignored")
        return {key: statistics.fmean(step[key] for step in steps) for key in steps[0]}

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        start = time.perf_counter()
        logits = self.logits(images)
        # Cutting the graph here lets the backward of the loss be timed apart from the network's; the gradient that
        # goes into the network is the same.
        leaf = logits.detach().requires_grad_()
        loss_start = time.perf_counter()
        with self.precision():
            loss, terms = self.loss(leaf, labels)
        loss.backward()
        self.loss_seconds.append(time.perf_counter() - loss_start)
        logits.backward(leaf.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_seconds.append(time.perf_counter() - start)
        return numbers(loss, terms)

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict[str, float], float, float]:
        """(loss and terms, pixel accuracy, mean IoU) on the held-out images; the IoU per class goes into the run.

        Loss and terms are means over the batches. The soft IoU loss of all images at once would be another number,
        because it is no sum over pixels; the mean IoU comes from counts over all images.
        """
        self.network.eval()
        classes = len(self.data.class_names)
        confusion = np.zeros((classes, classes), dtype=np.int64)
        totals = Counter({"loss": 0.0})
        total_images = 0
        batches = DataLoader(self.held_out_set, self.args.batch_size, num_workers=self.args.workers)
        for images, labels in bar(batches, f"{self.name} held-out"):
            counted = labels != self.data.ignore_index
            if not bool(counted.any()):
                continue
            logits = self.logits(images)
            with self.precision():
                loss, terms = self.loss(logits, labels)
            for key, value in numbers(loss, terms).items():
                totals[key] += value * len(images)
            total_images += len(images)
            pairs = labels[counted].long() * classes + logits.argmax(dim=1)[counted]
            confusion += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes).numpy()
        accuracy, mean_iou, self.run.class_iou = report.scores(confusion)
        return {key: total / max(1, total_images) for key, total in totals.items()}, accuracy, mean_iou

    def train(self) -> Run:
        done = len(self.run.epochs)
        if done:
            console.print(f"{self.name}: goes on after epoch {done}")
            self.evaluate()
        for epoch in range(done + 1, self.args.epochs + 1):
            start = time.perf_counter()
            train_terms = self.train_epoch(epoch)
            terms, accuracy, mean_iou = self.evaluate()
            seconds = time.perf_counter() - start
            train_loss, loss = train_terms.pop("loss"), terms.pop("loss")
            self.run.epochs.append(
                Epoch(epoch, train_loss, loss, accuracy, mean_iou, seconds, train_terms=train_terms, terms=terms)
            )
            console.print(
                f"{self.name}  epoch {epoch:>{len(str(self.args.epochs))}}/{self.args.epochs}  "
                f"training loss {train_loss:.4f}{terms_text(train_terms)}  "
                f"held-out: loss {loss:.4f}{terms_text(terms)}  pixel accuracy {accuracy:.3f}  "
                f"mean IoU {mean_iou:.3f}  ({seconds:.1f} s)"
            )
            self.save()
        self.measure()
        return self.run

    def measure(self) -> None:
        if self.step_seconds:
            # The first steps pay for warming up and compiling.
            skip = min(3, len(self.step_seconds) - 1)
            self.run.loss_ms = 1e3 * statistics.median(self.loss_seconds[skip:])
            self.run.step_ms = 1e3 * statistics.median(self.step_seconds[skip:])
            self.run.loss_share = sum(self.loss_seconds[skip:]) / sum(self.step_seconds[skip:])
        images, labels = next(iter(self.train_batches(epoch=1)))
        with torch.no_grad():
            logits = self.logits(images)
        with self.precision():
            self.run.loss_peak_bytes = peak_bytes(self.loss, logits, labels)
        self.run.logits_bytes = logits.nbytes

    @torch.inference_mode()
    def predict(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        self.network.eval()
        images = torch.stack([self.held_out_set[index][0] for index in indices])
        return self.logits(images).argmax(dim=1).to(torch.uint8).numpy()

    # ---- checkpoints ----

    def shape(self) -> dict[str, Any]:
        """What a checkpoint must share with the network that goes on from it."""
        return {"classes": len(self.data.class_names), "width": self.args.width}

    def save(self) -> None:
        if self.args.save is None:
            return
        path = self.file_for(self.args.save)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "shape": self.shape(),
            "class_names": list(self.data.class_names),
            "size": list(self.data.size),
            "ignore_index": self.data.ignore_index,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": [asdict(epoch) for epoch in self.run.epochs],
        }
        # Into another file first: a stop while writing must not cost the last good one.
        unfinished = path.with_name(path.name + ".part")
        torch.save(content, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} is not a file: --resume wants one that --save has written")
        try:
            content = torch.load(path, weights_only=True)
            shape, epochs = content["shape"], [Epoch(**epoch) for epoch in content["epochs"]]
        except Exception as error:
            raise InputError(f"{path} is not a file that --save has written: {error}") from error
        if shape != self.shape():
            raise InputError(f"{path} holds a network with {shape}, but this one has {self.shape()}")
        if len(epochs) > self.args.epochs:
            raise InputError(f"{path} has {len(epochs)} epochs behind it, more than --epochs {self.args.epochs}")
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.run.epochs = epochs


# ---- command line ----------------------------------------------------------------------------------------------------


def width_and_height(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    size = int(width), int(height)
    if min(size) < 16:
        raise argparse.ArgumentTypeError(f"{text} is too small: at least 16x16")
    return size


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def terms(text: str) -> Terms:
    named = text.split(",")
    for term in named:
        if term not in TERMS:
            raise argparse.ArgumentTypeError(f'"{term}" is no term: there are {", ".join(TERMS)}')
        if named.count(term) > 1:
            raise argparse.ArgumentTypeError(f"{text} names {term} more than once")
    return tuple(term for term in TERMS if term in named)


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--images", type=Path, help="folder of images to train on (default: scenes drawn by the program)")
    data.add_argument("--labels", type=Path, help="folder of their label maps, files with the same names")
    data.add_argument("--classes", type=positive, help="number of classes; labels are 0 to classes - 1")
    data.add_argument("--class-names", type=lambda text: text.split(","), help="names to show: sky,road,...")
    data.add_argument("--ignore-index", type=int, help="label of the pixels that do not count (default: 255)")
    data.add_argument("--val-images", type=Path, help="folder of held-out images")
    data.add_argument("--val-labels", type=Path, help="folder of their label maps")
    data.add_argument("--val-share", type=share, default=0.2, help="share held out without --val-images (default: 0.2)")
    data.add_argument("--scenes", type=positive, default=200, help="number of scenes to draw (default: 200)")
    data.add_argument("--size", type=width_and_height, help="WIDTHxHEIGHT to scale everything to (default: as it is)")
    data.add_argument("--augment", action="store_true", help="mirror, crop and relight the training images at random")
    data.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")

    training = parser.add_argument_group("training")
    training.add_argument("--loss", choices=("fused", "torch", "both"), default="both", help="(default: both, in turn)")
    training.add_argument(
        "--terms",
        type=terms,
        action="append",
        help="the loss is the sum of these, out of ce,iou,brier; say it several times to train with each in turn "
        "(default: ce)",
    )
    training.add_argument("--epochs", type=positive, default=6, help="(default: 6)")
    training.add_argument("--batch-size", type=positive, default=4, help="(default: 4)")
    training.add_argument("--lr", type=float, default=5e-3, help="highest learning rate (default: 0.005)")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="(default: 0.0001)")
    training.add_argument(
        "--class-weights",
        default="balanced",
        help="of all terms: a number per class (1,2.5,...), balanced, or none (default: balanced)",
    )
    training.add_argument("--label-smoothing", type=float, default=0.0, help="in the cross-entropy (default: 0)")
    training.add_argument("--width", type=positive, default=12, help="channels at full resolution (default: 12)")
    training.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    training.add_argument("--threads", type=positive, help="(default: torch's choice)")
    training.add_argument("--channels-last", action="store_true", help="network and logits in channels_last layout")
    training.add_argument("--bfloat16", action="store_true", help="network in bfloat16 (autocast)")
    training.add_argument("--compile", action="store_true", help="torch.compile network and loss, each on its own")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("build/demo"), help="(default: build/demo)")
    output.add_argument("--save", type=Path, help="write network and optimizer into this file after every epoch")
    output.add_argument("--resume", type=Path, help="go on from such a file, up to --epochs")
    args = parser.parse_args(argv)
    args.terms = args.terms or [("ce",)]
    for number, combination in enumerate(args.terms):
        if combination in args.terms[:number]:
            parser.error(f"--terms {','.join(combination)} is there twice, and would train twice the same")
    if not 0 <= args.label_smoothing <= 1:
        parser.error(f"--label-smoothing is {args.label_smoothing}, but wanted is 0 to 1")
    if not args.lr > 0:
        parser.error(f"--lr is {args.lr}, but wanted is more than 0")
    return args


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    data = load_data(args)
    names = ["fused", "torch"] if args.loss == "both" else [args.loss]
    trainers = [Trainer(name, combination, args, data) for combination in args.terms for name in names]
    parameters = sum(parameter.numel() for parameter in trainers[0].network.parameters())
    source = "drawn scenes" if args.images is None else f"images from {args.images}"
    console.print(
        f"{len(data.train)} {source} to train on, {len(data.held_out)} held out, "
        f"{data.size[0]}x{data.size[1]}, {len(data.class_names)} classes; "
        f"U-Net with {parameters:,} parameters; {torch.get_num_threads()} threads"
    )
    runs = [trainer.train() for trainer in trainers]

    classes = len(data.class_names)
    counted = data.held_out_pixels[:classes].copy()
    if 0 <= data.ignore_index < classes:
        counted[data.ignore_index] = 0
    console.print()
    report.print_summary(console, runs, data.class_names, (counted / max(1, counted.sum())).tolist())

    setup = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    setup |= {
        "size": data.size,
        "ignore_index": data.ignore_index,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fusedloss": fusedloss.__version__,
    }
    report.save_metrics(args.output, setup, data.class_names, runs)
    shown = list(evenly_spaced(len(data.held_out), 4))
    pictures = [[part.resize(data.size, resample=0) for part in data.held_out.load(index)] for index in shown]
    report.draw_predictions(
        args.output / "predictions.png",
        np.stack([np.array(image) for image, _ in pictures]),
        np.stack([np.array(label, dtype=np.uint8) for _, label in pictures]),
        {trainer.name: trainer.predict(shown) for trainer in trainers},
        data.class_names,
        data.ignore_index,
    )
    report.draw_curves(args.output / "curves.png", runs)
    console.print(f"written to {args.output}: metrics.json, metrics.csv, predictions.png, curves.png", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except InputError as error:
        print(f"train_segmentation.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = f" (--resume {args.save} goes on after the last whole epoch)" if args.save else ""
        print(f"\ntrain_segmentation.py: stopped{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
