"""What is in a folder, whose content is known by all of its bytes, and what is left out and why."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyramid_ldm.data import digests, folder
from pyramid_ldm.data.digests import FactsCache, UnreadableFileError, facts_of, with_retries
from pyramid_ldm.data.folder import ImageFile, find_images, fingerprint, list_images, scan, split_held_out, with_known
from pyramid_ldm.errors import UserError
from pyramid_ldm.ownership import claim


def save(path, seed=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_that_differ_in_the_middle_alone_are_different(tmp_path):
    """White borders, no compression: what a hash of both ends and the size takes for one picture."""
    for i in range(6):
        pixels = np.full((256, 256, 3), 255, np.uint8)
        pixels[100:-100, 100:-100] = np.random.default_rng(i).integers(0, 256, (56, 56, 3))
        Image.fromarray(pixels).save(tmp_path / f"{i}.bmp")
    before = find_images(tmp_path)
    assert len({file.digest for file in before}) == 6
    train, held_out = split_held_out(before, 0.1)
    assert (len(train), len(held_out)) == (5, 1)
    path = tmp_path / "3.bmp"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some tools leave it
    assert fingerprint(find_images(tmp_path)) != fingerprint(before)


def test_copies_are_one_photograph(tmp_path):
    save(tmp_path / "b.png")
    for i in range(5):
        shutil.copy(tmp_path / "b.png", tmp_path / f"c{i}.png")
    found = scan(tmp_path)
    assert [Path(file.path).name for file in found.files] == ["b.png"]
    assert found.notes() == [f"{tmp_path}: 5 copies of other files are left out"]
    train, held_out = split_held_out(found.files, 0.5)
    assert (len(train), held_out) == (1, []), "one group is trained on"


def test_a_split_never_parts_copies():
    files = [ImageFile(f"{i}.png", f"{i % 4:032x}") for i in range(12)]
    for fraction in (0.05, 0.5, 0.99):
        train, held_out = split_held_out(files, fraction)
        assert train
        assert held_out
        assert not {file.digest for file in train} & {file.digest for file in held_out}
        assert len(train) + len(held_out) == 12


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(3)]
    old = [os.utime(path, (1, 1)) for path in paths]  # not just now
    assert old
    monkeypatch.setattr(digests, "SETTLED", -(10**12))  # their ctime is just now
    reads = []
    read = digests.read_facts
    monkeypatch.setattr(digests, "read_facts", lambda path, describe: reads.append(path) or read(path, describe))
    first = facts_of(paths, "image", str, "x")
    assert sorted(reads) == paths
    assert facts_of(paths, "image", str, "x") == first
    assert facts_of([*paths[1:]], "image", str, "x") == first[1:]
    assert len(reads) == 3
    moved = shutil.move(paths[0], tmp_path / "moved.png")
    save(paths[1], 9)
    again = facts_of([Path(moved), paths[1]], "image", str, "x")
    assert again[0].digest == first[0].digest
    assert again[1].digest != first[1].digest
    assert facts_of(paths[2:], "shard", str, "x") == first[2:]
    assert reads.count(paths[2]) == 2, "another kind of facts"


def test_what_was_changed_just_now_is_not_remembered(tmp_path):
    """Within one tick of the file system's clock a second change would not show."""
    path = save(tmp_path / "a.png")
    first = facts_of([path], "image", str, "x")[0]
    assert FactsCache("image").get(path.stat()) is None
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert facts_of([path], "image", str, "x")[0] != first


@pytest.mark.parametrize("broken", ["read-only", "no database", "no home"])
def test_without_a_place_to_remember_it_only_takes_longer(tmp_path, monkeypatch, broken):
    save(tmp_path / "photos/a.png")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if broken == "read-only":
        (cache / "pyramid_ldm").write_text("a file where the folder should be")
    elif broken == "no database":
        (cache / "pyramid_ldm").mkdir()
        (cache / "pyramid_ldm/files.sqlite").write_text("no database at all, but long enough to be looked at" * 99)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert len(find_images(tmp_path / "photos")) == 1


def test_links_are_followed_and_loops_seen(tmp_path):
    save(tmp_path / "elsewhere/a.png", 1)
    save(tmp_path / "photos/b.png", 2)
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos/link")
    (tmp_path / "photos/c.png").symlink_to(tmp_path / "elsewhere/a.png")
    (tmp_path / "photos/gone.png").symlink_to(tmp_path / "nothing.png")
    found = scan(tmp_path / "photos")
    assert sorted({Path(file.path).resolve().name for file in found.files}) == ["a.png", "b.png"]
    assert found.copies == 1
    assert found.unreadable == [f"{tmp_path / 'photos/gone.png'}: is a link to nothing"]


