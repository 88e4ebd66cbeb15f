"""Pixels of every kind, against values computed here: profiles before transparency and palettes, declared ranges,
metadata that never costs the pixels."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pyramid_ldm.data.images import UnreadableImage, image_size, load_image, resize_and_crop, without_metadata

COLOUR = (200, 100, 50)
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def matrix(*primaries):
    """RGB to XYZ (D50) of primaries (x, y) and white D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
    return adapt @ (columns * np.linalg.solve(columns, white))


SRGB = matrix((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = matrix((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))


def profile(space, tags):
    """A version 2 ICC profile by hand."""
    number = lambda value: struct.pack(">i", round(float(value) * 65536))  # noqa: E731
    body, table, at = b"", b"", 132 + 12 * (len(tags) + 2)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"t\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + b"".join(map(number, D50))
    for name, content in [(b"desc", text), (b"wtpt", white), *tags]:
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    head = b"test\x02\x10\0\0mntr" + space + b"XYZ " + struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += b"".join(map(number, D50)) + bytes(48)
    return struct.pack(">I", at + len(body)) + head + struct.pack(">I", len(tags) + 2) + table + body


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb_profile(to_xyz, gamma):
    number = lambda value: struct.pack(">i", round(float(value) * 65536))  # noqa: E731
    columns = [(name, b"XYZ \0\0\0\0" + b"".join(map(number, to_xyz[:, i]))) for i, name in
               enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))]  # fmt: skip
    return profile(b"RGB ", columns + [(name, curve(gamma)) for name in (b"rTRC", b"gTRC", b"bTRC")])


def grey_profile(gamma):
    return profile(b"GRAY", [(b"kTRC", curve(gamma))])


def encoded(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_p3(colour):
    return encoded(np.linalg.solve(SRGB, P3 @ (np.array(colour) / 255) ** 2.2))


def pixel(path):
    return np.asarray(load_image(str(path))).astype(float)[4, 4]


def save(image, path, **options):
    image.save(path, **options)
    return path


def flat(mode, value):
    return Image.new(mode, (16, 16), value)


def palette():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return image


P3_PROFILE, LINEAR = rgb_profile(P3, 2.2), grey_profile(1.0)
WANTED = {
    "rgb": (lambda: flat("RGB", COLOUR), "png", {"icc_profile": P3_PROFILE}, from_p3(COLOUR)),
    "rgb jpeg": (lambda: flat("RGB", COLOUR), "jpg", {"icc_profile": P3_PROFILE, "quality": 100, "subsampling": 0},
                 from_p3(COLOUR)),
    "rgba": (lambda: flat("RGBA", (*COLOUR, 255)), "png", {"icc_profile": P3_PROFILE}, from_p3(COLOUR)),
    "half clear": (lambda: flat("RGBA", (*COLOUR, 51)), "png", {"icc_profile": P3_PROFILE},
                   0.2 * from_p3(COLOUR) + 0.8 * 255),
    "palette": (palette, "png", {"icc_profile": P3_PROFILE}, from_p3(COLOUR)),
    "palette, clear": (palette, "png", {"icc_profile": P3_PROFILE, "transparency": 1}, [255] * 3),
    "palette, another clear": (palette, "png", {"icc_profile": P3_PROFILE, "transparency": 0}, from_p3(COLOUR)),
    "grey": (lambda: flat("L", 100), "png", {"icc_profile": LINEAR}, [encoded(100 / 255)] * 3),
    "grey and alpha": (lambda: flat("LA", (100, 255)), "png", {"icc_profile": LINEAR}, [encoded(100 / 255)] * 3),
    "grey, 16 bits": (lambda: Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)), "png",
                      {"icc_profile": LINEAR}, [encoded(100 / 255)] * 3),
    "grey with a profile of colours": (lambda: flat("L", 100), "png", {"icc_profile": P3_PROFILE}, [100] * 3),
    "one bit": (lambda: Image.new("1", (16, 16), 1), "png", {}, [255] * 3),
    "cmyk": (lambda: flat("CMYK", (0, 127, 191, 0)), "tif", {}, [255, 128, 64]),
    "lab": (lambda: flat("LAB", (138, 128, 128)), "tif", {}, [129] * 3),
    "ycbcr": (lambda: flat("YCbCr", (128, 128, 128)), "tif", {}, [128] * 3),
    "webp": (lambda: flat("RGBA", (*COLOUR, 0)), "webp", {"lossless": True, "exact": True}, [255] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_the_colour_is_right(tmp_path, name):
    make, suffix, options, wanted = WANTED[name]
    found = pixel(save(make(), tmp_path / f"a.{suffix}", **options))
    np.testing.assert_allclose(found, wanted, atol=4 if suffix in ("jpg", "webp") else 2)


def tiff(path, values, *, photometric=1, kind=1, more=(), big=False):
    """A one-strip grey TIFF by hand. `kind`: 1 unsigned, 2 signed, 3 floating point. `more`: (tag, type, value)."""
    order = ">" if big else "<"
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1), (262, 3, photometric),
            (273, 4, None), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind), *more]  # fmt: skip
    at = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, form, value in sorted(tags):
        code = {3: "H", 4: "I", 11: "f"}[form]
        entries += struct.pack(order + "HHI", tag, form, 1)
        entries += struct.pack(order + code, at if value is None else value).ljust(4, b"\0")
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(order + "I", 8)
    path.write_bytes(head + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + data)
    return path


