"""Every image of a folder, read whole: what can be trained on, what is converted for it, what cannot be read, and what
is there twice (`pyramid-ldm check`)."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pyramid_ldm.data.digests import Facts, remember
from pyramid_ldm.data.folder import ImageFile, covers, list_images, listed
from pyramid_ldm.data.images import UnreadableImage, conversions, decode_image, read_bytes, to_pil
from pyramid_ldm.data.photographs import Photographs, Preprocessing
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.files import write_atomic, write_csv
from pyramid_ldm.workers import in_processes

USABLE, SMALL, COPY, UNREADABLE = "usable", "too small", "copy", "unreadable"
BITS = 64  # of a perceptual hash
ALIKE = 4  # bits in which the hashes of near duplicates may differ
COLUMNS = ("file", "verdict", "height", "width", "converted", "cause", "like")
CROPS, SIDE = 48, 256  # on the contact sheet, pixels a side at most


@dataclass(frozen=True)
class Finding:
    """What there is to say of a file."""

    path: str
    verdict: str = USABLE
    size: tuple[int, int] | None = None  # (height, width), upright
    converted: tuple[str, ...] = ()  # see `conversions`
    cause: str = ""  # why it cannot be read
    like: str = ""  # the first file with the same content, or that looks the same
    digest: str = ""  # see `ImageFile`
    perceptual: int = 0  # a hash that survives re-sampling and compression
    status: os.stat_result | None = None  # of the file, before it was read


def look(path: str, size: tuple[int, int] | None) -> Finding:
    """At one file; `size`: (height, width) below which it is too small."""
    from imagehash import phash  # SciPy

    try:
        status = os.stat(path)
        data = read_bytes(path)
        image = decode_image(data, path)
    except (OSError, UserError, UnreadableImage) as error:  # gone; the disk; the content
        return Finding(path, UNREADABLE, cause=str(error).removeprefix(f"{path}: "))
    found = (image.height, image.width)
    return Finding(
        path,
        SMALL if size is not None and not covers(found, size) else USABLE,
        found,
        tuple(conversions(data)),
        digest=hashlib.sha256(data).hexdigest()[:32],
        perceptual=int(str(phash(image)), 16),
        status=status,
    )


def check(
    data: Path,
    *,
    size: tuple[int, int] | None = None,
    cut: Preprocessing | None = None,
    seed: int = 0,
    report: Path | None = None,
    sheet: Path | None = None,
) -> tuple[str, int]:
    """Reads every image below `data`: a table of what was found, and how many can be used.

    Args:
        size: (height, width) that images need; None: any.
        cut: how training would cut them, for the sheet.
        report: a CSV file, one line a file.
        sheet: a JPEG of crops that training would see first.

    What is there is remembered: training need not read it again to know it. UserError where there is no image at all.
    """
    listing = list_images(data)
    findings: list[Finding] = []
    with Progress("check", len(listing.files)) as progress:
        for found in in_processes(partial(look, size=size), listing.files):
            findings.append(found)
            progress.advance()
    findings.sort(key=lambda found: found.path)
    remember(
        "image", [(f.status, Facts(f.digest, f"{f.size[0]}x{f.size[1]}")) for f in findings if f.size and f.status]
    )
    findings = with_copies(findings)
    if report is not None:
        write_csv(report, COLUMNS, map(row, findings))
    usable = [ImageFile(found.path, found.digest, found.size) for found in findings if found.verdict == USABLE]
    text = table(data, findings, size, listing.unreadable, listing.ignored)
    if sheet is not None and cut is not None and usable:
        photographs = Photographs(usable, cut, seed)
        crops = [to_pil(photographs[i][0].float() / 127.5 - 1) for i in range(min(CROPS, len(usable)))]
        for crop in crops:
            crop.thumbnail((SIDE, SIDE))
        picture = grid(crops)
        write_atomic(sheet, lambda temporary: picture.save(temporary, format="JPEG", quality=90))
    return text, len(usable)


def with_copies(findings: Sequence[Finding]) -> list[Finding]:
    """What has another's content is its copy; what looks like another says so. The first by path is the original."""
    first: dict[str, str] = {}
    marked = []
    for found in findings:
        if found.digest and found.digest in first:
            found = replace(found, verdict=COPY, like=first[found.digest])
        elif found.digest:
            first[found.digest] = found.path
        marked.append(found)
    originals = [i for i, found in enumerate(marked) if found.digest and found.verdict != COPY]
    for i, j in near([marked[i].perceptual for i in originals]).items():
        marked[originals[i]] = replace(marked[originals[i]], like=marked[originals[j]].path)
    return marked


def near(hashes: Sequence[int]) -> dict[int, int]:
    """Which hash differs from an earlier one in at most ALIKE bits: {its index: the index of the first}. Two such
    hashes agree in at least one of ALIKE + 1 parts, so that few are compared."""
    parts = ALIKE + 1
    width = -(-BITS // parts)
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(parts)]
    found: dict[int, int] = {}
    for i, value in enumerate(hashes):
        keys = [value >> width * part & (1 << width) - 1 for part in range(parts)]
        candidates = {j for bucket, key in zip(buckets, keys, strict=True) for j in bucket[key]}
        alike = [j for j in candidates if (hashes[j] ^ value).bit_count() <= ALIKE]
        if alike:
            found[i] = min(alike)
            continue  # whatever is like this one is like the first, or nearly
        for bucket, key in zip(buckets, keys, strict=True):
            bucket[key].append(i)
    return found


def row(found: Finding) -> list[object]:
    """Of the report."""
    height, width = found.size or ("", "")
    return [found.path, found.verdict, height, width, "; ".join(found.converted), found.cause, found.like]


def table(
    data: Path,
    findings: Sequence[Finding],
    size: tuple[int, int] | None,
    closed: Sequence[str],
    ignored: dict[str, list[str]],
) -> str:
    """How many of each kind, with a few names."""
    by_verdict: dict[str, list[Finding]] = defaultdict(list)
    for found in findings:
        by_verdict[found.verdict].append(found)
    usable = by_verdict[USABLE]
    rows = [(f"{data}: images", len(findings), ""), ("usable", len(usable), "")]
    kinds = Counter(kind for found in usable for kind in found.converted)
    rows += [(f"  converted: {kind}", count, "") for kind, count in kinds.most_common()]
    rows.append(("  like another (near duplicates)", *names([found for found in usable if found.like])))
    if size is not None:
        rows.append((f"too small for {size[0]}x{size[1]} (height x width)", *names(by_verdict[SMALL])))
    rows.append(("copies of another", *names(by_verdict[COPY])))
    causes: dict[str, list[Finding]] = defaultdict(list)
    for found in by_verdict[UNREADABLE]:
        causes[re.sub(r"\d+", "N", found.cause)].append(found)
    for cause, files in sorted(causes.items(), key=lambda each: -len(each[1])):
        rows.append((f"unreadable: {cause}", *names(files)))
    width = max(len(name) for name, _, _ in rows if len(name) <= 72)
    lines = [f"{name.ljust(width)}  {count:>7}  {shown}".rstrip() for name, count, shown in rows]
    lines += [f"cannot be opened: {each}" for each in closed]
    lines += [f"{listed(len(files), files)} {why}" for why, files in ignored.items()]
    return "\n".join(lines)


def names(files: Sequence[Finding]) -> tuple[int, str]:
    """How many, and the first of them."""
    shown = listed(len(files), [Path(found.path).name for found in files]).partition(" ")[2]
    return len(files), shown if files else ""
