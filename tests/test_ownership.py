"""Nothing without our marker is replaced, renamed or deleted; readers see whole directories and never write."""

import ast
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

import pyramid_ldm
from pyramid_ldm import ownership
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import write_json, write_text
from pyramid_ldm.ownership import (
    MARKER,
    claim,
    claim_file,
    clean,
    delete_directory,
    delete_file,
    held,
    keep_apart,
    kind_of,
    marker_of,
    read_whole,
    replace_directory,
)

PACKAGE = Path(pyramid_ldm.__file__).parent


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_or_empty_directory_becomes_ours_and_stays_so(tmp_path):
    for name in ("new", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        claim(tmp_path / name, "samples", "--out", settings={"solver": "rk45"})
        claim(tmp_path / name, "samples", "--out", settings={"solver": "euler"})
        assert marker_of(tmp_path / name)["settings"] == {"solver": "rk45"}, "the first one counts"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f".{MARKER}.123.tmp").write_text("{")  # killed while it wrote its marker
    claim(tmp_path / "begun", "run", "run_dir")
    assert kind_of(tmp_path / "begun") == "run"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"kind": []}', '{"kind": "thesis"}'])
def test_a_directory_without_a_sound_marker_is_somebody_elses(tmp_path, content):
    (tmp_path / "thesis.txt").write_text("mine")
    if content is not None:
        (tmp_path / MARKER).write_text(content)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="is not empty and not a folder of samples"):
        claim(tmp_path, "samples", "--out")
    with pytest.raises(UserError, match="it is not deleted"):
        delete_directory(tmp_path, "samples")
    with pytest.raises(UserError, match="is not replaced"):
        replace_directory(tmp_path, "samples", lambda path: None)
    with pytest.raises(UserError, match="nothing in it is deleted"):
        delete_file(tmp_path / "thesis.txt", "samples")
    assert tree(tmp_path) == before


