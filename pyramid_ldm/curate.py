"""The two data sets of the paper, from photographs of your own (PDM section 4.1; `pyramid-ldm curate`)."""

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from pyramid_ldm.data.digests import Facts, facts_of
from pyramid_ldm.data.folder import Listing, describe_size, list_images, noted_size
from pyramid_ldm.data.images import UnreadableImage, load_image, resize_and_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import write_atomic, write_csv
from pyramid_ldm.ownership import claim, held, keep_apart, marker_of
from pyramid_ldm.workers import in_processes

REPORT = "curated.csv"
COLUMNS = ("file", "verdict", "height", "width", "why")
KEPT, LEFT_OUT, COPY, UNREADABLE = "kept", "left out", "copy", "unreadable"
DIGITS = 16  # of a content's digest, that its file's name ends with
QUALITY = 95  # of the JPEGs, without sub-sampling of colours
RULES = {"scapes2k": (1024, 2048), "people2k": (2048, 2048)}  # (height, width) of what is written


@dataclass(frozen=True)
class Verdict:
    """What became of a file."""

    path: str
    verdict: str
    size: tuple[int, int] | None = None  # (height, width), upright
    why: str = ""  # of one that is kept, the file it went to


def refusal(rule: str, size: tuple[int, int], *, inclusive: bool = False) -> str:
    """Why a rule leaves out an image of this size, (height, width), upright; empty where it does not.

    "scapes2k": wider than 2048, higher than 1024, and wider than high; "people2k": both sides larger than 2048. With
    `inclusive` these very sizes will do.
    """
    height, width = size
    least = RULES[rule]
    for name, side, limit in (("height", height, least[0]), ("width", width, least[1])):
        if side < limit or (side == limit and not inclusive):
            return f"{name} {side} is not {'at least' if inclusive else 'above'} {limit}"
    if rule == "scapes2k" and width <= height:
        return f"width {width} is not above height {height}"
    return ""


def cut(rule: str, image: Image.Image) -> Image.Image:
    """What a rule makes of an image: "scapes2k" covers 2048x1024 and cuts the centre; "people2k" cuts the centre square
    (of an odd difference the smaller half at the top or left) and resizes that. Lanczos."""
    if rule == "people2k":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return resize_and_crop(image, RULES[rule])


def curate(data: Path, out: Path, rule: str, *, inclusive: bool = False) -> str:
    """Writes what a rule takes of a folder, each content once, into `out`, and a CSV file that says for each file what
    happened and why. What is there already is kept. Returns a summary.

    UserError where nothing is taken, or `out` holds another rule's.
    """
    keep_apart(out, "--out", {"DATA": data})
    listing = list_images(data)
    about = {"rule": rule, "inclusive": inclusive}
    claim(out, "photographs", "--out", **about)
    before = marker_of(out)
    if any(before.get(key) != value for key, value in about.items()):
        made = f"by {before['rule']}{' --inclusive' * before['inclusive']}" if "rule" in before else "by the demo"
        raise UserError(f"{out}: was made {made}; give another --out")
    with held(out):
        verdicts = _curate(data, listing, out, rule, inclusive)
        rows = [[each.path, each.verdict, *(each.size or ("", "")), each.why] for each in verdicts]
        write_csv(out / REPORT, COLUMNS, rows)
    counts = Counter(verdict.verdict for verdict in verdicts)
    if not counts[KEPT]:
        raise UserError(f"{data}: {rule} takes none of {len(verdicts)} images; {out / REPORT} says why")
    told = ", ".join(f"{counts[name]} {name}" for name in (LEFT_OUT, COPY, UNREADABLE))
    summary = f"{counts[KEPT]} of {len(verdicts)} images in {out} ({told}); {REPORT} says why"
    others = len(set(made_before(out).values()) - {each.why for each in verdicts if each.verdict == KEPT})
    return summary + (f"\n{others} others in {out} are of no image in {data}" if others else "")


def made_before(out: Path) -> dict[str, str]:
    """What `out` holds: file names by the digest's beginning that they end with."""
    return {path.stem.rpartition("-")[2]: path.name for path in sorted(out.glob("*.jpg"))}


def _curate(data: Path, listing: Listing, out: Path, rule: str, inclusive: bool) -> list[Verdict]:
    paths = [Path(path) for path in listing.files]
    verdicts = {path: Verdict(path, UNREADABLE, None, why) for path, why in listing.unreadable.items()}
    first: dict[str, str] = {}
    todo: list[tuple[str, Path]] = []
    done = made_before(out)
    for path, facts in zip(listing.files, facts_of(paths, "image", describe_size, f"{data}: photographs"), strict=True):
        if not isinstance(facts, Facts):
            verdicts[path] = Verdict(path, UNREADABLE, None, facts.strerror or str(facts))
            continue
        size, mark = noted_size(facts.note), facts.digest[:DIGITS]
        if facts.digest in first:
            verdicts[path] = Verdict(path, COPY, size, first[facts.digest])
        elif size and (why := refusal(rule, size, inclusive=inclusive)):
            verdicts[path] = Verdict(path, LEFT_OUT, size, why)
        elif mark in done:
            verdicts[path] = Verdict(path, KEPT, size, done[mark])
        else:
            # As many bytes as any file system takes, none of them half a character.
            stem = os.fsencode(Path(path).stem)[:120].decode("utf-8", "ignore")
            todo.append((path, out / f"{stem}-{mark}.jpg"))
        first.setdefault(facts.digest, path)
    with Progress("curate", len(todo)) as progress:
        for verdict in in_processes(partial(treat, rule=rule, inclusive=inclusive), todo):
            verdicts[verdict.path] = verdict
            progress.advance()
    return [verdicts[path] for path in sorted(verdicts)]


def treat(what: tuple[str, Path], rule: str, inclusive: bool) -> Verdict:
    """One file, to its place."""
    path, target = what
    try:
        image = load_image(path)
    except UnreadableImage as error:
        return Verdict(path, UNREADABLE, None, str(error).removeprefix(f"{path}: "))
    size = (image.height, image.width)
    why = refusal(rule, size, inclusive=inclusive)
    if why:
        return Verdict(path, LEFT_OUT, size, why)
    made = cut(rule, image)
    write_atomic(target, lambda temporary: made.save(temporary, format="JPEG", quality=QUALITY, subsampling=0))
    return Verdict(path, KEPT, size, target.name)
