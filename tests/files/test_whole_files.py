"""Files that are whole at every moment, whoever writes them."""

import os
import stat
import threading
import time

import pytest

from pyro_bmr.files.plans import read_plan, write_plan
from pyro_bmr.files.whole_files import replace_file


def test_mode_and_links_are_kept(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    write_plan(path, {"x": 1})
    fresh = stat.S_IMODE(path.stat().st_mode)
    plain = tmp_path / "plain"
    plain.touch()
    assert fresh == stat.S_IMODE(plain.stat().st_mode)
    path.chmod(0o640)
    link.symlink_to(path)
    write_plan(link, {"x": 2})
    assert link.is_symlink() and read_plan(path) == {"x": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_each_writer_has_its_own(tmp_path):
    path = tmp_path / "a"
    with replace_file(path) as first, replace_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_readers_beside_writers(tmp_path):
    path, failures = tmp_path / "a", []
    write_plan(path, {"x": [0] * 1000})

    def write(number):
        try:
            for _ in range(30):
                write_plan(path, {"x": [number] * 1000})
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(set(read_plan(path)["x"])) == 1
    assert not failures


def test_what_a_killed_writer_left_goes_later(tmp_path):
    left = [tmp_path / f".pyro_bmr-{name}.unfinished" for name in ("old", "new")]
    for file in left:
        file.touch()
    os.utime(left[0], (time.time() - 7200,) * 2)
    write_plan(tmp_path / "a", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == [left[1].name, "a"]


def test_what_fails_leaves_nothing(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), replace_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_paths_that_are_no_files(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, error, match in (
        (fifo, ValueError, "is a FIFO"),
        ("/dev/null", ValueError, "is a device"),
        (tmp_path, IsADirectoryError, "is a folder"),
        ("", ValueError, "an empty path"),
        ("a\0b", ValueError, "Expected the name of a file"),
        (3, TypeError, "got the path 3"),
    ):
        for action in (read_plan, lambda path: write_plan(path, {})):
            with pytest.raises(error, match=match):
                action(path)
