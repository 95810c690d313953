"""The library is built once, where it belongs, and its absence has a reason."""

import os

import pytest

from src.kernels import library as module
from src.kernels.library import BuildError, library


@pytest.fixture(autouse=True)
def sources(tmp_path_factory, monkeypatch):
    """One function in place of all operators, which take the compiler seven seconds."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "common.h").write_text("")
    (folder / "threads.cpp").write_text('extern "C" int cvt_set_threads(int n) { return n; }\n')
    monkeypatch.setattr(module, "SOURCES", folder)
    monkeypatch.setattr(module, "_loaded", {})


def test_it_is_built_once(compiler, tmp_path):
    folder = tmp_path / "a cache"
    path = library(folder)
    made = path.stat().st_mtime_ns
    assert library(folder) == path and path.stat().st_mtime_ns == made
    assert list(folder.iterdir()) == [path]  # nothing of the compiler is left


def test_another_source_or_processor_is_another_library(compiler, tmp_path, monkeypatch):
    first = library(tmp_path)
    monkeypatch.setattr(module, "_processor", lambda: "another")
    second = library(tmp_path)
    (module.SOURCES / "common.h").write_text("// changed\n")
    assert len({first, second, library(tmp_path)}) == 3


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(BuildError, match="no C.. compiler found .no-such-compiler"):
        library(tmp_path)


def test_a_compiler_that_is_no_program(tmp_path, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_bytes(b"\x00\x01")
    compiler.chmod(0o755)
    monkeypatch.setattr(module, "COMPILERS", (str(compiler),))
    with pytest.raises(BuildError, match="g\\+\\+: Exec format error"):
        library(tmp_path)


def test_on_other_systems_than_linux(tmp_path, monkeypatch):
    """MindSpore's `ops.Custom` refuses any other, after the library was built."""
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(BuildError, match="on Linux only"):
        library(tmp_path)


def test_a_compiler_that_fails_leaves_nothing(compiler, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "broken.cpp").write_text("this is no C++\n")
    monkeypatch.setattr(module, "SOURCES", tmp_path / "kernels")
    with pytest.raises(BuildError, match="failed: .*error"):
        library(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_can_not_be_written(compiler, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BuildError, match="file/cache: "):
        library(file / "cache")


def test_a_damaged_library_is_named(compiler, tmp_path):
    built = library(tmp_path)
    damaged = tmp_path / "other" / built.name
    damaged.parent.mkdir()
    damaged.write_bytes(built.read_bytes()[:100])
    with pytest.raises(BuildError, match=f"cannot be loaded: .*{built.name}.*; remove it"):
        library(damaged.parent)


def test_a_path_that_mindspore_can_not_read(compiler, tmp_path):
    with pytest.raises(BuildError, match="colon"):
        library(tmp_path / "a:b")


def test_the_folder_and_the_file_are_this_user_s_alone(compiler, tmp_path):
    before = os.umask(0o002)
    try:
        built = library(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert not built.stat().st_mode & 0o077


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_is_not_loaded(compiler, tmp_path, mode):
    """The name alone is no proof of who wrote a library."""
    built = library(tmp_path / "cache")
    module._loaded.clear()
    built.parent.chmod(mode)
    with pytest.raises(BuildError, match="cache: is writable by others"):
        library(built.parent)
    built.parent.chmod(0o700)
    built.chmod(mode)
    with pytest.raises(BuildError, match="kernels-.*so: is writable by others"):
        library(built.parent)


def test_a_link_is_not_loaded(compiler, tmp_path):
    built = library(tmp_path / "cache")
    module._loaded.clear()
    other = tmp_path / "other" / built.name
    other.parent.mkdir(mode=0o700)
    other.symlink_to(built)
    with pytest.raises(BuildError, match="is a link"):
        library(other.parent)


def test_a_foreign_folder_is_not_used(compiler, tmp_path):
    """Root alone can make one."""
    if os.getuid():
        pytest.skip("only root can give a folder to another user")
    folder = tmp_path / "cache"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    with pytest.raises(BuildError, match="cache: belongs to another user"):
        library(folder)