def grey(value, dtype):
    return np.full((16, 16), value, dtype)


@pytest.mark.parametrize(
    ("values", "options", "wanted"),
    [
        (grey(64 * 257, np.uint16), {}, 64),
        (grey(64 * 257, np.uint16), {"big": True}, 64),
        (grey(64 * 257, np.uint16), {"photometric": 0}, 191),
        (grey(64, np.uint8), {"photometric": 0}, 191),
        (grey(0.5, np.float32), {"kind": 3}, 128),
        (grey(0.5, np.float32), {"kind": 3, "photometric": 0}, 128),
        (grey(0.25, np.float32), {"kind": 3, "photometric": 0}, 191),
        (grey(128.0, np.float32), {"kind": 3}, 128),
        (grey(128 * 257.0, np.float32), {"kind": 3}, 128),
        (grey(3.0, np.float32), {"kind": 3, "more": ((340, 11, 1.0), (341, 11, 5.0))}, 128),
        (grey(0.5, np.float32), {"kind": 3, "more": ((340, 11, 0.0), (341, 11, 2.0))}, 64),
        (grey(0.5, np.float32), {"kind": 3, "big": True}, 128),
        (grey(1000, np.uint32), {"more": ((340, 4, 0), (341, 4, 4000))}, 64),
    ],
)
def test_values_are_scaled_from_their_declared_range(tmp_path, values, options, wanted):
    np.testing.assert_allclose(pixel(tiff(tmp_path / "a.tif", values, **options)), [wanted] * 3, atol=1)


@pytest.mark.parametrize(
    ("values", "options", "fault"),
    [
        (grey(np.nan, np.float32), {"kind": 3}, "not finite"),
        (grey(-0.5, np.float32), {"kind": 3}, "whose range cannot be known"),
        (grey(1e6, np.float32), {"kind": 3}, "whose range cannot be known"),
        (grey(1000, np.uint32), {}, "the file does not say what white is"),
        (grey(0.5, np.float32), {"kind": 3, "more": ((340, 11, 0.5), (341, 11, 0.5))}, "values run from 0.5 to 0.5"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(tmp_path, values, options, fault):
    path = tiff(tmp_path / "a.tif", values, **options)
    with pytest.raises(UnreadableImage, match=rf"a\.tif: .*{fault}") as caught:
        load_image(str(path))
    assert caught.value.of_content


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*extra, after=()):
    """16x8 pixels of one colour with more chunks before, and after, the pixels."""
    rows = (b"\0" + bytes(COLOUR) * 16) * 8
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, 8, 2, 0, 0, 0)), *extra]
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), *after, chunk(b"IEND", b"")])


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


