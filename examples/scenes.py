"""Street scenes drawn by the program: images and label maps for a first training that needs no files.

Objects stand on a plane seen in perspective, and their colors overlap between classes (green trees on green ground,
gray houses behind a gray road), so that a network has to learn texture and place as well as color. Light, haze and
sensor noise differ from scene to scene. The classes are uneven, as in photographs: lamps and persons cover less than
1 % of the pixels each. Pixels that two classes share half and half are void, and so is the hood of the car that carries
the camera.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASS_NAMES = ("sky", "ground", "road", "house", "tree", "car", "person", "lamp")
SKY, GROUND, ROAD, HOUSE, TREE, CAR, PERSON, LAMP = range(len(CLASS_NAMES))
VOID = 255

Color = tuple[float, float, float]
GROUND_COLORS: list[Color] = [(92, 128, 62), (118, 140, 74), (150, 132, 92), (104, 112, 70)]
ROAD_COLORS: list[Color] = [(96, 96, 100), (122, 118, 114), (76, 78, 84)]
WALL_COLORS: list[Color] = [
    (196, 182, 158),
    (150, 92, 76),
    (138, 138, 142),
    (212, 208, 200),
    (176, 148, 96),
    (110, 104, 98),
]
ROOF_COLORS: list[Color] = [(128, 62, 48), (82, 78, 80), (104, 84, 66)]
LEAF_COLORS: list[Color] = [(52, 92, 42), (84, 118, 48), (120, 112, 44), (150, 92, 40), (44, 76, 56)]
CAR_COLORS: list[Color] = [(168, 36, 36), (40, 62, 128), (208, 208, 206), (44, 44, 48), (134, 138, 142), (196, 164, 52)]
CLOTHES_COLORS: list[Color] = [(60, 60, 92), (150, 52, 60), (70, 100, 84), (40, 40, 44), (190, 180, 160)]

# How strongly fine and coarse noise change the brightness of a class.
TEXTURE = {
    SKY: (0.00, 0.02),
    GROUND: (0.13, 0.10),
    ROAD: (0.06, 0.05),
    HOUSE: (0.04, 0.04),
    TREE: (0.20, 0.16),
    CAR: (0.02, 0.05),
    PERSON: (0.06, 0.04),
    LAMP: (0.03, 0.03),
}


class Canvas:
    """Colors, labels and shadows, drawn together at twice the final resolution."""

    def __init__(self, width: int, height: int, haze_color: Color) -> None:
        self.width, self.height, self.haze_color = 2 * width, 2 * height, haze_color
        self.color = Image.new("RGB", (self.width, self.height))
        self.label = Image.new("L", (self.width, self.height))
        self.shade = Image.new("L", (self.width, self.height), 255)
        self._pens = [ImageDraw.Draw(image) for image in (self.color, self.label, self.shade)]

    def paint(
        self, shape: str, points: list[float], color: Color, label: int, haze: float = 0.0, **options: int
    ) -> None:
        """`shape` is a method of ImageDraw; its area takes `color`, mixed with the haze, and is no longer in shadow."""
        mixed = tuple(round(c + haze * (h - c)) for c, h in zip(color, self.haze_color, strict=True))
        for pen, fill in zip(self._pens, (mixed, label, 255), strict=True):
            getattr(pen, shape)(points, fill=fill, **options)

    def shadow(self, x: float, y: float, width: float, height: float) -> None:
        self._pens[2].ellipse([x - width / 2, y - height / 2, x + width / 2, y + height / 2], fill=140)


def pick(random: np.random.Generator, colors: list[Color]) -> Color:
    brightness = random.uniform(0.85, 1.15)
    red, green, blue = brightness * np.asarray(colors[random.integers(len(colors))]) + random.normal(0, 6, 3)
    return float(red), float(green), float(blue)


def darker(color: Color, factor: float) -> Color:
    red, green, blue = color
    return red * factor, green * factor, blue * factor


# ---- objects: (x, y) is the middle of the foot, `unit` the length of one meter there ---------------------------------


def draw_house(canvas: Canvas, random: np.random.Generator, x: float, y: float, unit: float, haze: float) -> None:
    width, storeys = random.uniform(6, 12), int(random.integers(1, 4))
    left, right, top = x - width / 2 * unit, x + width / 2 * unit, y - (1 + 2.8 * storeys) * unit
    wall, roof = pick(random, WALL_COLORS), pick(random, ROOF_COLORS)
    glass = darker((96, 110, 128), random.uniform(0.5, 1.3))
    canvas.paint("rectangle", [left, top, right, y], wall, HOUSE, haze)
    if random.random() < 0.7:
        peak, inset = top - random.uniform(1.5, 3.5) * unit, random.uniform(0.1, 0.5) * width * unit
        eaves = 0.4 * unit
        gable = [left - eaves, top, left + inset, peak, right - inset, peak, right + eaves, top]
        canvas.paint("polygon", gable, roof, HOUSE, haze)
    columns = int(width / random.uniform(1.8, 2.8))
    for row in range(storeys):
        for column in range(columns):
            middle = left + (column + 0.5) * (right - left) / columns
            sill = y - (1.1 + 2.8 * row) * unit
            window = [middle - 0.5 * unit, sill - 1.3 * unit, middle + 0.5 * unit, sill]
            canvas.paint("rectangle", window, glass, HOUSE, haze)


def draw_tree(canvas: Canvas, random: np.random.Generator, x: float, y: float, unit: float, haze: float) -> None:
    height, leaf = random.uniform(3.5, 8), pick(random, LEAF_COLORS)
    trunk = [x - 0.2 * unit, y - 0.5 * height * unit, x + 0.2 * unit, y]
    canvas.paint("rectangle", trunk, (84, 66, 50), TREE, haze)
    if random.random() < 0.3:
        for step in range(4):
            half, low = (0.32 - 0.06 * step) * height * unit, y - (0.15 + 0.2 * step) * height * unit
            tier = [x - half, low, x, low - 0.34 * height * unit, x + half, low]
            canvas.paint("polygon", tier, darker(leaf, random.uniform(0.75, 1.1)), TREE, haze)
        return
    for _ in range(12):
        radius = random.uniform(0.12, 0.24) * height * unit
        center_x = x + random.normal(0, 0.16) * height * unit
        center_y = y - random.uniform(0.45, 0.85) * height * unit
        blob = [center_x - radius, center_y - radius, center_x + radius, center_y + radius]
        canvas.paint("ellipse", blob, darker(leaf, random.uniform(0.65, 1.25)), TREE, haze)


def draw_car(canvas: Canvas, random: np.random.Generator, x: float, y: float, unit: float, haze: float) -> None:
    body = pick(random, CAR_COLORS)
    seen_from_side = random.random() < 0.4
    length = 4.2 if seen_from_side else 1.9
    left, right = x - length / 2 * unit, x + length / 2 * unit
    for wheel in (left + 0.18 * length * unit, right - 0.18 * length * unit):
        radius_x, radius_y = (0.34 if seen_from_side else 0.14) * unit, 0.34 * unit
        tire = [wheel - radius_x, y - 2 * radius_y, wheel + radius_x, y]
        canvas.paint("ellipse", tire, (28, 28, 30), CAR, haze)
    canvas.paint("rectangle", [left, y - 0.95 * unit, right, y - 0.25 * unit], body, CAR, haze)
    base, roof = y - 0.95 * unit, y - 1.5 * unit
    for inset, color in ((0.0, body), (0.12, (70, 82, 94))):
        low, high = (0.16 + inset) * length * unit, (0.26 + inset) * length * unit
        cabin = [
            left + low,
            base,
            left + high,
            roof + inset * unit,
            right - high,
            roof + inset * unit,
            right - low,
            base,
        ]
        canvas.paint("polygon", cabin, color, CAR, haze)
    for lamp in (left + 0.22 * unit, right - 0.22 * unit):
        light = [lamp - 0.16 * unit, y - 0.8 * unit, lamp + 0.16 * unit, y - 0.6 * unit]
        canvas.paint("rectangle", light, (214, 196, 150), CAR, haze)


def draw_person(canvas: Canvas, random: np.random.Generator, x: float, y: float, unit: float, haze: float) -> None:
    height = random.uniform(1.5, 1.9) * unit
    coat, legs = pick(random, CLOTHES_COLORS), darker(pick(random, CLOTHES_COLORS), 0.7)
    half = 0.15 * height
    canvas.paint("rectangle", [x - 0.7 * half, y - 0.5 * height, x + 0.7 * half, y], legs, PERSON, haze)
    canvas.paint("ellipse", [x - half, y - 0.86 * height, x + half, y - 0.38 * height], coat, PERSON, haze)
    head = [x - 0.5 * half, y - height, x + 0.5 * half, y - 0.84 * height]
    canvas.paint("ellipse", head, (198, 152, 124), PERSON, haze)


def draw_lamp(canvas: Canvas, random: np.random.Generator, x: float, y: float, unit: float, haze: float) -> None:
    top, gray = y - random.uniform(4.5, 6) * unit, darker((112, 114, 116), random.uniform(0.5, 1.2))
    width = max(3, round(0.22 * unit))
    arm = (1 if x < canvas.width / 2 else -1) * unit
    canvas.paint("line", [x, y, x, top, x + arm, top], gray, LAMP, haze, width=width)


OBJECTS: dict[int, Callable[[Canvas, np.random.Generator, float, float, float, float], None]] = {
    HOUSE: draw_house,
    TREE: draw_tree,
    CAR: draw_car,
    PERSON: draw_person,
    LAMP: draw_lamp,
}

# ---- the scene -------------------------------------------------------------------------------------------------------


def noise(random: np.random.Generator, width: int, height: int, cell: int) -> NDArray[np.float32]:
    """Smooth noise of mean 0 and standard deviation of about 1, with bumps of about `cell` pixels."""
    grid = random.normal(0, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
    return 1.5 * np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def draw_layout(random: np.random.Generator, width: int, height: int) -> tuple[Canvas, float]:
    """Everything but light and texture; with the row of the horizon as a share of the height."""
    haze_color: Color = tuple(np.array([188, 198, 210]) * random.uniform(0.75, 1.15))
    haze_strength = random.uniform(0.0, 0.75)
    canvas = Canvas(width, height, haze_color)
    horizon = random.uniform(0.36, 0.54)
    horizon_row = horizon * canvas.height
    depth = canvas.height - horizon_row

    canvas.paint("rectangle", [0, 0, canvas.width, horizon_row], pick(random, [(128, 168, 212), (172, 186, 200)]), SKY)
    ground, road = pick(random, GROUND_COLORS), pick(random, ROAD_COLORS)
    vanishing = canvas.width * random.uniform(0.25, 0.75)
    foot = canvas.width * random.uniform(0.3, 0.7)
    half_road = canvas.width * random.uniform(0.3, 0.55)

    def road_middle(nearness: float) -> float:
        return vanishing + (foot - vanishing) * nearness

    for row in range(int(horizon_row), canvas.height):
        nearness = (row - horizon_row) / depth
        haze = haze_strength * (1 - nearness) ** 3
        canvas.paint("line", [0, row, canvas.width, row], ground, GROUND, haze)
        middle, half = road_middle(nearness), half_road * nearness
        canvas.paint("line", [middle - half, row, middle + half, row], road, ROAD, haze)
        if np.floor(3 / max(nearness, 0.05)) % 2:
            mark = 0.03 * half_road * nearness
            canvas.paint("line", [middle - mark, row, middle + mark, row], (206, 204, 196), ROAD, haze)

    objects: list[tuple[float, float, int]] = []
    for label, most, nearest, farthest, inner, outer in (
        (HOUSE, 8, 0.32, 0.10, 1.5, 5.5),
        (TREE, 10, 0.60, 0.08, 1.3, 5.0),
        (LAMP, 4, 0.75, 0.15, 1.05, 1.25),
        (CAR, 5, 0.90, 0.12, 0.15, 0.8),
        (PERSON, 5, 0.85, 0.18, 1.0, 1.9),
    ):
        for _ in range(random.integers(most + 1)):
            # Far places are likelier than near ones, as more of the plane is far away.
            nearness = farthest + (nearest - farthest) * random.random() ** 1.5
            side = random.choice([-1, 1]) * random.uniform(inner, outer)
            objects.append((nearness, road_middle(nearness) + side * half_road * nearness, label))
    for nearness, x, label in sorted(objects):
        y, unit = horizon_row + depth * nearness, 0.3 * depth * nearness
        canvas.shadow(x + 0.8 * unit, y, 3.4 * unit, 0.5 * unit)
        OBJECTS[label](canvas, random, x, y, unit, haze_strength * (1 - nearness) ** 3)
    if random.random() < 0.4:
        rise = random.uniform(0.05, 0.10) * canvas.height
        hood = [0.1 * canvas.width, canvas.height - rise, 0.9 * canvas.width, canvas.height + rise]
        canvas.paint("ellipse", hood, darker((60, 62, 70), random.uniform(0.4, 1.8)), VOID)
    return canvas, horizon


def light_and_texture(random: np.random.Generator, canvas: Canvas, horizon: float) -> NDArray[np.float32]:
    width, height = canvas.width, canvas.height
    color = np.asarray(canvas.color, dtype=np.float32)
    label = np.asarray(canvas.label)
    fine_strength, coarse_strength = np.zeros((2, 256), dtype=np.float32)
    for number, (fine, coarse) in TEXTURE.items():
        fine_strength[number], coarse_strength[number] = fine, coarse
    texture = fine_strength[label] * noise(random, width, height, 2)
    texture += coarse_strength[label] * noise(random, width, height, max(2, height // 24))

    clouds = noise(random, width, height, max(2, height // 4)) + 0.3 * noise(
        random, width, height, max(2, height // 14)
    )
    clouds = np.clip(0.7 * clouds - random.uniform(-0.3, 1.2), 0, 1)
    clouds = (clouds * (label == SKY))[..., None]
    color = color + 0.8 * clouds * (np.float32(236) - color)

    sun = 1 + random.uniform(-0.25, 0.25) * np.linspace(-1, 1, width, dtype=np.float32)
    sky_glow = 1 + 0.15 * np.clip(1 - np.linspace(0, 1, height, dtype=np.float32) / horizon, 0, 1)
    light = sun[None, :] * sky_glow[:, None] * np.exp(texture) * (np.asarray(canvas.shade, dtype=np.float32) / 255)
    cast = np.exp(random.normal(0, 0.04, 3)).astype(np.float32) * np.float32(random.uniform(0.55, 1.15))
    return color * light[..., None] * cast


def draw_scene(seed: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image (height, width, 3) and its label map (height, width); the same for the same arguments."""
    random = np.random.default_rng(seed)
    canvas, horizon = draw_layout(random, width, height)
    color = light_and_texture(random, canvas, horizon)
    image = color.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    image += random.normal(0, random.uniform(2, 9), image.shape)

    quarters = np.asarray(canvas.label).reshape(height, 2, width, 2).transpose(1, 3, 0, 2).reshape(4, height, width)
    votes = (quarters[:, None] == quarters[None]).sum(axis=1)
    label = np.where(votes.max(axis=0) >= 3, np.take_along_axis(quarters, votes.argmax(axis=0)[None], 0)[0], VOID)
    return np.clip(image, 0, 255).astype(np.uint8), label.astype(np.uint8)
