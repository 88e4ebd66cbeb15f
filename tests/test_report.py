"""The HTML report, read back as a browser would."""

import base64
import json
import math
from html.parser import HTMLParser

import pytest
from PIL import Image

from pyramid_ldm.demo.report import (
    COLOURS,
    PLOT_BOTTOM,
    PLOT_LEFT,
    PLOT_RIGHT,
    PLOT_TOP,
    Chart,
    Curve,
    Section,
    images_label,
    nice_ticks,
    read_curve,
    value_label,
    write_report,
)

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements with attributes, and text by element; a tag that does not close its own is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def polylines(self) -> list[list[tuple[float, float]]]:
        return [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in self.all("polyline")]


@pytest.fixture
def report(tmp_path):
    """Writes a report of the given parts, the rest short, and returns it parsed."""

    def write(title="Demo", lead="What happened.", sections=(), charts=(), next_steps=()) -> Page:
        path = tmp_path / "report.html"
        write_report(path, title=title, lead=lead, sections=sections, charts=charts, next_steps=next_steps)
        assert [p for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
        return Page(path.read_text(encoding="utf-8"))

    return write


def chart(*curves, log_scale=False):
    return Chart("Loss", [Curve(f"curve {i}", points) for i, points in enumerate(curves)], log_scale)


@pytest.fixture
def full(report, tmp_path):
    """A report with some of everything."""
    pictures = []
    for i in range(2):
        pictures.append(tmp_path / f"{i}.png")
        Image.effect_noise((24, 16 + i), 50).save(pictures[-1])
    return pictures, report(
        sections=[
            Section("Samples", "One.\n\nTwo.", pictures[0], {"PSNR": "23.4 dB", "SSIM": "0.71"}),
            Section("Words", "No picture."),
            Section("Reconstructions", "", pictures[1]),
        ],
        charts=[chart([(160, 0.3), (320, 0.2)], [(160, 0.31)]), chart([(1, 2.0), (2, 3.0)], log_scale=True)],
        next_steps=[("Draws more.", "pyramid-ldm sample runs/flow --num 4"), ("Checks.", "pyramid-ldm check photos")],
    )


def test_shows_what_it_is_given(full):
    _, page = full
    assert page.text["h1"] == page.text["title"] == ["Demo"]
    assert page.text["h2"] == ["Samples", "Words", "Reconstructions", "Training curves", "What to do next"]
    assert page.text["p"] == ["What happened.", "One.", "Two.", "No picture.", "Draws more.", "Checks."]
    assert list(zip(page.text["th"], page.text["td"], strict=True)) == [("PSNR", "23.4 dB"), ("SSIM", "0.71")]
    assert page.text["code"] == ["pyramid-ldm sample runs/flow --num 4", "pyramid-ldm check photos"]
    assert page.text["li"] == ["curve 0", "curve 1", "curve 0"]
    assert page.text["span"] == ["(log scale)"]
    assert len(page.all("svg")) == 2


def test_pictures_are_embedded_whole(full):
    pictures, page = full
    images = page.all("img")
    assert [image["alt"] for image in images] == ["Samples", "Reconstructions"]
    for path, image in zip(pictures, images, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == path.read_bytes()


def test_nothing_is_fetched_or_run(full, tmp_path):
    _, page = full
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    html = (tmp_path / "report.html").read_text()
    assert not any(word in html for word in ("http://", "https://", "@import", "url("))


def test_everything_is_escaped(report, tmp_path):
    nasty = "<b>\"a\" & 'b'</b> {x} --> é"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (2, 2)).save(picture)
    page = report(
        nasty,
        nasty,
        [Section(nasty, nasty, picture, {nasty: nasty})],
        [Chart(nasty, [Curve(nasty, [(0, 0), (1, 1)])])],
        [(nasty, nasty)],
    )
    assert page.all("b") == []
    for tag in ("title", "h1", "th", "td", "figcaption", "li", "code"):
        assert page.text[tag] == [nasty]
    assert page.text["h2"][0] == nasty
    assert page.text["p"] == [nasty] * 3
    assert page.all("img")[0]["alt"] == nasty


def test_without_charts_and_steps_there_are_no_headings_for_them(report):
    page = report(charts=[chart([]), chart([(5, math.nan)]), chart([(5, 0.0), (6, -1.0)], log_scale=True)])
    assert "h2" not in page.text
    assert page.all("svg") == page.all("figure") == []


def test_curve_fills_the_plot(report):
    [line] = report(charts=[chart([(1000, 0.0), (1500, 5.0), (2500, 2.5), (3000, 10.0)])]).polylines()
    # 0 to 10 is an axis with ticks at both ends.
    height, width = PLOT_BOTTOM - PLOT_TOP, PLOT_RIGHT - PLOT_LEFT
    assert line == [
        (PLOT_LEFT, PLOT_BOTTOM),
        (PLOT_LEFT + width / 4, PLOT_BOTTOM - height / 2),
        (PLOT_LEFT + width * 3 / 4, PLOT_BOTTOM - height / 4),
        (PLOT_RIGHT, PLOT_TOP),
    ]


def test_curves_of_a_chart_share_its_axes(report):
    long, short = report(charts=[chart([(0, 0), (400, 4)], [(100, 2), (300, 4)])]).polylines()
    assert short[0][0] == (3 * long[0][0] + long[1][0]) / 4
    assert short[1][1] == long[1][1]
    assert short[0][1] == (long[0][1] + long[1][1]) / 2


@pytest.mark.parametrize("values", [[1, 10, 100], [0.02, 0.03, 0.045], [1e-9, 1e-3, 1e3]])
def test_log_scale_makes_equal_factors_equal_steps(report, values):
    page = report(charts=[chart(list(enumerate(values)), log_scale=True)])
    [line] = page.polylines()
    assert all(PLOT_TOP <= y <= PLOT_BOTTOM for _, y in line)
    low, middle, high = (y for _, y in line)
    assert low > middle > high  # y points down
    assert low - middle == pytest.approx(middle - high, abs=0.03)
    labels = [float(text) for text in page.text["text"] if text != "images seen"]
    assert len([value for value in labels if min(values) * 0.99 <= value <= max(values) * 1.01]) >= 2


def test_log_scale_leaves_out_what_has_no_logarithm(report):
    [line] = report(charts=[chart([(0, 0.0), (1, 1.0), (2, -1.0), (3, 2.0)], log_scale=True)]).polylines()
    assert len(line) == 2


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(
    "points",
    [
        [(160, 0.3)],
        [(0, 1e-4)],
        [(0, 5.0), (10, 5.0), (20, 5.0)],
        [(7, 1.0), (7, 2.0)],
        [(0, math.nan), (1, 1.0), (2, math.inf), (3, -math.inf), (math.nan, 1.0), (4, 2.0), (5, 1e308)],
        [(0, 1.0), (1, 1.0 + 1e-15)],
        [(0, 5e-324), (5e-324, 1.0)],
        [(0, 9e99), (9e99, 1e-99)],
    ],
)
def test_odd_curves_stay_inside_the_plot(report, points, log_scale):
    page = report(charts=[chart(points, [], log_scale=log_scale)])
    assert page.text["li"] == ["curve 0"]
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in page.all("circle")]
    drawn = dots + [point for line in page.polylines() for point in line]
    assert drawn
    assert all(PLOT_LEFT <= x <= PLOT_RIGHT and PLOT_TOP <= y <= PLOT_BOTTOM for x, y in drawn)
    assert len(page.text["text"]) < 25