def test_a_directory_of_another_kind_is_refused(tmp_path):
    claim(tmp_path / "a", "shards", "--out")
    with pytest.raises(UserError, match="is a shard directory, not a folder of samples; give another --out"):
        claim(tmp_path / "a", "samples", "--out")
    with pytest.raises(UserError, match="is not a model"):
        replace_directory(tmp_path / "a", "model", lambda path: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; give a directory as --out"):
        claim(tmp_path / "file", "samples", "--out")


def test_a_link_is_not_followed_to_be_deleted(tmp_path):
    claim(tmp_path / "model", "model", "x")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for act in (delete_directory, lambda path, kind: replace_directory(path, kind, lambda path: None)):
        with pytest.raises(UserError):
            act(tmp_path / "link", "model")
    assert kind_of(tmp_path / "model") == "model"


def test_places_are_compared_where_they_really_are(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photosynthesis").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    keep_apart(tmp_path / "photosynthesis", "--out", {"--data": tmp_path / "photos", "RUN": None})
    for out in ("photos", "link", "photos/new/deep", "link/x", "photos/../photos/x", "."):
        with pytest.raises(UserError):
            keep_apart(tmp_path / out, "--out", {"--data": tmp_path / "photos"})


def test_a_file_of_somebody_elses_is_left(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"a\.json: exists, and pyramid-ldm did not write it"):
        claim_file(tmp_path / "a.json", "--out", lambda path: False)
    claim_file(tmp_path / "a.json", "--out", lambda path: True)
    claim_file(tmp_path / "new" / "a.json", "--out", lambda path: False)
    with pytest.raises(UserError, match="is a folder; give a file"):
        claim_file(tmp_path, "--out", lambda path: True)


@pytest.fixture(params=["exchanged", "renamed"])
def swap(request, monkeypatch):
    """Both ways to replace: in one step, and on systems that cannot."""
    if request.param == "renamed":
        monkeypatch.setattr(ownership, "_exchange", lambda a, b: False)
    return request.param


def test_a_directory_is_replaced_whole(tmp_path, swap):
    target = tmp_path / "model"
    replace_directory(target, "model", lambda path: write_text(path / "old", "1"))
    replace_directory(target, "model", lambda path: write_text(path / "inner" / "new", "2"), validation=0.1)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "model", "model/inner", "model/inner/new", f"model/{MARKER}",
    ]  # fmt: skip
    assert marker_of(target) == {"format": 1, "kind": "model", "validation": 0.1, "files": ["inner/new", MARKER]}


def test_directories_are_swapped_in_one_step_here():
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2")
    here = Path(os.environ["XDG_CACHE_HOME"])
    for name in ("a", "b"):
        (here / name).mkdir()
        (here / name / name).touch()
    assert ownership._exchange(here / "a", here / "b")
    assert (here / "a" / "b").exists()


def test_what_somebody_put_into_it_is_moved_over(tmp_path, swap):
    target = tmp_path / "model"
    replace_directory(target, "model", lambda path: write_text(path / "weights", "1"))
    write_text(target / "notes" / "card.md", "mine")
    replace_directory(target, "model", lambda path: write_text(path / "weights", "2"))
    assert (target / "notes" / "card.md").read_text() == "mine"
    assert (target / "weights").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_survives_a_writer_that_fails(tmp_path):
    target = tmp_path / "model"
    replace_directory(target, "model", lambda path: write_text(path / "old", "1"))

    def fail(path):
        write_text(path / "new", "2")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        replace_directory(target, "model", fail)
    assert sorted(path.name for path in target.iterdir()) == ["old", MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def leave(folder, name, text, kind="model"):
    (folder / name).mkdir()
    write_json(folder / name / MARKER, {"format": 1, "kind": kind, "files": ["weights", MARKER]})
    (folder / name / "weights").write_text(text)


def test_a_replacement_killed_between_its_renames_is_read_and_then_undone(tmp_path):
    leave(tmp_path, ".model.previous", "old")
    before = tree(tmp_path)
    assert read_whole(tmp_path / "model", lambda home: (home / "weights").read_text()) == "old"
    assert tree(tmp_path) == before, "a reader never writes"
    with pytest.raises(RuntimeError):
        replace_directory(tmp_path / "model", "model", lambda path: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_replacement_killed_after_its_renames_stands(tmp_path):
    leave(tmp_path, "model", "new")
    leave(tmp_path, ".model.previous", "old")
    (tmp_path / ".model.previous" / "card.md").write_text("mine")
    assert read_whole(tmp_path / "model", lambda home: (home / "weights").read_text()) == "new"
    replace_directory(tmp_path / "model", "model", lambda path: write_text(path / "weights", "newer"))
    assert tree(tmp_path).keys() == {"model/weights", f"model/{MARKER}", "model/card.md"}


def test_leftovers_of_killed_processes_are_cleaned_and_nothing_else(tmp_path):
    claim(tmp_path, "run", "run_dir")
    (tmp_path / ".config.yaml.999999999.tmp").write_text("half")
    leave(tmp_path, ".model.999999999.tmp", "half")
    for name in (".mine.tmp", ".notes.999999999x.tmp", "a.999999999.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".foreign.999999999.tmp").mkdir()
    (tmp_path / ".foreign.999999999.tmp" / "thesis").write_text("mine")
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".foreign.999999999.tmp", ".mine.tmp", ".notes.999999999x.tmp", "a.999999999.tmp", MARKER,
    ]  # fmt: skip


def test_whatever_deleting_is_killed_at_what_is_left_is_still_ours(tmp_path, monkeypatch):
    """The marker goes last, so that the next command can go on; what somebody put into a model is moved over."""

    class Killed(BaseException):
        pass

    unlink, left = Path.unlink, [0]

    def kill(path, missing_ok=False):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        unlink(path, missing_ok)

    for moment in range(4):
        leave(tmp_path, "model", "old")
        (tmp_path / "model" / "notes.txt").write_text("mine")
        left[0] = moment
        monkeypatch.setattr(Path, "unlink", kill)
        with contextlib.suppress(Killed):
            replace_directory(tmp_path / "model", "model", lambda path: write_text(path / "weights", "new"))
        monkeypatch.undo()
        replace_directory(tmp_path / "model", "model", lambda path: write_text(path / "weights", "newer"))
        assert tree(tmp_path).keys() == {"model/weights", f"model/{MARKER}", "model/notes.txt"}
        shutil.rmtree(tmp_path / "model")


def test_a_kill_after_the_exchange_costs_nothing_of_somebody_elses(tmp_path):
    """What `clean` finds then is the old model under a temporary name."""
    claim(tmp_path, "run", "run_dir")
    leave(tmp_path, "model", "new")
    leave(tmp_path, ".model.999999999.tmp", "old")
    (tmp_path / ".model.999999999.tmp" / "notes.txt").write_text("mine")
    clean(tmp_path)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert not (tmp_path / ".model.999999999.tmp").exists()


def test_a_process_with_the_number_of_one_that_was_killed_goes_on(tmp_path):
    """In containers numbers repeat; the other was killed before its marker was there."""
    half = tmp_path / f".model.{os.getpid()}.tmp"
    half.mkdir()
    (half / f".{MARKER}.{os.getpid()}.tmp").write_text("{")
    replace_directory(tmp_path / "model", "model", lambda path: write_text(path / "weights", "new"))
    assert tree(tmp_path).keys() == {"model/weights", f"model/{MARKER}"}


def export_in_a_loop(target, count):
    for number in range(count):

        def write(path, number=number):
            for name in ("config", "weights"):
                (path / name).write_text(f"{number:06d}" * 500)

        replace_directory(target, "model", write)


@pytest.mark.parametrize("way", ["exchanged", "renamed"])
def test_a_reader_sees_one_whole_model_while_another_process_exports(tmp_path, way, monkeypatch):
    """500 exports, read as fast as can be; in tests/test_training.py the same with the real commands."""
    monkeypatch.setattr(ownership, "fsync_path", lambda path: None)  # speed: there are thousands
    if way == "renamed":
        monkeypatch.setattr(ownership, "_exchange", lambda a, b: False)
    target, count = tmp_path / "model", 500
    export_in_a_loop(target, 1)
    writer = multiprocessing.get_context("fork").Process(target=export_in_a_loop, args=(target, count))
    writer.start()
    seen, reads = set(), 0

    def read(home):
        first = (home / "config").read_text()
        time.sleep(0.0005)
        return first, (home / "weights").read_text()

    while writer.is_alive() or reads < 500:
        config, weights = read_whole(target, read)
        assert config == weights
        assert len(config) == 3000
        seen.add(config[:6])
        reads += 1
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 20
    assert read_whole(target, read)[0].startswith(f"{count - 1:06d}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_missing_is_said_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "model", lambda home: (home / "weights").read_text())
    assert time.monotonic() - began < 1


def test_a_lock_is_not_inherited_by_workers(tmp_path):
    """A killed run's workers live on for seconds; the same command must go on at once."""
    claim(tmp_path, "run", "run_dir")
    context = multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()

    def hold():
        with held(tmp_path):
            child = context.Process(target=stop.wait, daemon=False)
            child.start()
            ready.set()
            os._exit(0)  # as kill -9: nothing is tidied up

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(20)
    process.join()
    with held(tmp_path):
        stop.set()


def test_one_module_deletes_and_replaces_directories():
    """Elsewhere in the package: no rmtree, unlink, rename or rmdir; files are replaced in files.py alone."""
    dangerous = {"rmtree", "unlink", "rename", "rmdir", "removedirs", "remove", "replace", "move", "copytree"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in dangerous:
                owner = ast.unparse(node.func.value)
                arguments = len(node.args) + len(node.keywords)
                text = node.func.attr == "replace" and owner != "os" and arguments >= 2  # str.replace
                if not text and not (node.func.attr == "remove" and owner not in ("os", "shutil")):
                    found.add((path.relative_to(PACKAGE).as_posix(), node.func.attr))
    assert {name for name, _ in found} == {"ownership.py", "files.py"}
    assert {what for name, what in found if name == "files.py"} == {"replace", "unlink"}
