"""Every image of a folder, read whole: what can be trained on, what is converted for it, what cannot be read, and what
is there twice (`pyramid-ldm check`)."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import PIL

from pyramid_ldm.data.digests import Facts, FactsCache, digest_of
from pyramid_ldm.data.folder import ImageFile, covers, list_images, listed, note_of, split_held_out
from pyramid_ldm.data.images import UnreadableImage, conversions, decode_image, normalise, read_bytes, to_pil
from pyramid_ldm.data.photographs import Photographs, Preprocessing
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.files import write_atomic, write_csv
from pyramid_ldm.workers import in_processes

USABLE, SMALL, COPY, UNREADABLE = "usable", "too small", "copy", "unreadable"
BITS = 64  # of a perceptual hash
ALIKE = 4  # bits in which the hashes of near duplicates may differ
PLAIN = 3  # bits that are set in that of an image of one colour, at most
COLUMNS = ("file", "verdict", "height", "width", "converted", "cause", "like")
CROPS, SIDE = 48, 256  # on the contact sheet, pixels a side at most
SHEET = b"pyramid-ldm check"  # the comment of a sheet, by which it is known
KIND = f"check 1, Pillow {PIL.__version__}"  # of what is remembered: another version may read other files
AT_ONCE = 256  # findings that are remembered at once


@dataclass(frozen=True)
class Finding:
    """What there is to say of a file."""

    path: str
    verdict: str = USABLE
    size: tuple[int, int] | None = None  # (height, width), upright; None where it cannot be read
    converted: tuple[str, ...] = ()  # see `conversions`
    cause: str = ""  # why it cannot be read
    like: str = ""  # the first file with the same content, or that looks the same
    digest: str = ""  # see `ImageFile`; empty where it was not read
    perceptual: int = 0  # a hash that survives re-sampling and compression

    @property
    def note(self) -> str:
        """What is remembered of it."""
        return json.dumps([self.size, self.converted, self.cause, self.perceptual])

    @classmethod
    def remembered(cls, path: str, facts: Facts) -> "Finding":
        """The inverse of `note`."""
        size, converted, cause, perceptual = json.loads(facts.note)
        return cls(
            path,
            UNREADABLE if size is None else USABLE,
            None if size is None else (size[0], size[1]),
            tuple(converted),
            cause,
            digest=facts.digest,
            perceptual=perceptual,
        )


@dataclass(frozen=True)
class Checked:
    """A folder that was read."""

    data: Path
    size: tuple[int, int] | None  # (height, width) that images need; None: any
    findings: list[Finding]  # by path
    ignored: dict[str, list[str]]  # why: names of files that were not looked at

    @property
    def usable(self) -> list[ImageFile]:
        """What training would read."""
        return [ImageFile(each.path, each.digest, each.size) for each in self.findings if each.verdict == USABLE]

    def write_report(self, path: Path) -> None:
        """CSV, one line a file."""
        rows = []
        for each in self.findings:
            height, width = each.size or ("", "")
            rows.append([each.path, each.verdict, height, width, "; ".join(each.converted), each.cause, each.like])
        write_csv(path, COLUMNS, rows)

    def write_sheet(self, path: Path, cut: Preprocessing, seed: int, held_out: float) -> None:
        """A JPEG of the crops that training, with this seed and share held out, would see first."""
        train, _ = split_held_out(self.usable, held_out)
        photographs = Photographs(train, cut, seed)
        crops = [to_pil(normalise(photographs[i][0])) for i in range(min(CROPS, len(train)))]
        for crop in crops:
            crop.thumbnail((SIDE, SIDE))
        sheet = grid(crops)
        write_atomic(path, lambda temporary: sheet.save(temporary, format="JPEG", quality=90, comment=SHEET))


def look(path: str) -> tuple[os.stat_result | None, Finding]:
    """At one file, and its status before it was read. UserError where the disk fails."""
    from imagehash import phash  # SciPy

    data = b""
    try:
        status = os.stat(path)
        data = read_bytes(path)
        image = decode_image(data, path)
    except (OSError, UnreadableImage) as error:
        cause = str(error).removeprefix(f"{path}: ")
        if not data:  # it was not read: another time it may be
            return None, Finding(path, UNREADABLE, cause=cause)
        return status, Finding(path, UNREADABLE, cause=cause, digest=digest_of(data))
    return status, Finding(
        path,
        size=(image.height, image.width),
        converted=tuple(conversions(data)),
        digest=digest_of(data),
        perceptual=int(str(phash(image)), 16),
    )


def check(data: Path, size: tuple[int, int] | None = None) -> Checked:
    """Reads every image below `data`. What was read is remembered, as far as it got: another check goes on from there,
    and training need not read files again to know them.

    Args:
        size: (height, width) below which an image is too small; None: any will do.

    UserError where there is no image, or the disk fails.
    """
    listing = list_images(data)
    mine, images = FactsCache(KIND), FactsCache("image")
    findings = [Finding(path, UNREADABLE, cause=why) for path, why in listing.unreadable.items()]
    todo = []
    for path in listing.files:
        with suppress(OSError):
            facts = mine.get(os.stat(path))
            if facts is not None:
                findings.append(Finding.remembered(path, facts))
                continue
        todo.append(path)
    fresh: list[tuple[os.stat_result, Finding]] = []

    def remember() -> None:
        mine.put([(status, Facts(found.digest, found.note)) for status, found in fresh])
        images.put([(status, Facts(found.digest, note_of(found.size))) for status, found in fresh if found.size])
        fresh.clear()

    with Progress("check", len(listing.files)) as progress:
        progress.advance(len(listing.files) - len(todo))
        try:
            for status, found in in_processes(look, todo):
                findings.append(found)
                if status is not None:
                    fresh.append((status, found))
                if len(fresh) >= AT_ONCE:
                    remember()
                progress.advance()
        finally:
            remember()
    findings.sort(key=lambda found: found.path)
    if size is not None:
        findings = [replace(f, verdict=SMALL) if f.size and not covers(f.size, size) else f for f in findings]
    return Checked(data, size, with_copies(findings), listing.ignored)


def with_copies(findings: Sequence[Finding]) -> list[Finding]:
    """What has another's content is its copy; what looks like another says so. The first by path is the original."""
    first: dict[str, str] = {}
    marked = []
    for found in findings:
        if found.size and found.digest in first:
            found = replace(found, verdict=COPY, like=first[found.digest])
        elif found.size:
            first[found.digest] = found.path
        marked.append(found)
    originals = [i for i, found in enumerate(marked) if found.size and found.verdict != COPY and not flat(found)]
    for i, j in near([marked[i].perceptual for i in originals]).items():
        marked[originals[i]] = replace(marked[originals[i]], like=marked[originals[j]].path)
    return marked


def flat(found: Finding) -> bool:
    """Whether there is hardly anything to see, and so nothing to compare."""
    return not PLAIN < found.perceptual.bit_count() < BITS - PLAIN


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


def table(checked: Checked) -> str:
    """How many of each kind, with a few names."""
    findings, size = checked.findings, checked.size
    by_verdict: dict[str, list[Finding]] = defaultdict(list)
    for found in findings:
        by_verdict[found.verdict].append(found)
    usable = by_verdict[USABLE]
    rows = [(f"{checked.data}: images", len(findings), ""), ("usable", len(usable), "")]
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
    lines += [f"{listed(len(files), files)} {why}" for why, files in checked.ignored.items()]
    return "\n".join(lines)


def names(files: Sequence[Finding]) -> tuple[int, str]:
    """How many, and the first of them."""
    shown = listed(len(files), [Path(found.path).name for found in files]).partition(" ")[2]
    return len(files), shown if files else ""
