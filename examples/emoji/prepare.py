"""Turn two npm archives of emoji into folders of images, one per class, for training.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0
    python examples/emoji/prepare.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-16.0.0.tgz --out emoji

The first archive holds the pictures (256×256, transparent), the second the name and subcategory of every emoji. The
result is `emoji/train/<class>/<code points>.png` and `emoji/val/<class>/<code points>.png`, on white.

Splits are by emoji, never by picture: all skin tones and genders of one emoji are on the same side.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SHA512 = {
    "pictures": "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb445d267bba207914232a87a10c75ee549d906"
    "9e720979c1106feb4954006de1ee",
    "names": "fea1caa8ae4daf7fbcce180eea41e6178dc59b90bc1cd9f401a151229830f07177fae17455f73c8e02c8d59412e5b6b5bc1ce4b1"
    "2f0d0428c77a3c0b6f60ff4a",
}
"""Of @lobehub/fluent-emoji-3d 1.1.0 and emoji-datasource 16.0.0 as the npm registry serves them."""

HELD_OUT = 0.1
MARGIN = 1.125
"""mvar resizes the shorter side to 1.125·R and takes R×R crops."""
SAME_PICTURE = 2.0
"""Pictures whose RMS difference at 32×32 (of 255) is below this count as one. Two encodings of a picture reach 1.5."""

TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
ADULTS = {"1f468", "1f469", "1f9d1"}


class Class(NamedTuple):
    """An emoji named in `emoji` is of this class alone, whatever its subcategory; `without` belongs to no class."""

    subcategories: tuple[str, ...] = ()
    emoji: str = ""
    without: str = ""


# Left out: what is too varied to be a class (household, event, game, body parts, money, mail, …), and what is in the
# package but not in github.com/microsoft/fluentui-emoji, so that its license is unknown: the subcategories family
# (families, couples, people holding hands) and country-flag.
CLASSES = {
    "face": Class(
        (
            "face-smiling",
            "face-affection",
            "face-tongue",
            "face-hand",
            "face-neutral-skeptical",
            "face-sleepy",
            "face-unwell",
            "face-hat",
            "face-glasses",
            "face-concerned",
            "face-negative",
        ),
        without="face_in_clouds",
    ),
    "monster": Class(("face-costume",), "smiling_imp imp skull skull_and_crossbones jack_o_lantern"),
    "animal_face": Class(
        ("cat-face", "monkey-face"),
        "monkey_face dog wolf fox_face raccoon cat lion_face tiger horse moose unicorn_face cow pig boar mouse hamster "
        "rabbit bear polar_bear koala panda_face frog dragon_face orangutan",
    ),
    "animal": Class(("animal-mammal", "animal-reptile"), without="pig_nose feet"),
    "bird": Class(("animal-bird",), without="feather wing"),
    "sea_animal": Class(("animal-marine",)),
    "bug": Class(("animal-bug",), without="spider_web microbe"),
    "heart": Class(("heart",), without="love_letter heart_decoration"),
    "hand": Class(
        (
            "hand-fingers-open",
            "hand-fingers-partial",
            "hand-single-finger",
            "hand-fingers-closed",
            "hands",
            "hand-prop",
        ),
        without="selfie",
    ),
    "head": Class(("person",), "man_with_turban man-wearing-turban woman-wearing-turban"),
    "gesture": Class(
        ("person-gesture",),
        "massage man-getting-massage woman-getting-massage haircut man-getting-haircut woman-getting-haircut",
    ),
    "profession": Class(("person-role",)),
    "fantasy": Class(("person-fantasy",), without="fairy male_fairy female_fairy merperson merman mermaid"),
    "sport": Class(("person-sport",), "runner man-running woman-running person_climbing man_climbing woman_climbing"),
    "pedestrian": Class(("person-activity",), without="person_in_steamy_room man_in_steamy_room woman_in_steamy_room"),
    "plant": Class(("plant-flower", "plant-other"), without="white_flower empty_nest nest_with_eggs mushroom"),
    "fruit_vegetable": Class(("food-fruit", "food-vegetable")),
    "food": Class(("food-prepared", "food-asian", "food-sweet")),
    "drink": Class(("drink",), without="ice_cube"),
    "building": Class(
        ("place-building", "place-religious"),
        without="stadium building_construction bricks rock wood tokyo_tower statue_of_liberty kaaba",
    ),
    "scenery": Class(
        (),
        "foggy night_with_stars cityscape sunrise_over_mountains sunrise city_sunset city_sunrise bridge_at_night "
        "desert national_park stars milky_way fireworks sparkler rice_scene motorway railway_track",
    ),
    "car": Class(
        (),
        "bus oncoming_bus trolleybus minibus ambulance fire_engine police_car oncoming_police_car taxi oncoming_taxi "
        "car oncoming_automobile blue_car pickup_truck truck articulated_lorry tractor racing_car auto_rickshaw",
    ),
    "train": Class(
        (),
        "steam_locomotive railway_car bullettrain_side bullettrain_front train2 metro light_rail station tram monorail "
        "mountain_railway train suspension_railway mountain_cableway aerial_tramway",
    ),
    "ship_plane": Class(("transport-water", "transport-air"), without="anchor ring_buoy seat"),
    "clock": Class(("time",), without="hourglass hourglass_flowing_sand"),
    "sky": Class(
        ("sky & weather",),
        "earth_africa earth_americas earth_asia",
        without="thermometer snowman snowman_without_snow fire umbrella_on_ground",
    ),
    "sports_gear": Class(("sport",), without="running_shirt_with_sash martial_arts_uniform goal_net golf"),
    "music": Class(("music", "musical-instrument"), "postal_horn", without="level_slider control_knobs"),
    "clothing": Class(
        ("clothing",),
        "running_shirt_with_sash martial_arts_uniform",
        without="eyeglasses dark_sunglasses goggles folding_hand_fan purse handbag pouch shopping_bags school_satchel "
        "hair_pick prayer_beads lipstick ring gem",
    ),
    "paper": Class(
        ("book-paper",),
        "memo date calendar spiral_note_pad spiral_calendar_pad chart_with_upwards_trend chart_with_downwards_trend "
        "bar_chart clipboard receipt",
        without="bookmark label",
    ),
    "device": Class(
        ("phone", "computer", "light & video"),
        "radio",
        without="battery low_battery electric_plug cd dvd abacus mag mag_right candle bulb flashlight izakaya_lantern "
        "diya_lamp telephone_receiver film_frames",
    ),
    "tool": Class(
        ("tool", "writing"),
        "scissors hocho key old_key",
        without="bomb shield scales link chains gear toolbox magnet ladder compression probing_cane",
    ),
    "arrow_button": Class(
        ("arrow", "av-symbol"),
        without="back end on soon top low_brightness high_brightness vibration_mode mobile_phone_off "
        "signal_strength wireless",
    ),
    "purple_button": Class(("zodiac", "religion")),
    "letter_button": Class(("alphanum",), "atm wc"),
    "digit_button": Class(("keycap",)),
    "public_sign": Class(("transport-sign",), "elevator cinema"),
    "warning": Class(("warning",)),
    "shape": Class(("geometric",)),
    "glyph": Class(
        ("math", "punctuation"),
        "heavy_check_mark x curly_loop loop part_alternation_mark heavy_dollar_sign o copyright registered tm",
    ),
}


class Emoji(NamedTuple):
    label: str
    key: str
    """Its code points without skin tone and gender: the unit of the split."""
    name: str
    """Its code points with skin tone and gender."""


def points(code: str) -> tuple[str, ...]:
    """The code points of a name in either archive, without leading zeros and the emoji presentation selector."""
    return tuple(p.lstrip("0") for p in code.lower().replace("_", "-").split("-") if p != "fe0f")


def split_key(code: str) -> str:
    """The same for all skin tones of an emoji, and for woman, man and person of a role."""
    code_points = [p for p in points(code) if p not in TONES]
    for sign in ("2640", "2642"):
        while code_points[-2:] == ["200d", sign]:
            code_points = code_points[:-2]
    if len(code_points) > 1 and sum(p in ADULTS for p in code_points) == 1:
        code_points = ["1f9d1" if p in ADULTS else p for p in code_points]
    return "-".join(code_points)


def emoji_by_points(entries: list[dict[str, object]]) -> dict[tuple[str, ...], Emoji]:
    """Every emoji that has a class, with its skin tones, by code points."""
    by_name = {name: label for label, c in CLASSES.items() for name in c.emoji.split()}
    by_subcategory = {name: label for label, c in CLASSES.items() for name in c.subcategories}
    left_out = {name for c in CLASSES.values() for name in c.without.split()} - by_name.keys()
    found = {}
    for entry in entries:
        name = str(entry["short_name"])
        label = by_name.get(name) or by_subcategory.get(str(entry["subcategory"]))
        if label is None or name in left_out:
            continue
        variations = entry.get("skin_variations") or {}
        assert isinstance(variations, dict)
        key = split_key(str(entry["unified"]))
        for form in (entry, *variations.values()):
            unified = str(form["unified"]).lower()
            found[points(unified)] = Emoji(label, key, unified)
    return found


def members(archive: Path, role: str, verify: bool) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of a .tgz.

    Raises:
        ValueError: its SHA-512 is not that of the expected version.
    """
    content = archive.read_bytes()
    digest = hashlib.sha512(content).hexdigest()
    if verify and digest != SHA512[role]:
        raise ValueError(
            f"{archive}: expected the archive with SHA-512 {SHA512[role][:16]}…, got {digest[:16]}…; is it another "
            "version, or incomplete? --any-version skips this check"
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, stream.read()


def on_white(content: bytes, side: int) -> Image.Image:
    """The picture on white, side×side pixels, with a white border that makes it 1.125 times as large as its content."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA")
    square = Image.new("RGBA", (max(picture.size),) * 2, "white")
    square.alpha_composite(picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2))
    inner = round(side / MARGIN)
    image = Image.new("RGB", (side, side), "white")
    start = (side - inner) // 2
    image.paste(square.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (start, start))
    return image


def distinct(images: dict[Emoji, Image.Image]) -> dict[Emoji, Image.Image]:
    """Of pictures that look the same, the first."""
    # From 255 to 0, so that the white background is 0 and the squares of the differences keep their digits.
    small = np.array([255 - np.asarray(image.resize((32, 32)), np.float64).ravel() for image in images.values()])
    norms = (small**2).sum(1)
    same = norms[:, None] + norms - 2 * small @ small.T < SAME_PICTURE**2 * small.shape[1]
    kept: list[int] = []
    for i in range(len(small)):
        if not same[i, kept].any():
            kept.append(i)
    items = list(images.items())
    return dict(items[i] for i in kept)


def held_out(emoji: list[Emoji]) -> set[str]:
    """The keys of a tenth of the emoji of each class, by hash; at least two (one of two to five, none of one)."""
    keys: dict[str, set[str]] = {}
    for e in emoji:
        keys.setdefault(e.label, set()).add(e.key)
    chosen = set()
    for of_class in keys.values():
        number = max(round(HELD_OUT * len(of_class)), 2 if len(of_class) >= 6 else min(1, len(of_class) - 1))
        chosen.update(sorted(of_class, key=lambda key: hashlib.sha256(key.encode()).digest())[:number])
    return chosen


def prepare(pictures: Path, names: Path, out: Path, side: int = 72, verify: bool = True) -> None:
    """Write the folder `out`, whole or not at all.

    Raises:
        ValueError: `out` is not empty, or an archive is not the expected one.
    """
    if side < 9:
        raise ValueError(f"--side: expected at least 9 pixels, got {side}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problem = "is not empty" if out.is_dir() else "is a file"
        raise ValueError(f"--out: expected a new or empty folder, got {out}, which {problem}")
    tables = [json.loads(content) for name, content in members(names, "names", verify) if name.endswith("/emoji.json")]
    if len(tables) != 1:
        raise ValueError(f"{names}: expected one emoji.json, got {len(tables)}")
    known = emoji_by_points(tables[0])

    images: dict[Emoji, Image.Image] = {}
    files = {name: content for name, content in members(pictures, "pictures", verify) if name.endswith(".webp")}
    for name in sorted(files):
        emoji = known.get(points(Path(name).stem))
        if emoji is not None and emoji not in images:
            images[emoji] = on_white(files[name], side)
    if not images:
        raise ValueError(f"{pictures}: expected pictures of known emoji, found none in {len(files)} .webp files")
    total = len(images)
    images = distinct(images)
    validation = held_out(list(images))

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        counts: dict[str, dict[str, list[str]]] = {}
        for emoji, image in images.items():
            part = "val" if emoji.key in validation else "train"
            folder = partial / part / emoji.label
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{emoji.name}.png")
            counts.setdefault(emoji.label, {"train": [], "val": []})[part].append(emoji.key)
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{'class':<16} {'train':>5} {'(emoji)':>8} {'val':>5} {'(emoji)':>8}")
    for label, keys in sorted(counts.items()):
        train, val = keys["train"], keys["val"]
        print(f"{label:<16} {len(train):>5} {len(set(train)):>8} {len(val):>5} {len(set(val)):>8}")
    number = {p: sum(len(c[p]) for c in counts.values()) for p in ("train", "val")}
    print(
        f"{out}: {number['train']} training and {number['val']} held-out images of {side}×{side} in {len(counts)} "
        f"classes; {total - len(images)} repeated pictures left out"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make a training folder of Microsoft's Fluent Emoji in 3D.", allow_abbrev=False
    )
    parser.add_argument("pictures", type=Path, help="lobehub-fluent-emoji-3d-1.1.0.tgz")
    parser.add_argument("names", type=Path, help="emoji-datasource-16.0.0.tgz")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    parser.add_argument(
        "--side", type=int, default=72, help="width and height of the images in pixels, 1.125·R (default: 72, R = 64)"
    )
    parser.add_argument("--any-version", action="store_true", help="accept archives with another SHA-512")
    args = parser.parse_args()
    try:
        prepare(args.pictures, args.names, args.out, args.side, verify=not args.any_version)
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