HUGE_PROFILE = P3_PROFILE[4:] + bytes(1_500_000)
HUGE_PROFILE = struct.pack(">I", len(HUGE_PROFILE) + 4) + HUGE_PROFILE
METADATA = {
    "1.5 MB of text": (png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 1_500_000))), COLOUR),
    "text after the pixels": (png(after=[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_500_000))]), COLOUR),
    "text that is none": (png(chunk(b"zTXt", b"\xff" * 40)), COLOUR),
    "a chunk with a wrong checksum": (png(chunk(b"tEXt", b"a\0b")[:-1] + b"\0"), COLOUR),
    "1.5 MB of profile": (png(chunk(b"iCCP", b"p\0\0" + zlib.compress(HUGE_PROFILE))), from_p3(COLOUR)),
    "a profile that is none": (png(chunk(b"iCCP", b"p\0\0" + zlib.compress(b"nothing"))), COLOUR),
    "a profile that cannot be unpacked": (png(chunk(b"iCCP", b"p\0\0nothing")), COLOUR),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_does_not_cost_the_pixels(tmp_path, name):
    content, wanted = METADATA[name]
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_allclose(pixel(tmp_path / "a.png"), wanted, atol=2)
    assert image_size(tmp_path / "a.png") in ((8, 16), None)


def test_orientation_is_found_wherever_a_png_has_it(tmp_path):
    part = chunk(b"eXIf", exif(6)[6:])
    for content in (png(part), png(after=[part])):
        (tmp_path / "a.png").write_bytes(content)
        assert load_image(str(tmp_path / "a.png")).size == (8, 16)
        assert image_size(tmp_path / "a.png") == (16, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_junk_in_exif_never_ends_anything(tmp_path, suffix):
    image, generator = flat("RGB", COLOUR), random.Random(0)
    good = exif(1)
    for _ in range(60):
        junk = bytearray(good + bytes(generator.randrange(40)))
        for _ in range(generator.randrange(1, 30)):
            junk[generator.randrange(6, len(junk))] = generator.randrange(256)
        path = tmp_path / f"a.{suffix}"
        if suffix == "tif":
            path = save(image, tmp_path / "a.tif")
            content = bytearray(path.read_bytes())
            content[4 + generator.randrange(4)] ^= 1 << generator.randrange(2)  # where the tags are
            path.write_bytes(content)
        else:
            save(image, path, exif=bytes(junk), **({"lossless": True} if suffix == "webp" else {"quality": 100}))
        image_size(path)
        try:
            np.testing.assert_allclose(pixel(path), COLOUR, atol=6)
        except UnreadableImage:
            assert suffix == "tif"


def test_junk_in_a_jpegs_segments_does_not_cost_the_pixels(tmp_path):
    buffer = io.BytesIO()
    flat("RGB", COLOUR).save(buffer, "JPEG", quality=100, subsampling=0, icc_profile=P3_PROFILE, comment=b"c")
    content = buffer.getvalue()
    segment = b"\xff\xe2" + struct.pack(">H", 30) + b"MPF\0" + b"\xff" * 24
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
    np.testing.assert_allclose(pixel(tmp_path / "a.jpg"), from_p3(COLOUR), atol=4)
    bare, _ = without_metadata(content)
    assert b"ICC_PROFILE" in bare
    assert b"\xff\xfe" not in bare[:200]


def test_no_format_is_read_that_is_not_meant_to_be(tmp_path):
    """Pillow would start Ghostscript for some."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UnreadableImage, match="begins like no image that is read here"):
        load_image(str(tmp_path / "a.png"))


def test_a_large_picture_is_read_although_pillows_limit_is_lower(tmp_path, monkeypatch):
    path = save(Image.new("L", (200, 100), 7), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert load_image(str(path)).size == (200, 100)


@pytest.mark.parametrize(
    ("size", "at"), [((64, 65), (0, 0)), ((65, 64), (0, 0)), ((70, 64), (3, 0)), ((64, 64), (0, 0))]
)
def test_a_crop_without_resizing_is_a_crop_of_the_file(size, at):
    """An odd pixel more: half a pixel's shift would blur all of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = np.asarray(resize_and_crop(Image.fromarray(pixels), (64, 64)))
    np.testing.assert_array_equal(found, pixels[at[0] : at[0] + 64, at[1] : at[1] + 64])


def test_pnginfo_of_ours_is_no_obstacle(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("pyramid_ldm", "{}")
    np.testing.assert_allclose(pixel(save(flat("RGB", COLOUR), tmp_path / "a.png", pnginfo=info)), COLOUR)
