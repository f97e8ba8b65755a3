"""The terminal preview, read back cell by cell."""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from dalle_cli.errors import DalleError
from dalle_cli.viz.terminal import render


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def read(text: str) -> list[list[tuple[str, str, str]]]:
    """A terminal in miniature: lines of (character, foreground, background)."""
    return [list(cells(line)) for line in text.splitlines()]


def cells(line: str) -> Iterator[tuple[str, str, str]]:
    foreground = background = ""
    for codes, char in re.findall(r"\x1b\[([\d;]*)m|(.)", line):
        if char:
            yield char, foreground, background
            continue
        for found in re.findall(r"38;2;[\d;]{5,11}?(?=;48|$)|38;5;\d+|48;2;[\d;]+|48;5;\d+|49|^0$", codes):
            if found == "0":
                foreground = background = ""
            elif found.startswith("38"):
                foreground = found
            else:
                background = found


def test_each_cell_shows_two_pixels_exactly() -> None:
    picture = noise(6, 8)
    lines = read(render([picture]))
    assert [len([c for c in line if c[0] == "▀"]) for line in lines] == [8, 8, 8]
    for y in range(3):
        for x in range(8):
            upper, lower = (";".join(map(str, picture[:, 2 * y + dy, x])) for dy in (0, 1))
            assert lines[y][x] == ("▀", f"38;2;{upper}", f"48;2;{lower}")


def test_both_layouts_give_the_same_text() -> None:
    picture = noise(6, 8)
    assert render([picture]) == render([picture.transpose(1, 2, 0)])


@pytest.mark.parametrize("columns", [1, 2, 15, 40, 80, 200])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_no_line_is_wider_than_the_terminal(columns: int, count: int) -> None:
    text = render([noise(64, 48, seed=i) for i in range(count)], columns)
    assert 0 < max(len(line) for line in read(text)) <= columns


def test_pictures_stand_side_by_side_and_then_below() -> None:
    text = render([noise(32, 32, seed=i) for i in range(3)], columns=33, per_row=2)
    lines = read(text)
    assert len(lines) == 8 + 1 + 8
    assert {len(line) for line in lines[:8]} == {33}
    assert {len([c for c in line if c[0] == "▀"]) for line in lines[9:]} == {16}


def test_an_odd_last_row_leaves_the_background_alone() -> None:
    assert {cell[2] for cell in read(render([noise(3, 4)]))[1] if cell[0] == "▀"} == {"49"}


def test_every_line_ends_uncolored() -> None:
    for line in render([noise(9, 9), noise(4, 9)]).splitlines():
        assert line.rstrip(" ").endswith("\x1b[0m") or "\x1b" not in line


@pytest.mark.parametrize(
    ("color", "index"), [((255, 0, 0), 196), ((0, 0, 0), 16), ((255, 255, 255), 231), ((128, 128, 128), 244)]
)
def test_256_colors(color: tuple[int, int, int], index: int) -> None:
    picture = np.tile(np.array(color, np.uint8)[:, None, None], (1, 2, 2))
    assert read(render([picture], truecolor=False))[0][0] == ("▀", f"38;5;{index}", f"48;5;{index}")


def test_a_flat_picture_names_its_color_once_a_line() -> None:
    assert render([np.full((3, 4, 9), 7, np.uint8)]).count("38;2") == 2


def test_refusals() -> None:
    with pytest.raises(DalleError, match="found none"):
        render([])
    with pytest.raises(ValueError, match="uint8"):
        render([np.zeros((3, 4, 4))])  # type: ignore[list-item]