def test_constant_zero_is_in_the_middle(report):
    [line] = report(charts=[chart([(0, 0.0), (1, 0.0)])]).polylines()
    assert [y for _, y in line] == [(PLOT_TOP + PLOT_BOTTOM) / 2] * 2


def test_many_curves_look_different(report):
    page = report(charts=[chart(*[[(0, i), (1, i + 1)] for i in range(2 * COLOURS)])])
    looks = [line["class"] for line in page.all("polyline")]
    assert len(set(looks)) == 2 * COLOURS
    assert [mark["class"] for mark in page.all("i")] == looks


def test_no_curve_is_lost(report):
    assert len(report(charts=[chart(*[[(0, 1), (1, i)] for i in range(4 * COLOURS)])]).polylines()) == 4 * COLOURS


@pytest.mark.parametrize(("low", "high"), [(0, 10), (0.03, 5.5), (-3, 4), (1280, 76800), (0.1, 0.3), (21.3, 21.9)])
def test_ticks_are_few_round_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low < high <= ticks[-1]
    assert 4 <= len(ticks) <= 9
    step = ticks[1] - ticks[0]
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


def test_labels():
    assert [images_label(n) for n in (0, 160, 1000, 2500, 99950, 1e6, 12.8e6)] == [
        "0", "160", "1k", "2.5k", "99.95k", "1M", "12.8M",
    ]  # fmt: skip
    assert [value_label(v) for v in (0, 3 * 0.1, -2.0, 5e-5, 1.05e-4, 2e6)] == [
        "0", "0.3", "-2", "5e-5", "1.05e-4", "2e6",
    ]  # fmt: skip


def test_read_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"images_seen": 160, "loss": 0.5, "nonfinite": 0},
        {"images_seen": 160, "held_out": 0.6},
        {"images_seen": 320, "loss": None},
        {"images_seen": 480, "loss": 0.25, "held_out": 0.3},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"images_seen": 640, "lo')
    assert read_curve(path, "loss") == [(160.0, 0.5), (480.0, 0.25)]
    assert read_curve(path, "held_out") == [(160.0, 0.6), (480.0, 0.3)]
    assert read_curve(path, "nonfinite") == [(160.0, 0.0)]
    assert read_curve(path, "absent") == []
