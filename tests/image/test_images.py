"""Decoding and geometry."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignkit.columns import BadRow
from alignkit.draws import generator
from alignkit_diffusion.images import Augmentation, Placement, digest, open_image
from tests.image.conftest import picture


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source: Any, folder: Path | None = None) -> np.ndarray:
    image = open_image(source, folder)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    image = picture(0)
    data = encoded(image, "PNG")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").write_bytes(data)
    sources = [image, data, {"bytes": data, "path": "x.png"}, {"bytes": None, "path": "sub/a.png"}]
    sources += ["sub/a.png", tmp_path / "sub/a.png", bytearray(data), Path("sub/a.png")]
    digests = {digest(open_image(source, tmp_path)) for source in sources}
    assert digests == {digest(image)}
    assert digest(picture(1)) not in digests
    turned = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    assert digest(turned) not in digests


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (16, 8))
    upright.paste((255, 0, 0), (0, 0, 8, 4))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(found, np.asarray(upright))


def test_grey_palette_and_one_bit() -> None:
    grey = picture(0).convert("L")
    assert np.array_equal(pixels(encoded(grey, "PNG")), np.asarray(grey.convert("RGB")))
    palette = picture(0).convert("P")
    assert np.array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert set(np.unique(pixels(encoded(grey.convert("1"), "PNG")))) <= {0, 255}


def test_transparency_is_composited_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = pixels(encoded(image, "PNG"))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 1].tolist() == pytest.approx([127] * 3, abs=1)
    assert (found[1:] == 255).all()
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (pixels(encoded(grey, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10, 20, 30] * 4)
    assert (pixels(encoded(palette, "PNG", transparency=3)) == 255).all()
    assert pixels(encoded(palette, "PNG", transparency=2))[0, 0].tolist() == [10, 20, 30]


def test_cmyk_and_sixteen_bits() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(encoded(cmyk, "JPEG", quality=95))[4, 4]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(found[..., 0] - ramp / 257).max() <= 0.5


def test_broken_images_say_why(tmp_path: Path) -> None:
    jpeg = encoded(picture(0, 64, 64), "JPEG")
    (tmp_path / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    frames = [picture(i) for i in range(3)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    cases = [
        ("half.jpg", "unreadable image", "half.jpg"),
        (jpeg[:-40], "unreadable image", "truncated"),
        (encoded(picture(0), "PNG")[:80], "unreadable image", "decoded"),
        ("empty.png", "unreadable image", "empty.png"),
        (b"not an image", "unreadable image", "12 bytes"),
        ("gone.png", "missing file", "gone.png"),
        (gif, "animated image", "3"),
        (None, "no image", "nothing"),
        ("", "no image", "nothing"),
        (7, "no image", "int"),
        ({"bytes": None, "path": None}, "no image", "nothing"),
        (Image.new("RGB", (1, 100)), "extreme aspect ratio", "1 x 100"),
        (Image.new("F", (8, 8)), "unreadable image", "floating-point"),
    ]
    for source, reason, text in cases:
        with pytest.raises(BadRow, match=text) as caught:
            open_image(source, tmp_path)
        assert caught.value.reason == reason
    single = encoded(frames[0], "GIF")
    assert open_image(single, None).size == frames[0].size


def test_an_over_large_image_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(0, 64, 64), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(BadRow, match=r"4096 pixels.*MAX_IMAGE_PIXELS") as caught:
        open_image(data, None)
    assert caught.value.reason == "over-large image"


def test_a_users_image_is_not_changed() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    open_image(image, None)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255, 0, 0, 0)


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [(40, 20, (64, 32), (16, 0)), (20, 50, (32, 80), (0, 24)), (32, 32, (32, 32), (0, 0))],
)
def test_short_side_then_centre_crop(
    height: int, width: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    placement = Placement.of(height, width, (32, 32), Augmentation())
    assert placement.resized == resized
    assert placement.corner == corner
    assert placement.time_ids() == (height, width, *corner, 32, 32)
    image = picture(3, width, height)
    by_hand = image.resize(resized[::-1], Image.Resampling.LANCZOS)
    by_hand = by_hand.crop((corner[1], corner[0], corner[1] + 32, corner[0] + 32))
    found = placement.pixels(image)
    assert found.shape == (3, 32, 32)
    expected = np.asarray(by_hand).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("height", [1, 31, 32, 33, 97, 333, 1023])
@pytest.mark.parametrize("width", [31, 32, 64, 100])
def test_every_size_gives_the_square(height: int, width: int) -> None:
    for share in (0.0, 0.5, 0.999):
        placement = Placement.of(height, width, (32, 32), Augmentation(share, share))
        assert min(placement.resized) == 32
        top, left = placement.corner
        assert 0 <= top <= placement.resized[0] - 32 and 0 <= left <= placement.resized[1] - 32


def test_flip_mirrors_before_the_crop() -> None:
    image = picture(5, 48, 32)
    plain = Placement.of(32, 48, (32, 32), Augmentation(0.5, 0.0))
    flipped = Placement.of(32, 48, (32, 32), Augmentation(0.5, 0.0, flip=True))
    # The crop is at the left of the mirrored image, which is the right of the original.
    right = Placement.of(32, 48, (32, 32), Augmentation(0.5, 1.0))
    assert flipped.time_ids() == plain.time_ids()
    found = flipped.pixels(image)
    assert np.allclose(found.flip(2).numpy(), right.pixels(image).numpy(), atol=1e-6)


def test_augmentation_is_a_function_of_its_key() -> None:
    def drawn(row: int) -> Augmentation:
        return Augmentation.drawn(generator("crop", 0, 1, row), generator("flip", 0, 1, row))

    assert drawn(3) == drawn(3)
    assert len({drawn(row).top for row in range(50)}) == 50
    assert 10 < sum(drawn(row).flip for row in range(50)) < 40
    assert Augmentation.drawn(None, None) == Augmentation(0.5, 0.5, False)
