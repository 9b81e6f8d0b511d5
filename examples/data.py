"""Pairs of image and label map, from folders or drawn by the program, as batches for training."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scenes import draw_scene
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class InputError(Exception):
    """Something that the user gave cannot be used; the text is one sentence that says what and why."""


class Pairs(Protocol):
    """A sequence of (RGB image, 8-bit label map), both of the same size."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Image.Image, Image.Image]: ...


class DrawnPairs:
    """Scenes drawn once and kept. `seeds` may be wrapped in a progress bar."""

    def __init__(self, seeds: Iterable[int], size: tuple[int, int]) -> None:
        self._pairs = [tuple(Image.fromarray(array) for array in draw_scene(seed, *size)) for seed in seeds]

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        return f"drawn scene {index}"

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, label = self._pairs[index]
        return image, label


@dataclass(frozen=True)
class FolderPairs:
    """Files that are read again every time, so that a data set may be larger than the memory."""

    images: Sequence[Path]
    labels: Sequence[Path]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.labels[index])

    def load(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, label = read_image(self.images[index]), read_image(self.labels[index])
        # "P": the file brings a palette for the eye, and its pixels are the indices all the same.
        if label.mode not in ("L", "P", "1"):
            raise InputError(
                f"{self.labels[index]} has pixels of mode {label.mode}, "
                "but a label map is a picture of 8 bits per pixel, each pixel the number of its class"
            )
        if image.size != label.size:
            raise InputError(
                f"{self.images[index]} is {image.width}x{image.height}, "
                f"but its label map {self.labels[index]} is {label.width}x{label.height}"
            )
        return image.convert("RGB"), label


def read_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    return image


# ---- folders ---------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                raise InputError(f"{folder} holds both {found[path.stem].name} and {path.name}: which one is meant?")
            found[path.stem] = path
    if not found:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def find_pairs(images: Path, labels: Path) -> FolderPairs:
    """Files that have the same name up to the suffix belong together; each must have its partner."""
    image_files, label_files = pictures(images), pictures(labels)
    for here, there, kind in ((image_files, label_files, labels), (label_files, image_files, images)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(f"{here[alone[0]]}{more} has no file named {alone[0]}.* in {kind}")
    names = sorted(image_files)
    return FolderPairs([image_files[name] for name in names], [label_files[name] for name in names])


def split_pairs(pairs: FolderPairs, held_out_share: float) -> tuple[FolderPairs, FolderPairs]:
    """Training and held-out pairs. A file's side hangs on its name alone: every run holds out the same images."""
    order = sorted(range(len(pairs)), key=lambda index: zlib.crc32(pairs.images[index].stem.encode()))
    count = max(1, round(held_out_share * len(pairs)))
    if count >= len(pairs):
        raise InputError(f"of {len(pairs)} images {count} would be held out, so none is left to train on")
    held_out, train = sorted(order[:count]), sorted(order[count:])

    def chosen(indices: list[int]) -> FolderPairs:
        return FolderPairs([pairs.images[i] for i in indices], [pairs.labels[i] for i in indices])

    return chosen(train), chosen(held_out)


# ---- looking at everything once, before any time goes into training --------------------------------------------------


@dataclass
class Survey:
    """How many pixels each label value has, and the one size of all images (None if they differ)."""

    pixels: NDArray[np.int64]
    size: tuple[int, int] | None


def survey(pairs: Pairs, indices: Iterable[int], classes: int, ignore_index: int) -> Survey:
    """Reads every pair and refuses label values that are neither a class nor ignored."""
    pixels = np.zeros(256, dtype=np.int64)
    sizes: set[tuple[int, int]] = set()
    allowed = np.arange(256) < classes
    if 0 <= ignore_index < 256:
        allowed[ignore_index] = True
    for index in indices:
        _, label = pairs.load(index)
        values = np.asarray(label, dtype=np.uint8)
        counts = np.bincount(values.reshape(-1), minlength=256)
        bad = np.flatnonzero((counts > 0) & ~allowed)
        if bad.size:
            row, column = np.argwhere(values == bad[0])[0]
            raise InputError(
                f"{pairs.name(index)} has the label {bad[0]} at row {row}, column {column}, "
                f"but labels are 0 to {classes - 1} or the ignored {ignore_index}"
            )
        pixels += counts
        sizes.add(label.size)
    return Survey(pixels, sizes.pop() if len(sizes) == 1 else None)


# ---- batches ---------------------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), with about mean 0 and standard deviation 1 over the photographs of the world."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (values.to(torch.float32) / 255 - 0.45).div_(0.27)


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Gives (image, label map): float32 (3, H, W) and uint8 (H, W).

    With `augment` an image is mirrored, cropped and relit at random; the random numbers hang on seed, epoch and index
    alone, so that two losses see the same data whatever the number of workers.
    """

    def __init__(self, pairs: Pairs, size: tuple[int, int], *, augment: bool = False, seed: int = 0) -> None:
        self.pairs, self.size, self.augment, self.seed = pairs, size, augment, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.pairs.load(index)
        box = (0.0, 0.0, float(image.width), float(image.height))
        random = np.random.default_rng((self.seed, self.epoch, index))
        if self.augment:
            scale = random.uniform(0.7, 1.0)
            width, height = scale * image.width, scale * image.height
            left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
            box = (left, top, left + width, top + height)
        image = image.resize(self.size, Image.Resampling.BILINEAR, box)
        label = label.resize(self.size, Image.Resampling.NEAREST, box)
        pixels, labels = to_tensor(image), torch.from_numpy(np.array(label, dtype=np.uint8))
        if self.augment:
            contrast, brightness = random.uniform(0.8, 1.25), random.uniform(-0.3, 0.3)
            pixels = pixels * contrast + brightness
            if random.random() < 0.5:
                pixels, labels = pixels.flip(-1), labels.flip(-1)
        return pixels, labels


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch, count)).permutation(count).tolist()


def evenly_spaced(count: int, wanted: int) -> Iterator[int]:
    """At most `wanted` indices, spread over all of them, because neighbors in a folder often look alike."""
    wanted = min(count, wanted)
    return ((2 * i + 1) * count // (2 * wanted) for i in range(wanted))
