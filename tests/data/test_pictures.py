"""Pictures as people see them: upright, in the range of their values, at the cost of their crop."""

from __future__ import annotations

import io
import resource
import struct
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from certipatch.data import Images, Source, open_image
from certipatch.data.decode import UNREADABLE, decode, open_bytes, why_unreadable
from certipatch.data.source import evaluation_transform
from certipatch.models import describe

# Where the rows and columns of a stored picture go: what EXIF says of each orientation (TIFF 6.0, tag 274),
# on arrays, with no code of Pillow.
STORED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: seen.transpose(1, 0, 2)[::-1],
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: seen.transpose(1, 0, 2)[:, ::-1],
}
SEEN = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)  # higher than wide it is not


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: object) -> Image.Exif:
    notes = Image.Exif()
    notes[0x0112] = orientation
    return notes


class TestUpright:
    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            *(
                ("PNG", {}),
                ("WEBP", {"lossless": True}),
                ("TIFF", {}),
                ("JPEG", {"quality": 100, "subsampling": 0}),
            ),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    def test_all_eight_orientations(self, kind: str, options: dict[str, object], orientation: int):
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](SEEN)))
        if kind == "JPEG":  # compression loses something, the same in blocks of whatever order
            stored = stored.resize((stored.width * 8, stored.height * 8), Image.Resampling.NEAREST)
        found = decode(open_bytes(saved(stored, kind, exif=exif(orientation), **options)))
        if kind == "JPEG":
            small = np.asarray(found)[4::8, 4::8].astype(int)
            assert small.shape == SEEN.shape
            assert np.abs(small - SEEN).max() < 16
        else:
            assert np.array_equal(found, SEEN)

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
    def test_in_every_mode(self, mode: str):
        grey = Image.fromarray(SEEN[..., 0])
        image = (
            Image.fromarray(SEEN[..., 0].astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
        )
        plain, turned = (decode(open_bytes(saved(image, "PNG", exif=exif(o)))) for o in (1, 6))
        assert np.array_equal(np.asarray(plain), STORED[6](np.asarray(turned)))

    @pytest.mark.parametrize("orientation", [0, 9, 255])
    def test_an_orientation_that_is_none(self, orientation: int):
        found = decode(open_bytes(saved(Image.fromarray(SEEN), "PNG", exif=exif(orientation))))
        assert np.array_equal(found, SEEN)

    def test_what_browsers_do_not_look_at(self):
        """Damaged EXIF, and an orientation in XMP only."""
        damaged = b"Exif\0\0" + exif(6).tobytes()[6:20]
        for notes in (b"Exif\0\0", b"Exif\0\0junk", damaged, b"Exif\0\0II*\0\xff\xff\xff\xff"):
            found = decode(open_bytes(saved(Image.fromarray(SEEN), "WEBP", lossless=True, exif=notes)))
            assert np.array_equal(found, SEEN)
        xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        found = decode(open_bytes(saved(Image.fromarray(SEEN), "WEBP", lossless=True, xmp=xmp)))
        assert np.array_equal(found, SEEN)

    def test_eight_orientations_are_one_input_of_the_model(self):
        spec = describe("resnet18", classes=("a", "b"), num_classes=2, image_size=(16, 32))
        files = [
            saved(Image.fromarray(np.ascontiguousarray(STORED[o](SEEN))), "PNG", exif=exif(o)) for o in STORED
        ]
        items = Images(Source(("a", "b"), list("12345678"), [0] * 8, lambda i: open_bytes(files[i])), spec)
        assert len({items[i].readable().numpy().tobytes() for i in range(8)}) == 1


class TestRange:
    """More than 8 bits are scaled where their range is known, else refused, and never clipped or darkened."""

    def seen(self, image: Image.Image, kind: str) -> np.ndarray | str:
        try:
            return np.asarray(decode(open_bytes(saved(image, kind))))[..., 0]
        except UNREADABLE as problem:
            return why_unreadable(problem)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_that_are_filled(self, kind: str):
        assert np.array_equal(
            self.seen(Image.fromarray(SEEN[..., 0].astype(np.uint16) * 257), kind), SEEN[..., 0]
        )

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    @pytest.mark.parametrize("bits", [8, 10, 12, 14])
    def test_fewer_bits_in_16(self, kind: str, bits: int):
        wide = Image.fromarray((SEEN[..., 0].astype(np.uint16) << 8) >> (16 - bits))
        assert "range is not known" in self.seen(wide, kind)
        assert not np.any(self.seen(Image.fromarray(np.zeros((4, 4), np.uint16)), kind))  # black is black

    @pytest.mark.parametrize("bits", [12, 16])
    def test_colours_of_16_bits(self, bits: int):
        """Pillow keeps the upper 8 bits of these when it reads them."""
        wide = (SEEN.astype(">u2") << 8) >> (16 - bits)
        found = png_of_16_bits(wide)
        if bits == 16:
            assert np.array_equal(decode(open_bytes(found)), SEEN)
        else:
            with pytest.raises(ValueError, match="range is not known"):
                decode(open_bytes(found))

    @pytest.mark.parametrize("factor", [1, 257, 2**22])
    def test_32_bit_integers(self, factor: int):
        assert "no stated range" in self.seen(Image.fromarray(SEEN[..., 0].astype(np.int32) * factor), "TIFF")

    @pytest.mark.parametrize("factor", [1, 1 / 255])
    def test_floats(self, factor: float):
        assert "no stated range" in self.seen(
            Image.fromarray(SEEN[..., 0].astype(np.float32) * factor), "TIFF"
        )

    def test_a_stated_range(self):
        """A PGM says what its largest value is."""
        values = np.arange(16) * 273  # 12 bits, all used
        found = decode(open_bytes(b"P5 16 1 4095\n" + values.astype(">u2").tobytes()))
        assert np.abs(np.asarray(found)[0, :, 0].astype(int) - np.arange(16) * 17).max() <= 1


class TestThin:
    @pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (60_000, 300), (3, 30_001)])
    @pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
    def test_costs_no_more_than_its_crop(
        self, tmp_path: Path, size: tuple[int, int], image_size: tuple[int, int]
    ):
        Image.new("RGB", size, (9, 90, 9)).save(tmp_path / "thin.png")
        spec = describe("resnet18", classes=("a", "b"), num_classes=2, image_size=image_size, crop_pct=0.875)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = Source(("a", "b"), ["thin"], [0], lambda _: open_image(tmp_path / "thin.png"))
        pixels = Images(source, spec)[0].readable()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; it were 20 GB
        assert pixels.shape == (3, *image_size)
        assert (pixels == torch.tensor([9, 90, 9])[:, None, None]).all()

    @pytest.mark.parametrize("upright", [False, True])
    def test_shows_the_middle(self, upright: bool):
        """What the whole picture, resized and cropped, shows."""
        waves = 128 + 127 * np.sin(np.arange(1001) / 20 + np.arange(40)[:, None] / 9)
        strip = waves.astype(np.uint8)[..., None].repeat(3, axis=2)
        image = Image.fromarray(strip.transpose(1, 0, 2).copy() if upright else strip)
        spec = describe("resnet18", classes=("a", "b"), num_classes=2, image_size=(32, 32), crop_pct=0.875)
        found, expected = evaluation_transform(spec)(image), timms(spec)(image)
        assert (found.int() - expected.int()).abs().max() < 8  # half a pixel of a wave

    @pytest.mark.parametrize("size", [(400, 20), (20, 400), (33, 47), (500, 375), (1, 1)])
    @pytest.mark.parametrize("mode", ["center", "squash", "border"])
    def test_ordinary_pictures_are_as_timm_shows_them(self, size: tuple[int, int], mode: str):
        image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8))
        spec = describe("resnet18", classes=("a", "b"), num_classes=2, image_size=(32, 48))
        spec = spec.model_copy(update={"crop_mode": mode})
        assert torch.equal(evaluation_transform(spec)(image), timms(spec)(image))


