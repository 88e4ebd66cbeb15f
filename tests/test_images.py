import io
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pyramid_ldm.data import images as module
from pyramid_ldm.data.folder import ImageFile, find_images, fingerprint, split_held_out
from pyramid_ldm.data.images import (
    UnreadableImage,
    load_image,
    resize_and_crop,
    to_pil,
    to_tensor,
    to_uint8,
)
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.errors import UserError


def noise_image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quadrants(height, width):
    """Red, green / blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    pixels[:top, :left], pixels[:top, left:] = (255, 0, 0), (0, 255, 0)
    pixels[top:, :left], pixels[top:, left:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


def pixel_values(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_hidden_files_are_not_photographs(tmp_path):
    """macOS leaves ._NAME.jpg beside every photograph it copies."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    assert [file.path for file in find_images(tmp_path)] == [str(tmp_path / "a.png")]


def test_find_images_looks_into_folders_and_sorts_by_path(tmp_path):
    for name in ("b/z.PNG", "a/deep/er/x.jpeg", "c.webp", "b/a.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    expected = ["a/deep/er/x.jpeg", "b/a.tif", "b/z.PNG", "c.webp"]
    assert [file.path for file in found] == [str(tmp_path / name) for name in expected]
    assert len({file.digest for file in found}) == 4


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="bare: holds no images"):
        find_images(tmp_path / "bare")


def test_exif_rotation_turns_size_and_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen upright, turn by 90 degrees clockwise
    quadrants(32, 64).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    image = load_image(str(tmp_path / "a.jpg"))
    assert image.size == (32, 64)
    pixels = pixel_values(image)
    corners = [pixels[8, 4], pixels[8, 28], pixels[56, 4], pixels[56, 28]]
    np.testing.assert_allclose(corners, [[0, 0, 255], [255, 0, 0], [255, 255, 255], [0, 255, 0]], atol=6)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixel_values(load_image(str(tmp_path / "a.png")))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_transparent_pixels_lie_over_white(tmp_path):
    Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)).save(tmp_path / "a.png")
    found = pixel_values(load_image(str(tmp_path / "a.png")))[0]
    # 51 / 255 is a fifth: 0.2 * 200 + 0.8 * 255 = 244, and 0.8 * 255 = 204
    np.testing.assert_allclose(found, [[200, 0, 0], [255, 255, 255], [244, 204, 204]], atol=1)


def test_a_palette_with_transparency_lies_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=1)
    assert pixel_values(load_image(str(tmp_path / "a.png")))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # cyan and yellow: green
    red, green, blue = pixel_values(load_image(str(tmp_path / "a.jpg")))[8, 8]
    assert red < 30
    assert blue < 30
    assert green > 225


def test_greyscale_has_three_equal_channels(tmp_path):
    Image.fromarray(np.array([[0, 77, 255]], np.uint8)).save(tmp_path / "a.png")
    assert pixel_values(load_image(str(tmp_path / "a.png")))[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]


def wide_profile():
    """The sRGB profile with the colorants of red and green exchanged, which no other reading gives by chance."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    entries = {bytes(data[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_icc_profile_is_converted_to_srgb(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path, icc_profile=wide_profile(), quality=100)
    np.testing.assert_allclose(pixel_values(load_image(str(path)))[8, 8], [0, 255, 0], atol=6)


def test_a_broken_profile_leaves_the_values_as_they_are(tmp_path):
    Image.new("RGB", (4, 4), (250, 100, 50)).save(tmp_path / "a.png", icc_profile=b"not a profile")
    assert pixel_values(load_image(str(tmp_path / "a.png")))[0, 0].tolist() == [250, 100, 50]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    whole = io.BytesIO()
    noise_image(64, 64).save(whole, format={"png": "PNG", "jpg": "JPEG"}[suffix])
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(UnreadableImage, match=f"half.{suffix}"):
        load_image(str(path))


def test_a_text_file_with_an_image_name_is_named(tmp_path):
    (tmp_path / "words.png").write_text("not an image")
    with pytest.raises(UnreadableImage, match=r"words\.png"):
        load_image(str(tmp_path / "words.png"))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise_image(10, 20).save(tmp_path / "bomb.png")
    monkeypatch.setattr(module, "MAX_PIXELS", 200)
    assert load_image(str(tmp_path / "bomb.png")).size == (20, 10)
    monkeypatch.setattr(module, "MAX_PIXELS", 199)
    with pytest.raises(UnreadableImage, match=r"bomb\.png: 20x10 pixels exceed 199"):
        load_image(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize("size", [(800, 1200), (1200, 800)])
def test_draft_mode_never_decodes_below_what_was_asked(tmp_path, size):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(render_landscape(3, *size)).save(path, quality=95)
    draft, full = load_image(path, (300, 300)), load_image(path)
    assert full.size == size[::-1]
    assert draft.size == (size[1] // 2, size[0] // 2), "an eighth and a quarter are too small, the whole is a waste"
    a, b = (pixel_values(resize_and_crop(image, (300, 300))) for image in (draft, full))
    assert np.abs(a - b).mean() < 1.5
    assert np.percentile(np.abs(a - b), 99.9) < 12
    for needed in (401, 799, 801, 5000):
        assert min(load_image(path, (needed, 10)).size) >= min(needed, 800)


def ramp(height, width):
    """Red counts columns, green counts rows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_a_wide_image_is_cut_at_its_sides():
    # 40x100 to cover 20x20: half the size is 20x50, of which columns 15..35 remain, 30..70 of the original
    found = pixel_values(resize_and_crop(ramp(40, 100), (20, 20)))
    assert found.shape == (20, 20, 3)
    np.testing.assert_allclose(found[10, 3:-3, 0], 30.5 + 2 * np.arange(20)[3:-3], atol=1)
    np.testing.assert_allclose(found[3:-3, 10, 1], 0.5 + 2 * np.arange(20)[3:-3], atol=1)