def test_hidden_folders_runs_and_other_formats_are_left_out_and_said(tmp_path):
    save(tmp_path / "a.png", 1)
    save(tmp_path / ".thumbnails/t.png", 2)
    save(tmp_path / "samples/s.png", 3)
    claim(tmp_path / "demo/photographs", "photographs", "x")
    save(tmp_path / "demo/photographs/d.png", 4)
    shutil.move(tmp_path / "samples/s.png", tmp_path / "s")
    claim(tmp_path / "samples", "samples", "x")
    shutil.move(tmp_path / "s", tmp_path / "samples/s.png")
    for name in ("IMG_1.CR2", "IMG_2.nef", "IMG_3.cr2", "x.gif", "notes.txt", "movie.mp4"):
        (tmp_path / name).write_bytes(b"x")
    found = scan(tmp_path)
    assert sorted(Path(file.path).name for file in found.files) == ["a.png", "d.png"]
    notes = "\n".join(found.notes())
    assert "1 (.thumbnails) are hidden folders" in notes
    assert "1 (samples) hold what pyramid-ldm wrote (pyramid_ldm.json) and are stepped over" in notes
    assert "4 (" in notes
    assert "look like images and are not read here" in notes
    assert "notes.txt" not in notes
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/IMG_1.CR2").write_bytes(b"x")
    with pytest.raises(UserError, match=r"raw: holds no images .*; 1 \(IMG_1\.CR2\) look like images"):
        scan(tmp_path / "raw")


def test_heif_is_read_where_pillow_heif_is_there_and_said_where_not(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 100, 50))
    pillow_heif.from_pillow(image).save(tmp_path / "IMG_1.HEIC", quality=95)
    (file,) = scan(tmp_path).files
    assert file.size == (48, 64)
    save(tmp_path / "a.png")
    monkeypatch.setattr(folder, "SUFFIXES", frozenset({".png"}))
    monkeypatch.setattr(folder, "HEIF", False)
    assert scan(tmp_path).notes() == [f"{tmp_path}: 1 (IMG_1.HEIC) are not read: install pillow-heif for them"]


def test_photographs_smaller_than_asked_are_named_and_left_out(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("large", (64, 40)), ("low", (64, 31)), ("narrow", (39, 64))):
        save(tmp_path / f"{name}.png", 1, size[::-1])
    Image.fromarray(np.random.default_rng(7).integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(
        tmp_path / "turned.jpg", exif=exif
    )
    found = scan(tmp_path)
    assert {Path(file.path).stem: file.size for file in found.files} == {
        "large": (40, 64), "low": (31, 64), "narrow": (64, 39), "turned": (32, 64),
    }  # fmt: skip
    kept, notes = found.large_enough((32, 40), upscale=False)
    assert [Path(file.path).stem for file in kept] == ["large", "turned"]
    (note,) = notes
    assert "2 (low.png 31x64, narrow.png 64x39) smaller than 32x40 (height x width) are left out" in note
    assert found.large_enough((32, 40), upscale=True) == (found.files, [])
    with pytest.raises(UserError, match=r"all 4 \(.*\) smaller than 1024x2048 .*data\.upscale=true"):
        found.large_enough((1024, 2048), upscale=False)


def forbid(monkeypatch, path):
    """As chmod 000 for everybody but root, which tests may be."""
    real_open, real_scandir = Path.open, os.scandir

    def open_(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real_open(self, *args, **kwargs)

    def scandir(where):
        if Path(where) == path:
            raise PermissionError(13, "Permission denied", str(where))
        return real_scandir(where)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("name", ["b.png", "sub"])
def test_what_may_not_be_read_is_named_and_counted(tmp_path, monkeypatch, name):
    for path in ("a.png", "b.png", "sub/c.png"):
        save(tmp_path / path, ord(path[-5]))
    forbid(monkeypatch, tmp_path / name)
    found = scan(tmp_path)
    assert len(found.files) == 2
    assert found.unreadable == [f"{tmp_path / name}: Permission denied"]
    assert f"1 cannot be opened: {tmp_path / name}: Permission denied" in found.notes()[0]


def test_a_file_that_vanishes_between_listing_and_reading_is_one_of_them(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.png", i) for i in range(3)]
    listing = list_images(tmp_path)
    monkeypatch.setattr(folder, "list_images", lambda root: listing)
    paths[1].unlink()
    found = scan(tmp_path)
    assert len(found.files) == 2
    assert found.unreadable == [f"{paths[1]}: No such file or directory"]


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / "photos/a.png")
    forbid(monkeypatch, tmp_path / "photos")
    with pytest.raises(UserError, match="photos: Permission denied; give a folder that you may read"):
        scan(tmp_path / "photos")


def test_a_failing_disk_is_asked_again_and_then_said(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "RETRIES", (0, 0))
    tries = []

    def fail(count, number):
        tries.append(1)
        if len(tries) <= count:
            raise OSError(number, os.strerror(number), "x.jpg")
        return "read"

    assert with_retries(tmp_path, lambda: fail(2, 5)) == "read"
    tries.clear()
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error, 3 attempts\); the disk .* fails"):
        with_retries(tmp_path, lambda: fail(3, 5))
    for number in (2, 13, 20, 21, 36, 40):  # of the file, not of the disk: no use to ask again
        tries.clear()
        with pytest.raises(UnreadableFileError):
            with_retries(tmp_path, lambda number=number: fail(9, number))
        assert len(tries) == 1


def test_a_removed_file_keeps_its_place(tmp_path):
    files = [ImageFile(f"{i}.png", f"{i:032x}") for i in range(4)]
    kept = with_known(files[:3], {files[3].digest, files[0].digest})
    assert [file.digest for file in kept] == [file.digest for file in files]
    assert fingerprint(kept) == fingerprint(files) != fingerprint(files[:3])


def test_names_that_are_no_text_are_names(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)
    (file,) = scan(tmp_path).files
    assert os.fsencode(file.path) == path