def timms(spec):
    return timm.data.create_transform(
        (3, *spec.image_size),
        is_training=False,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        normalize=False,
    )


class TestWarnings:
    def test_stay_inside(self, recwarn: pytest.WarningsRecorder):
        palette = Image.fromarray(SEEN).quantize(8)
        files = [
            saved(palette, "PNG", transparency=bytes([255] * 4 + [0] * 4)),
            saved(
                Image.fromarray(SEEN),
                "PNG",
                exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\xff\0\0\0",
            ),
            saved(Image.fromarray(SEEN), "TIFF")[:-8] + b"\xff" * 8,
        ]
        warnings.simplefilter("always")
        for file in files:
            with suppress(*UNREADABLE):
                decode(open_bytes(file))
        assert not recwarn.list

    @pytest.mark.parametrize("most", [500, 900])  # less than half of the pixels, and more
    def test_a_limit_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch, most: int):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(UNREADABLE) as refusal:
            open_bytes(saved(Image.fromarray(SEEN), "PNG"))
        said = why_unreadable(refusal.value)
        assert "exceeds limit" in said
        assert said.endswith("; save the image with fewer pixels")

    def test_a_limit_holds_while_another_thread_reads(self, monkeypatch: pytest.MonkeyPatch):
        """Filters of warnings belong to the process: a thread may reset those of its neighbour."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
        file = saved(Image.fromarray(SEEN), "PNG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monkeypatch.setattr("warnings.simplefilter", lambda *_: None)
            with pytest.raises(Image.DecompressionBombError):
                open_bytes(file)


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) big-endian uint16, which Pillow cannot write."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
