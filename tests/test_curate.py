"""`pyramid-ldm curate`: the paper's two data sets, to the letter."""

import csv

import numpy as np
import pytest
from PIL import Image

from pyramid_ldm import curate
from pyramid_ldm.cli import main
from pyramid_ldm.curate import cut, refusal
from pyramid_ldm.data.folder import find_images


@pytest.mark.parametrize(
    ("rule", "width", "height", "strict", "inclusive"),
    [
        ("scapes2k", 2049, 1025, "", ""),
        ("scapes2k", 2048, 1024, "height 1024 is not above 1024", ""),
        ("scapes2k", 2049, 1024, "height 1024 is not above 1024", ""),
        ("scapes2k", 2048, 1025, "width 2048 is not above 2048", ""),
        ("scapes2k", 1025, 2049, "width 1025 is not above 2048", "width 1025 is not at least 2048"),
        ("scapes2k", 2100, 2100, "width 2100 is not above height 2100", "width 2100 is not above height 2100"),
        ("scapes2k", 2100, 2099, "", ""),
        ("people2k", 2049, 2049, "", ""),
        ("people2k", 2048, 2048, "height 2048 is not above 2048", ""),
        ("people2k", 3000, 2048, "height 2048 is not above 2048", ""),
        ("people2k", 2047, 3000, "width 2047 is not above 2048", "width 2047 is not at least 2048"),
    ],
)
def test_sizes_are_taken_or_left_out_as_the_paper_says(rule, width, height, strict, inclusive):
    assert refusal(rule, (height, width)) == strict
    assert refusal(rule, (height, width), inclusive=True) == inclusive


def rows_of(height, width):
    """An image whose values say the row, in two bytes."""
    rows = np.arange(height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (rows >> 8)[:, None], (rows & 255)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("height", "width", "first"), [(3200, 2400, 400), (3201, 2400, 400), (2400, 2400, 0)])
def test_a_portrait_is_cut_at_both_ends(monkeypatch, height, width, first):
    monkeypatch.setitem(curate.RULES, "people2k", (2400, 2400))  # as large as what is cut: no pixel is re-sampled
    found = np.asarray(cut("people2k", rows_of(height, width))).astype(int)
    rows = found[:, 0, 0] * 256 + found[:, 0, 1]
    assert rows.tolist() == list(range(first, first + 2400))


def test_a_landscape_covers_and_is_cut_in_the_centre():
    image = Image.new("RGB", (3000, 1200), (10, 20, 30))
    image.paste((200, 0, 0), (0, 0, 280, 1200))  # the scale is 1024/1200, so that 300 columns are cut at either side
    image.paste((0, 200, 0), (2720, 0, 3000, 1200))
    found = cut("scapes2k", image)
    assert found.size == (2048, 1024)
    assert np.ptp(np.asarray(found).reshape(-1, 3), axis=0).tolist() == [0, 0, 0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(curate.RULES, "scapes2k", (10, 20))
    folder = tmp_path / "photos"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(folder / "a.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    Image.new("RGB", (20, 40), "green").save(folder / "turned.jpg", exif=turned)
    Image.new("RGB", (40, 20), "blue").save(folder / "portrait.jpg", exif=turned)
    Image.new("RGB", (20, 10), "white").save(folder / "edge.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def test_each_file_is_accounted_for_and_the_command_goes_on(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "curated"
    monkeypatch.setattr(curate, "in_processes", lambda work, items: map(work, items))  # others do not see the rule
    words = ["curate", str(folder), "--rule", "scapes2k", "--out", str(out)]
    assert main(words) == 0
    assert "2 of 6 images" in capsys.readouterr().out
    rows = {row["file"].rpartition("/")[2]: row for row in csv.DictReader((out / "curated.csv").open())}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "a.png": "kept", "copy.png": "copy", "turned.jpg": "kept", "portrait.jpg": "left out", "edge.png": "left out",
        "broken.png": "unreadable",
    }  # fmt: skip
    assert (rows["turned.jpg"]["height"], rows["turned.jpg"]["width"]) == ("20", "40"), "after EXIF"
    assert rows["portrait.jpg"]["why"] == "width 20 is not above 20"
    assert rows["copy.png"]["why"] == str(folder / "a.png")
    made = sorted(out.glob("*.jpg"))
    assert {rows[name]["why"] for name in ("a.png", "turned.jpg")} == {path.name for path in made}
    for path in made:
        with Image.open(path) as image:
            assert image.size == (20, 10)
    assert len(find_images(out)) == 2, "training reads it as any folder"
    times = [path.stat().st_mtime_ns for path in made]
    made[0].unlink()
    assert main(words) == 0
    assert [path.stat().st_mtime_ns for path in made[1:]] == times[1:]
    assert made[0].is_file()
    (folder / "a.png").rename(folder / "another name.png")
    assert main(words) == 0
    assert len(list(out.glob("*.jpg"))) == 2, "each content once"
    (folder / "turned.jpg").unlink()
    capsys.readouterr()
    assert main(words) == 0
    assert "1 others in" in capsys.readouterr().out
    assert main([*words, "--inclusive"]) == 2
    assert "was made by scapes2k; give another --out" in capsys.readouterr().err
    assert main([*words[:-1], str(folder / "inside")]) == 2


def test_odd_names_and_real_sizes_in_real_processes(tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for colour, name in zip(("red", "green", "blue"), ("\u4e00" * 80, "caf\udce9", "two\nlines"), strict=True):
        Image.new("RGB", (2100, 1100), colour).save(folder / f"{name}.jpg")
    words = ["curate", str(folder), "--rule", "scapes2k", "--out", str(out)]
    assert main(words) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    assert [Image.open(path).size for path in out.glob("*.jpg")] == [(2048, 1024)] * 3
    assert main(["check", str(folder), "--report", str(tmp_path / "files.csv")]) == 0
    text = (tmp_path / "files.csv").read_bytes().decode("utf-8", "surrogateescape")
    assert "caf\udce9.jpg" in text


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    assert main(["curate", str(tmp_path / "none"), "--rule", "scapes2k", "--out", str(out)]) == 2
    assert not out.exists()


def test_nothing_taken_is_an_error_that_points_to_the_reasons(folder, tmp_path, capsys):
    assert main(["curate", str(folder), "--rule", "people2k", "--out", str(tmp_path / "out")]) == 2
    assert "people2k takes none of 6 images" in capsys.readouterr().err
    assert (tmp_path / "out" / "curated.csv").is_file()
