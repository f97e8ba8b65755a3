"""Pages, lists and JSON: written whole, and only over what is one's own."""

import pytest

from dalle_cli.artifacts.text import check_overwrite, head_of, read_json_key, write_text
from dalle_cli.errors import DalleError


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "é\udcff\n")
    assert path.read_bytes() == b"\xc3\xa9?\n"  # half a pair cannot be written down
    (tmp_path / "file").write_text("")
    with pytest.raises(DalleError, match="nothing was changed"):
        write_text(tmp_path / "file" / "a.txt", "")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_only_what_is_known_again_may_be_replaced(tmp_path):
    path = tmp_path / "a.txt"
    check_overwrite(path, "a list", lambda _: False)  # nothing there
    path.write_text("mine")
    check_overwrite(path, "a list", lambda found: head_of(found) == "mine")
    check_overwrite(path, "a list", lambda _: False, force=True)
    with pytest.raises(DalleError, match=r"expected to write a list to .*a\.txt, found something else there"):
        check_overwrite(path, "a list", lambda _: False)

    def unreadable(_):
        raise PermissionError

    with pytest.raises(DalleError, match="found something else there"):
        check_overwrite(path, "a list", unreadable)
    with pytest.raises(DalleError, match="found a folder there"):
        check_overwrite(tmp_path, "a list", lambda _: True, force=True)


@pytest.mark.parametrize(
    ("content", "fact"),
    [(b'{"a": 3}', 3), (b'{"b": 3}', None), (b"[3]", None), (b"{", None), (b"\xff", None), (b"[" * 100_000, None)],
)
def test_a_fact_of_whatever_file_it_is(tmp_path, content, fact):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json_key(tmp_path / "a.json", "a") == fact


def test_the_head_is_no_more_than_asked_for(tmp_path):
    (tmp_path / "a").write_bytes(b"abc\xffdef")
    assert head_of(tmp_path / "a", 4) == "abc\ufffd"
