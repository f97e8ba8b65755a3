"""Every kind of picture file is read right, or refused with a reason."""

import hashlib
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dalle_cli.data import images
from dalle_cli.data.filters import Filters
from dalle_cli.data.skips import BadSample
from dalle_cli.errors import DalleError

RAMP = np.arange(64 * 48 * 3, dtype=np.int64).reshape(48, 64, 3) * 7 % 256


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp():
    return Image.fromarray(RAMP.astype(np.uint8))


def decode(data, **filters):
    image = images.decode(data, Filters(**filters))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_pixels_back(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(ramp(), kind, **options)), RAMP)


def test_jpeg_and_its_cmyk_form():
    smooth = Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8))
    for mode in ("RGB", "CMYK"):
        pixels = decode(encoded(smooth.convert(mode), "JPEG", quality=95))
        assert np.abs(pixels - [200, 100, 50]).max() <= 4


def test_16_bit_gray_is_scaled_not_clipped():
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_gray_with_a_transparent_value():
    deep = np.array([[0, 512, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(deep), transparency=512))[0, :, 1].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_without_alpha(mode):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    assert decode(encoded(image))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_alpha_is_composited_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    assert decode(encoded(Image.fromarray(rgba)))[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 204]]
    la = np.array([[[0, 255], [0, 0], [0, 51]]], np.uint8)
    assert decode(encoded(Image.fromarray(la)))[0, :, 0].tolist() == [0, 255, 204]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_transparency(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(image, transparency=transparency))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(decode(encoded(ramp(), kind, exif=exif, **options)), np.rot90(RAMP, -1))
    assert decode(encoded(ramp(), "JPEG", exif=exif)).shape == (64, 48, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture():
    assert decode(encoded(ramp(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == RAMP.shape


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "JPEG"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7])
def test_truncated_at_any_point(kind, share):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(BadSample, match=r"^unreadable: "):
        images.decode(data[: int(len(data) * share)], Filters())


@pytest.mark.parametrize(
    "data", [b"", b"a text file named .png", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n" + b"x" * 99]
)
def test_not_a_picture(data):
    with pytest.raises(BadSample, match=r"^unreadable: "):
        images.decode(data, Filters())


def test_float_pictures_cannot_come_in_and_damage_is_refused():
    data = bytearray(encoded(ramp()))
    data[60] ^= 255
    with pytest.raises(BadSample):
        images.decode(bytes(data), Filters())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG"])
def test_oversized_is_seen_in_the_header_without_a_warning(kind, monkeypatch):
    data = encoded(Image.new("1" if kind != "JPEG" else "L", (20_000, 20_000)), kind)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match=r"^oversized: 20000x20000$"):
            images.decode(data, Filters())


def test_limits_are_settings():
    data = encoded(ramp())
    with pytest.raises(BadSample, match="oversized: 64x48"):
        images.decode(data, Filters(max_pixels=64 * 48 - 1))
    assert decode(data, max_pixels=64 * 48, max_aspect=1.34).shape == RAMP.shape
    with pytest.raises(BadSample, match="aspect ratio: 64x48"):
        images.decode(data, Filters(max_aspect=1.33))
    assert decode(encoded(Image.new("L", (10, 1000)))).shape == (1000, 10, 3)


def test_read_image_from_a_path_a_url_or_bytes(tmp_path):
    data = encoded(ramp())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (path, str(path), path.as_uri(), data):
        image, digest = images.read_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), RAMP)
        assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone.png", "expected an image, found No such file or directory: gone.png; check --image"),
        (".", "expected an image, found Is a directory: .; check --image"),
        ("nul\0.png", "expected an image, found embedded null byte: "),
        ("text.png", "expected an image, found text.png unreadable: neither PNG"),
        (b"GIF89a", "expected an image, found bytes unreadable: neither PNG"),
        (encoded(ramp())[:99], "expected an image, found bytes unreadable: "),
        ("no-such-scheme://x/a.png", "expected a URL that fsspec can open, found no-such-scheme://x/a.png"),
    ],
)
def test_read_image_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("a text")
    with pytest.raises(DalleError) as error:
        images.read_image(source, "--image")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
