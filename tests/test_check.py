"""`pyramid-ldm check`: every kind of file is counted for what it is."""

import csv
import io
import random
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pyramid_ldm import check
from pyramid_ldm.cli import main
from pyramid_ldm.data import digests
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.data.images import conversions
from pyramid_ldm.demo.scenes import render_landscape

LANDSCAPES = [Image.fromarray(render_landscape(i, 64, 96)) for i in range(8)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "nested").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    LANDSCAPES[0].save(folder / "a.jpg", quality=95)
    LANDSCAPES[0].save(folder / "a-again.jpg", quality=40)
    shutil.copy(folder / "a.jpg", folder / "nested" / "copy.jpg")
    LANDSCAPES[1].save(folder / "turned.jpg", exif=exif)
    LANDSCAPES[2].convert("CMYK").save(folder / "cmyk.jpg")
    LANDSCAPES[3].quantize(32).save(folder / "palette.png", transparency=0)
    LANDSCAPES[4].convert("L").save(folder / "grey.png")
    grey = np.asarray(LANDSCAPES[5].convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    LANDSCAPES[6].save(folder / "xyz.png", icc_profile=profile)
    LANDSCAPES[7].resize((48, 32)).save(folder / "small.png")
    whole = (folder / "turned.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cut2.jpg").write_bytes(whole[: len(whole) * 3 // 5])
    (folder / "text.jpg").write_text("no image")
    (folder / "raw.dng").write_bytes(b"raw")
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_file_has_a_line_that_says_what_it_is(folder, tmp_path, capsys):
    words = ["check", str(folder), "--config", "autoencoder_configs/demo.yaml"]
    assert main([*words, "--report", str(tmp_path / "files.csv"), "--sheet", str(tmp_path / "crops.jpg")]) == 0
    rows = {row["file"].removeprefix(f"{folder}/"): row for row in csv.DictReader((tmp_path / "files.csv").open())}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert {name for name, verdict in verdicts.items() if verdict == "unreadable"} == {
        "cut.jpg", "cut2.jpg", "text.jpg"
    }  # fmt: skip
    assert verdicts["small.png"] == "too small"
    assert verdicts["nested/copy.jpg"] == "copy"
    assert rows["nested/copy.jpg"]["like"] == str(folder / "a.jpg")
    assert rows["a.jpg"]["like"] == str(folder / "a-again.jpg"), "the first by name is the original"
    assert [(rows[name]["height"], rows[name]["width"]) for name in ("a.jpg", "turned.jpg")] == [
        ("64", "96"), ("96", "64")
    ]  # fmt: skip
    assert {name: row["converted"] for name, row in rows.items() if row["converted"]} == {
        "turned.jpg": "turned upright (EXIF)",
        "cmyk.jpg": "CMYK",
        "palette.png": "transparency over white; palette",
        "grey.png": "grey",
        "deep.png": "more than eight bits; grey",
        "xyz.png": "colour profile XYZ identity built-in",
    }
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[-2:] == ["images", "13"]
    assert "  2  (cut.jpg, cut2.jpg)" in table, "one line for both"
    assert "(raw.dng) look like images" in table
    with Image.open(tmp_path / "crops.jpg") as sheet:
        assert sheet.width >= 3 * 64


def test_what_was_read_is_not_read_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(digests, "SETTLED", -(10**18))  # however lately they were written
    words = ["check", str(folder), "--report", str(folder.parent / "files.csv")]
    assert main(words) == 0
    before, report = capsys.readouterr().out, (folder.parent / "files.csv").read_text()
    monkeypatch.setattr(check, "look", None)
    monkeypatch.setattr(digests, "read_facts", None)
    assert main(words) == 0
    assert capsys.readouterr().out == before
    assert (folder.parent / "files.csv").read_text() == report
    for path in ("cut.jpg", "cut2.jpg", "text.jpg"):
        (folder / path).unlink()  # of these training knows nothing
    assert len(find_images(folder)) == 9


def test_an_interrupted_check_goes_on(folder, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", -(10**18))
    looked = []

    def few(work, items):
        for item in items[:5]:
            looked.append(item)
            yield work(item)
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "in_processes", few)
    assert main(["check", str(folder)]) == 130
    monkeypatch.setattr(check, "in_processes", lambda work, items: (looked.append(i) or work(i) for i in items))
    assert main(["check", str(folder)]) == 0
    assert len(looked) == len(set(looked)) == 13


def test_nothing_of_the_users_is_overwritten(folder, tmp_path, capsys):
    words = ["check", str(folder), "--config", "autoencoder_configs/demo.yaml"]
    mine = tmp_path / "mine.jpg"
    LANDSCAPES[0].save(mine)
    content = mine.read_bytes()
    assert main([*words, "--sheet", str(mine)]) == 2
    assert "pyramid-ldm did not write it" in capsys.readouterr().err
    assert mine.read_bytes() == content
    assert main([*words, "--sheet", str(folder / "sheet.jpg")]) == 2
    assert main([*words, "--sheet", str(tmp_path / "x"), "--report", str(tmp_path / "x")]) == 2
    (tmp_path / "curated.csv").write_text("file,verdict,height,width,why\n")
    assert main([*words, "--report", str(tmp_path / "curated.csv")]) == 2
    for _ in range(2):
        assert main([*words, "--sheet", str(tmp_path / "sheet.jpg")]) == 0


def test_sixteen_bits_of_colour_and_an_orientation_of_zero(tmp_path):
    image = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 0
    LANDSCAPES[0].save(image, "JPEG", exif=exif)
    assert conversions(image.getvalue()) == []
    rows = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(">u2")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert conversions(png) == ["more than eight bits"]


def test_nothing_usable_is_an_error_after_the_table(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    LANDSCAPES[0].save(folder / "small.png")
    words = ["check", str(folder), "--config", "autoencoder_configs/photographs_256.yaml"]
    assert main([*words, "--report", str(tmp_path / "files.csv")]) == 2
    out, error = capsys.readouterr()
    assert "too small for 256x256" in out
    assert error.splitlines()[-1] == f"pyramid-ldm: {folder}: none of its images can be used"
    assert "too small" in (tmp_path / "files.csv").read_text()
    assert main(["check", str(folder), "--sheet", str(tmp_path / "crops.jpg")]) == 2
    assert "give --config" in capsys.readouterr().err
    (tmp_path / "mine.csv").write_text("a,b\n")
    assert main(["check", str(folder), "--report", str(tmp_path / "mine.csv")]) == 2
    assert "pyramid-ldm did not write it" in capsys.readouterr().err


def test_near_hashes_are_those_that_comparing_all_pairs_finds():
    drawn = random.Random(0)
    hashes = [drawn.getrandbits(64) for _ in range(300)]
    for value in hashes[:100]:
        changed = value
        for bit in drawn.sample(range(64), drawn.choice([0, 1, 3, 4, 5, 9])):
            changed ^= 1 << bit
        hashes.append(changed)
    expected = {}
    originals = []
    for i, value in enumerate(hashes):
        alike = [j for j in originals if (hashes[j] ^ value).bit_count() <= check.ALIKE]
        if alike:
            expected[i] = alike[0]
        else:
            originals.append(i)
    assert check.near(hashes) == expected
    assert 50 < len(expected) < 100
