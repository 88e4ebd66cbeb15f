"""A folder of photographs: what is in it, what is left out and why, what is held out."""

import hashlib
import mimetypes
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyramid_ldm.data.digests import Facts, UnreadableFileError, facts_of, with_retries
from pyramid_ldm.data.images import HEIF, SUFFIXES, image_size
from pyramid_ldm.errors import UserError
from pyramid_ldm.ownership import MARKER, kind_of

RAW = frozenset({".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".heic", ".heif", ".hif", ".jxl", ".kdc", ".mrw",
                 ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srw", ".x3f"})  # fmt: skip
SHOWN = 3  # names in a line about many files


@dataclass(frozen=True)
class ImageFile:
    """A photograph and what its bytes hash to."""

    path: str
    digest: str  # hex; of the whole content, so that moving or renaming a file changes nothing
    size: tuple[int, int] | None = None  # (height, width) when upright; None where the header does not tell


@dataclass
class Folder:
    """What a folder holds."""

    root: Path
    files: list[ImageFile]  # by path; the first of those with one content
    copies: int = 0  # files whose content is another's
    unreadable: list[str] = field(default_factory=list)  # what cannot be opened, a message each
    ignored: dict[str, list[str]] = field(default_factory=dict)  # why: names

    def notes(self) -> list[str]:
        """What is left out, a line a reason."""
        lines = [f"{listed(len(names), names)} {why}" for why, names in self.ignored.items()]
        if self.copies:
            lines.append(f"{self.copies} copies of other files are left out")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} cannot be opened: {'; '.join(self.unreadable[:SHOWN])}")
        return [f"{self.root}: {line}" for line in lines]

    def large_enough(self, size: tuple[int, int], upscale: bool) -> tuple[list[ImageFile], list[str]]:
        """(those that cover `size`, (height, width), without being enlarged, a line about the others).

        UserError where there is none.
        """
        small = [] if upscale else [file for file in self.files if file.size and not covers(file.size, size)]
        if not small:
            return self.files, []
        kept = [file for file in self.files if not file.size or covers(file.size, size)]
        names = [f"{Path(file.path).name} {file.size[0]}x{file.size[1]}" for file in small if file.size]
        what = f"{listed(len(small), names)} smaller than {size[0]}x{size[1]} (height x width)"
        if not kept:
            raise UserError(
                f"{self.root}: all {what}; choose a smaller image_size, or enlarge them with data.upscale=true "
                f"(--upscale)"
            )
        return kept, [f"{self.root}: {what} are left out; data.upscale=true (--upscale) would enlarge them"]


def listed(count: int, names: Sequence[str]) -> str:
    """ "3 (a, b, c)"."""
    more = ", ..." if count > SHOWN else ""
    return f"{count} ({', '.join(names[:SHOWN])}{more})"


def covers(image: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether an image is at least `size`, both (height, width)."""
    return image[0] >= size[0] and image[1] >= size[1]


def scan(root: Path) -> Folder:
    """Reads a folder: nested, links followed, each place once. Hidden folders and those that pyramid-ldm wrote are
    stepped over; files that look like images and are not read here are counted.

    Raises UserError where the folder is missing, cannot be read, or holds no image.
    """
    found = list_images(root)
    facts = facts_of([Path(path) for path in found.files], "image", describe_size, f"{root}: photographs")
    by_digest: dict[str, ImageFile] = {}
    copies = 0
    for path, one in zip(found.files, facts, strict=True):
        if isinstance(one, Facts):
            copies += one.digest in by_digest
            by_digest.setdefault(one.digest, ImageFile(path, one.digest, noted_size(one.note)))
        else:
            found.unreadable[str(one.filename)] = one.strerror or type(one).__name__
    closed = [f"{path}: {why}" for path, why in found.unreadable.items()]
    if not by_digest:
        raise UserError(f"{root}: holds no image that can be opened ({closed[0]})")
    return Folder(root, list(by_digest.values()), copies, closed, found.ignored)


def describe_size(path: Path) -> str:
    """What is remembered of an image, for `facts_of`."""
    size = image_size(path)
    return note_of(size) if size else ""


def note_of(size: tuple[int, int]) -> str:
    """Of an image of this (height, width)."""
    return f"{size[0]}x{size[1]}"


def noted_size(note: str) -> tuple[int, int] | None:
    """The inverse of `note_of`: (height, width) when upright; None where the header did not tell."""
    height, _, width = note.partition("x")
    return (int(height), int(width)) if width else None


def _message(error: UnreadableFileError) -> str:
    return f"{error.filename}: {error.strerror}"


@dataclass
class Listing:
    """Names in a folder."""

    files: list[str]  # images, by path
    unreadable: dict[str, str]  # what cannot be opened, by path: why
    ignored: dict[str, list[str]]


def list_images(root: Path) -> Listing:
    """Every image file below `root`, without opening any; see `scan`."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder of photographs")
    listing = Listing([], {}, defaultdict(list))
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            status = with_retries(directory, directory.stat)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = with_retries(directory, lambda directory=directory: list(os.scandir(directory)))  # type: ignore[misc]
        except UnreadableFileError as error:
            if directory == root:
                raise UserError(f"{_message(error)}; give a folder that you may read") from None
            listing.unreadable[str(error.filename)] = error.strerror or type(error).__name__
            continue
        for entry in entries:
            _sort_in(entry, listing, waiting)
    listing.files.sort()
    if not listing.files and not listing.unreadable:
        hints = "; ".join(f"{listed(len(names), names)} {why}" for why, names in listing.ignored.items())
        raise UserError(f"{root}: holds no images ({', '.join(sorted(SUFFIXES))})" + (f"; {hints}" if hints else ""))
    return listing


def _sort_in(entry: "os.DirEntry[str]", listing: Listing, waiting: list[Path]) -> None:
    suffix = Path(entry.name).suffix.lower()
    try:
        directory, file = entry.is_dir(), entry.is_file()
    except OSError as error:
        listing.unreadable[entry.path] = error.strerror or type(error).__name__
        return
    if entry.name.startswith("."):
        if directory:
            listing.ignored["are hidden folders, which are stepped over"].append(entry.name)
    elif directory:
        kind = kind_of(Path(entry.path))
        if kind in (None, "photographs"):
            waiting.append(Path(entry.path))
        else:
            listing.ignored[f"hold what pyramid-ldm wrote ({MARKER}) and are stepped over"].append(entry.name)
    elif suffix in SUFFIXES:
        if file:
            listing.files.append(entry.path)
        elif entry.is_symlink():
            listing.unreadable[entry.path] = "is a link to nothing"
    elif file and (suffix in RAW or (mimetypes.guess_type(entry.name)[0] or "").startswith("image/")):
        why = "are not read: install pillow-heif for them" if suffix in (".heic", ".heif", ".hif") and not HEIF else (
            "look like images and are not read here; convert them to PNG or JPEG"
        )  # fmt: skip
        listing.ignored[why].append(entry.name)


def find_images(root: Path) -> list[ImageFile]:
    """The photographs of a folder, by path, each content once. Raises UserError as `scan` does."""
    return scan(root).files


def fingerprint(files: Iterable[ImageFile]) -> str:
    """A hash of a set of images, whatever their names and order."""
    return hashlib.sha256("".join(sorted({file.digest for file in files})).encode()).hexdigest()[:16]


def too_many_bad(where: object, bad: int, files: int, fraction: float, option: str) -> UserError | None:
    """What to say where more of a folder's `files` images than `fraction`, and than three, are `bad`: those that are
    there now and cannot be read. `option` is what the user gives the fraction as."""
    if bad <= max(3, fraction * files):
        return None
    return UserError(
        f"{where}: {bad} of {files} images cannot be read, more than {option}={fraction:g}; remove those that are "
        f"named above, or raise it, and run again"
    )


def with_known(files: Sequence[ImageFile], digests: Collection[str]) -> list[ImageFile]:
    """The files, and a stand-in for each digest that none of them has: a file that turned out to be unreadable still
    has its place after it was removed, so that no other moves."""
    present = {file.digest for file in files}
    return [*files, *(ImageFile("", digest) for digest in sorted(digests) if digest not in present)]


def split_held_out(files: Sequence[ImageFile], fraction: float) -> tuple[list[ImageFile], list[ImageFile]]:
    """(training, held out), both ordered by content: each file by its own hash, so that adding files moves no other;
    copies stay together; the same in both stages. With a fraction above 0 and two contents or more, at least one is
    held out and one is trained on."""
    groups: dict[str, list[ImageFile]] = defaultdict(list)
    for file in files:
        groups[file.digest].append(file)
    ranked = sorted(groups)
    held = [digest for digest in ranked if int(digest[:8], 16) < int(fraction * 2**32)]
    if fraction > 0 and len(ranked) > 1:
        held = held or ranked[:1]
        held = held if len(held) < len(ranked) else ranked[:-1]
    elif len(held) == len(ranked):
        held = []
    chosen = set(held)
    train = [file for digest in ranked if digest not in chosen for file in groups[digest]]
    return train, [file for digest in held for file in groups[digest]]
