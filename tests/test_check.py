"""`pyramid-ldm check`: every kind of file is counted for what it is."""

import csv
import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image, ImageCms

from pyramid_ldm import check
from pyramid_ldm.cli import main
from pyramid_ldm.data import digests
from pyramid_ldm.data.folder import find_images
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
        "deep.png": "more than eight bits",
        "xyz.png": "colour profile XYZ identity built-in",
    }
    table = capsys.readouterr().out
    assert table.splitlines()[0].split()[-2:] == ["images", "13"]
    assert "  2  (cut.jpg, cut2.jpg)" in table, "one line for both"
    assert "(raw.dng) look like images" in table
    with Image.open(tmp_path / "crops.jpg") as sheet:
        assert sheet.width >= 3 * 64


def test_what_was_read_is_not_read_again(folder, monkeypatch, tmp_path):
    for path in folder.rglob("*"):  # not a moment ago
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(digests, "SETTLED", -(10**18))
    assert main(["check", str(folder)]) == 0
    known = find_images(folder)
    monkeypatch.setattr(digests, "read_facts", None)
    for path in ("cut.jpg", "cut2.jpg", "text.jpg"):
        (folder / path).unlink()  # of these nothing is known
    assert {file.path for file in find_images(folder)} == {
        file.path for file in known if not file.path.endswith(("cut.jpg", "cut2.jpg", "text.jpg"))
    }


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