def test_a_target_that_is_not_square_is_covered_and_filled():
    # 60x60 to 20x40: the width decides, scale 2/3; rows 15..45 of the original remain
    found = pixel_values(resize_and_crop(ramp(60, 60), (20, 40)))
    assert found.shape == (20, 40, 3)
    np.testing.assert_allclose(found[3:-3, 20, 1], 15.25 + 1.5 * np.arange(20)[3:-3], atol=1)
    np.testing.assert_allclose(found[10, 3:-3, 0], 0.25 + 1.5 * np.arange(40)[3:-3], atol=1)


def test_a_small_image_is_enlarged_to_cover():
    # 10x20 to 40x40: four times larger; columns 5..15 remain
    found = pixel_values(resize_and_crop(ramp(10, 20), (40, 40)))
    assert found.shape == (40, 40, 3)
    np.testing.assert_allclose(found[20, 12:-12, 0], 4.625 + 0.25 * np.arange(40)[12:-12], atol=1)


def test_an_image_of_the_right_size_is_left_alone():
    image = noise_image(24, 40)
    np.testing.assert_array_equal(pixel_values(resize_and_crop(image, (24, 40))), pixel_values(image))


@pytest.mark.parametrize(("place", "first"), [(0.0, 0), (0.25, 6), (1.0, 24)])
def test_top_and_left_place_the_cut(place, first):
    tall, wide = noise_image(40, 16), noise_image(16, 40)
    np.testing.assert_array_equal(
        pixel_values(resize_and_crop(tall, (16, 16), top=place)), pixel_values(tall)[first : first + 16]
    )
    np.testing.assert_array_equal(
        pixel_values(resize_and_crop(wide, (16, 16), left=place)), pixel_values(wide)[:, first : first + 16]
    )


def test_zoom_shows_a_smaller_part_larger():
    # zoom 2 of a 40x40 image at its own size: 20x20 pixels from (0, 20) on, enlarged twice
    found = pixel_values(resize_and_crop(ramp(40, 40), (40, 40), zoom=2.0, top=0.0, left=1.0))
    np.testing.assert_allclose(found[20, 6:-6, 0], 19.75 + 0.5 * np.arange(40)[6:-6], atol=1)
    np.testing.assert_allclose(found[6:-6, 20, 1], -0.25 + 0.5 * np.arange(40)[6:-6], atol=1)


def test_all_256_levels_survive_the_way_to_a_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert float(tensor[0, 3, 3]) == pytest.approx(51 / 127.5 - 1)
    assert torch.equal(to_uint8(tensor).permute(1, 2, 0), torch.from_numpy(pixels))
    np.testing.assert_array_equal(np.asarray(to_pil(tensor)), pixels)


def test_to_uint8_rounds_to_nearest_and_clips_overshoot():
    levels = torch.tensor([-7.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1.3])
    assert to_uint8(levels).tolist() == [0, 0, 1, 255, 255]


def fake_files(count, seed=0):
    generator = random.Random(seed)
    return [ImageFile(f"{i}.png", f"{generator.getrandbits(128):032x}") for i in range(count)]


def test_held_out_share_is_near_the_fraction():
    files = fake_files(2000)
    train, held = split_held_out(files, 0.05)
    assert 70 <= len(held) <= 130  # 100, and three standard deviations of 9.7
    assert sorted(train + held, key=lambda f: f.digest) == sorted(files, key=lambda f: f.digest)
    ordered = sorted(files, key=lambda file: file.digest)
    assert split_held_out(files, 0.0) == (ordered, [])


def test_adding_files_moves_no_other_between_the_splits():
    few, more = fake_files(300), fake_files(300) + fake_files(1700, seed=1)
    held_before = {f.digest for f in split_held_out(few, 0.1)[1]}
    held_after = {f.digest for f in split_held_out(more, 0.1)[1]}
    assert held_before
    assert held_before == held_after & {f.digest for f in few}


def test_renaming_and_moving_keep_the_split_and_the_fingerprint(photographs, tmp_path):
    for i, path in enumerate(sorted(photographs.iterdir(), reverse=True)):
        target = tmp_path / str(i % 3) / f"renamed-{i}{path.suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    before, after = find_images(photographs), find_images(tmp_path)
    assert fingerprint(before) == fingerprint(after)
    for one, other in zip(split_held_out(before, 0.4), split_held_out(after, 0.4), strict=True):
        assert one
        assert {f.digest for f in one} == {f.digest for f in other}
    changed = next(tmp_path.rglob("*.jpg"))
    changed.write_bytes(changed.read_bytes() + b"x")
    assert fingerprint(before) != fingerprint(find_images(tmp_path))
    assert fingerprint(before) != fingerprint(before[1:])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_splits_hold_at_least_one(fraction, count):
    train, held = split_held_out(fake_files(count), fraction)
    assert train
    assert held
    assert len(train) + len(held) == count


def test_a_single_image_is_trained_on():
    files = fake_files(1)
    assert split_held_out(files, 0.05) == (files, [])
