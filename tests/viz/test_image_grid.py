"""Image grids: what is drawn, where, and that pixels stay what they were."""

import numpy as np
import pytest
from PIL import Image

from dalle_cli.errors import DalleError
from dalle_cli.viz import grid as module
from dalle_cli.viz.grid import BACKGROUND, BODY, GAP, MARGIN, image_grid

LONG = "a very long caption about " + "many small things " * 20


def noise(size: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (3, size, size), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def ink(image: Image.Image, top: int, bottom: int) -> bool:
    return bool((pixels(image)[top:bottom] != BACKGROUND).any())


def test_a_picture_of_the_cells_size_is_drawn_pixel_for_pixel() -> None:
    picture = noise(128)
    for layout in (picture, picture.transpose(1, 2, 0)):
        drawn = pixels(image_grid([layout]))[MARGIN : MARGIN + 128, MARGIN : MARGIN + 128]
        np.testing.assert_array_equal(drawn.transpose(2, 0, 1), picture)


@pytest.mark.parametrize("size", [8, 32, 64, 100, 600])
def test_contrast_is_never_rescaled(size: int) -> None:
    """A dull picture stays dull, also beside a bright one and after resizing."""
    flat = np.full((3, size, size), 120, np.uint8)
    drawn = pixels(image_grid([flat, noise(size)]))
    cell = (drawn.shape[1] - 2 * MARGIN - GAP) // 2
    assert (drawn[MARGIN : MARGIN + cell, MARGIN : MARGIN + cell] == 120).all()
    if size < 256:  # enlarging keeps within the values there were: no bright rims at edges
        dull = pixels(image_grid([noise(size, low=90, high=140)] * 2))[MARGIN : MARGIN + cell, MARGIN : MARGIN + cell]
        assert dull.min() >= 90
        assert dull.max() < 140


@pytest.mark.parametrize(("size", "side"), [(16, 112), (32, 128), (64, 128), (128, 128), (256, 256), (1024, 256)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size: int, side: int) -> None:
    assert image_grid([noise(size)] * 4, columns=2).width == 2 * side + GAP + 2 * MARGIN


def test_cell_and_columns_are_obeyed() -> None:
    image = image_grid([noise(32)] * 6, columns=3, cell=200)
    assert image.size == (3 * 200 + 2 * GAP + 2 * MARGIN, 2 * 200 + GAP + 2 * MARGIN)


def test_proportions_are_kept() -> None:
    wide = np.zeros((3, 50, 200), np.uint8)
    drawn = (pixels(image_grid([wide], cell=100)) == 0).all(-1)
    assert drawn.any(0).sum() == 100
    assert drawn.any(1).sum() == 25


@pytest.mark.parametrize("count", [*range(1, 40), 64, 512])
def test_default_columns_fill_a_readable_grid(count: int) -> None:
    columns = module._columns([count], 128)
    rows = -(-count // columns)
    assert columns <= 8
    assert rows * columns - count < rows  # no column but the last could be left out


def rows(count: int, texts: list[str], columns: int, groups: list[int] | None = None) -> list[module.Row]:
    return module._rows(module._blocks(count, texts, groups), texts, columns)


def test_one_prompts_caption_is_written_once_above_all_its_rows() -> None:
    found = rows(5, ["a"] * 5, 2)
    assert [(r.members, r.heading, r.captioned) for r in found] == [
        ((0, 1), "a", False),
        ((2, 3), "", False),
        ((4,), "", False),
    ]


def test_candidates_of_several_prompts_have_rows_of_their_own() -> None:
    found = rows(5, ["a", "a", "a", "b", "b"], 2)
    assert [(r.members, r.heading, r.first) for r in found] == [
        ((0, 1), "a", True),
        ((2,), "", False),
        ((3, 4), "b", True),
    ]


def test_different_captions_stand_below_and_a_shared_row_has_a_heading() -> None:
    found = rows(5, ["a", "b", "c", "c", "d"], 2)
    assert [(r.members, r.heading, r.captioned) for r in found] == [
        ((0, 1), "", True),
        ((2, 3), "c", False),
        ((4,), "", True),
    ]


def test_groups_begin_new_rows() -> None:
    texts = ["a", "b", "c", "d"]
    assert [r.members for r in rows(4, texts, 3, [7, 7, 7, 2])] == [(0, 1, 2), (3,)]
    assert [r.members for r in rows(4, texts, 3)] == [(0, 1, 2), (3,)]
    assert [r.members for r in rows(4, texts, 3, [7, 2, 2, 2])] == [(0,), (1, 2, 3)]
    plain, grouped = (image_grid([noise(64)] * 4, columns=3, groups=groups) for groups in (None, [7, 2, 2, 2]))
    assert grouped.height == plain.height + GAP


def test_captions_scores_and_title_are_drawn_where_they_belong() -> None:
    pictures = [noise(128, seed=i) for i in range(2)]
    bare = image_grid(pictures)
    assert not ink(bare, MARGIN + 128, bare.height)
    captioned = image_grid(pictures, ["one", "two"])
    assert ink(captioned, MARGIN + 128, captioned.height)
    assert image_grid(pictures, scores=[0.1, 0.2]).height == captioned.height
    assert image_grid(pictures, ["one", "two"], [0.1, 0.2]).height == captioned.height + module.LINE
    assert ink(bare, MARGIN, MARGIN + 1)
    assert not ink(image_grid(pictures, title="t"), MARGIN, MARGIN + 1)
    headed = image_grid(pictures, ["same", "same"])
    assert not ink(headed, headed.height - MARGIN, headed.height)
    assert (pixels(headed)[-MARGIN - 128 : -MARGIN, MARGIN : MARGIN + 128] == pictures[0].transpose(1, 2, 0)).all()
    assert (
        pixels(image_grid(pictures, scores=[0.1, 0.2])).tobytes()
        != pixels(image_grid(pictures, scores=[0.1, 0.3])).tobytes()
    )


def test_equal_input_gives_an_equal_image() -> None:
    one, two = (image_grid([noise(32)] * 3, ["a", "b", "c"], [1, 2, 3], title="t") for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_long_captions_are_wrapped_and_ellipsised_within_the_cell() -> None:
    lines = module._wrap(module._clean(LONG), 128, 3, BODY)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert " ".join(lines)[:-1] in LONG
    assert all(sum(module._advance(c, BODY) for c in line) <= 128 for line in lines)
    narrow = image_grid([noise(64)] * 2, [LONG, "x"])
    canvas = pixels(narrow)
    assert (canvas[:, -MARGIN:] == BACKGROUND).all()
    assert (canvas[:, MARGIN + 128 : MARGIN + 128 + GAP] == BACKGROUND).all()  # no word runs into its neighbor


def test_a_word_longer_than_the_cell_is_broken() -> None:
    lines = module._wrap("x" * 60, 100, 9, BODY)
    assert len(lines) > 1
    assert "".join(lines) == "x" * 60
    assert module._wrap("abc", 1, 9, BODY) == ["a", "b", "c"]
    assert module._wrap("two words", 500, 1, BODY) == ["two words"]


@pytest.mark.parametrize(
    "caption",
    [
        "빨간 원 위의 파란 사각형",
        "👩\u200d🚀 astronaut ❤\ufe0f",
        "a\0b\nc\td",
        "\ud800",
        "مرحبا",
        "e\u0301" * 9,
        "",
        " ",
        "x" * 100_000,
    ],
)
def test_any_caption_can_be_drawn(caption: str) -> None:
    image = image_grid([noise(32)] * 2, [caption, "x"], [float("nan"), float("inf")], title=caption)
    assert image.height > 128
    image_grid([noise(32)] * 2, [caption] * 2)


def test_clean_keeps_what_can_be_seen() -> None:
    assert module._clean(" a\0b\n\tc ") == "a b c"
    assert module._clean("❤\ufe0f 👩\u200d🚀") == "❤ 👩🚀"
    assert module._clean("\ud800") == "\N{REPLACEMENT CHARACTER}"
    assert module._clean("한") == "한"  # composed, as fonts have it


def test_grids_are_drawn_without_any_system_font(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = (module._primary, module._font, module._advance)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(module, "_load", lambda *_: None)
    try:
        drawn = image_grid([noise(128)], ["plain words, 한국어"])
        assert module._primary(12, False).getname()[0] == "Aileron"  # Pillow's own
    finally:
        for cache in caches:
            cache.cache_clear()
    assert ink(drawn, MARGIN + 128, drawn.height)


def test_refusals() -> None:
    with pytest.raises(DalleError, match="found none"):
        image_grid([])
    with pytest.raises(ValueError, match="uint8"):
        image_grid([np.zeros((3, 4, 4))])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        image_grid([noise(8)], ["a", "b"])
