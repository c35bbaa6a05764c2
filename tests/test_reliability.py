"""Full disks, busy files, hostile files, kills: a clear error or a lock, never a corrupt file."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import fuzz
import h5py
import load
import numpy as np
import pytest
import record
from PIL import Image

from sela_cli import cli, envelope, formats, interrupt, locks, outputs, watchdog
from sela_cli.errors import BadData, CannotCreate, NoInput, StoppedEarly
from sela_cli.images import sources
from sela_cli.images.sources import Source, open_source

ROOT = Path(__file__).parents[1]
OURS = ("logits", "factored logits", "labels", "checkpoint", "probe")


def made(name: str, folder: Path) -> Path:
    """A valid file of one of the formats."""
    file_name, make, _ = fuzz.FORMATS[name]
    make(folder / file_name)
    return folder / file_name


# ---- full disks -------------------------------------------------------------


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Files can't grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", OURS)
def test_full_disk_is_told_and_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    old = made(name, tmp_path)
    size, digest = old.stat().st_size, envelope.read_header(str(old)).digest
    kept = tmp_path / "kept.h5"
    old.rename(kept)
    held = h5py.h5f.get_obj_count()
    for room in {0, 1, 96, size // 4, size // 2, size - 1}:
        with room_for(room), pytest.raises(CannotCreate, match="File too large"):
            made(name, tmp_path)
        assert list(tmp_path.iterdir()) == [kept]
    # Nothing is left open that libhdf5 would try to write once more at exit.
    assert h5py.h5f.get_obj_count() == held
    assert envelope.read_header(str(made(name, tmp_path))).digest == digest


def test_full_disk_keeps_the_file_that_was_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("old")
    with room_for(2), pytest.raises(CannotCreate), outputs.replacing(str(path), True) as partial:
        partial.write_text("newer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_place_where_nothing_can_be_written_is_refused() -> None:
    # Of /proc not even root can make a file.
    with pytest.raises(CannotCreate, match="/proc/labels"):
        made("labels", Path("/proc"))


def test_pipe_that_finds_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with room_for(1000), pytest.raises(CannotCreate, match="TMPDIR"):
        envelope.spool(io.BytesIO(bytes(2000)))
    assert list(tmp_path.iterdir()) == []


# ---- locks ------------------------------------------------------------------


def test_file_that_another_process_writes_is_not_written(tmp_path: Path) -> None:
    with (
        locks.locked(tmp_path / ".labels.h5.lock"),
        pytest.raises(CannotCreate, match="another process is writing"),
    ):
        made("labels", tmp_path)
    assert list(tmp_path.iterdir()) == []
    made("labels", tmp_path)


def test_what_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".labels.h5.lock").touch()
    (tmp_path / ".labels.h5.partial").write_bytes(bytes(1 << 20))
    path = made("labels", tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size < 1 << 20
    formats.read_labels(str(path))


def test_lock_of_a_killed_process_is_not_held_on_by_its_child(tmp_path: Path) -> None:
    """The watchdog's, for instance, which may still read a file then."""
    heard, ready = os.pipe()
    waits, never = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locks.locked(tmp_path / "lock"):
            os.fork()  # Both write a byte, and wait.
            os.close(never)
            os.write(ready, b"x")
            os.read(waits, 1)
            os._exit(0)
    os.close(waits)
    assert os.read(heard, 1) + os.read(heard, 1) == b"xx"
    with pytest.raises(BlockingIOError), locks.locked(tmp_path / "lock"):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with locks.locked(tmp_path / "lock"):
        pass
    os.close(never)


def test_what_is_discarded_leaves_nothing_unless_another_process_writes_it(tmp_path: Path) -> None:
    path, partial, lock = (tmp_path / name for name in ("a", ".a.partial", ".a.lock"))
    for item in (path, partial, lock):
        item.touch()
    with locks.locked(lock):
        outputs.discard(path)
        assert path.exists() and partial.exists()
    outputs.discard(path)
    assert list(tmp_path.iterdir()) == []


def test_lock_that_its_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", fcntl.flock
    removed: list[None] = []

    def flock(handle: int, operation: int) -> None:
        if not removed:
            path.unlink()
            removed.append(None)
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked(path):
        monkeypatch.undo()
        assert removed and path.exists()
        with pytest.raises(BlockingIOError), locks.locked(path):
            pass
        assert path.exists()
    assert not path.exists()


def test_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.locked(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_that_another_program_writes_is_named(tmp_path: Path) -> None:
    path = made("labels", tmp_path)
    with path.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(NoInput, match="another process is writing"):
            formats.read_labels(str(path))
    formats.read_labels(str(path))


def test_reader_of_a_replaced_file_goes_on_with_the_old_one(tmp_path: Path) -> None:
    path = made("labels", tmp_path)
    with envelope.open_file(str(path)) as (file, _):
        made_anew = tmp_path / "new"
        made_anew.mkdir()
        os.replace(made("logits", made_anew), path)
        assert file["labels"].shape == (2, 12)
    assert envelope.read_header(str(path)).kind == "logits"


def test_image_that_vanishes_is_named(tmp_path: Path) -> None:
    image = made("png", tmp_path)
    source = open_source(str(tmp_path))
    image.unlink()
    with pytest.raises(BadData, match=r"image\.png.*No such file"):
        source.image(0)


# ---- signals ----------------------------------------------------------------


def test_signal_ends_the_wait_for_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def read(self, size: int) -> bytes:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal was not taken")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(interrupt, "_requested", False)
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        interrupt.listen()
        for _ in range(2):  # During the wait, and before it.
            with pytest.raises(StoppedEarly, match="standard input"):
                envelope.spool(Slow())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


def test_signal_in_the_middle_of_a_picture_is_not_taken_for_damage() -> None:
    def decode(number: int) -> NoReturn:
        raise StoppedEarly("stopped by a signal")

    with pytest.raises(StoppedEarly, match=r"^stopped by a signal$"):
        Source("made", ["a.png"], decode).image(0)


# ---- hostile files ----------------------------------------------------------


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize("check", [endless, os.abort])
def test_watchdog_sees_what_does_not_come_back(check: Callable[[], None]) -> None:
    assert not watchdog.survives(check, 0.05)


def test_watchdog_leaves_exceptions_to_the_caller() -> None:
    assert watchdog.survives(lambda: None, 5)
    assert watchdog.survives(lambda: 1 / 0, 5)


def test_files_that_are_tried_together_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one of them does not come back, each is: that one is refused, the others are read."""
    paths = [str(made(name, tmp_path)) for name in OURS[1:]]
    walk = envelope._walk

    def forever(path: str) -> None:
        while path == paths[2]:
            pass
        walk(path)

    monkeypatch.setattr(envelope, "_walk", forever)
    monkeypatch.setattr(envelope, "_allowed", lambda path: 0.1)
    monkeypatch.setattr(envelope, "_tried", set())
    envelope.try_together(paths)
    with pytest.raises(BadData, match="does not come back"), envelope.open_hdf5(paths[2]):
        pass
    others = [path for path in paths if path != paths[2]]
    (tmp_path / "damaged.h5").write_bytes(Path(others[0]).read_bytes()[:100])
    envelope.try_together([str(tmp_path / "damaged.h5"), *others, "absent.h5"])
    monkeypatch.setattr(envelope, "survives", lambda check, seconds: False)
    for path in others:
        with envelope.open_hdf5(path):
            pass


def test_endless_loop_of_libhdf5_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string's length in the heap that sends its reader back to the same string."""
    path = made("labels", tmp_path)
    data = bytearray(path.read_bytes())
    length = data.find(b"GCOL") + 24
    data[length : length + 8] = struct.pack("<Q", 2**64 - 16)
    path.write_bytes(data)
    monkeypatch.setattr(envelope, "_LEAST_SECONDS", 0.2)
    with pytest.raises(BadData, match="does not come back"):
        formats.read_labels(str(path))


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_input_is_read_or_refused(name: str) -> None:
    """`python tests/fuzz.py` does the same to thousands."""
    counts, wrong = fuzz.fuzz(name, range(4))
    assert not wrong
    assert counts["read"] + counts["refused"] == 4


def test_fuzzer_sees_what_goes_wrong(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        what = path.read_text()
        if what == "abort":
            os.abort()
        elif what == "memory":
            bytearray(1 << 40)
        elif what == "escaped":
            raise KeyError(what)
        elif what == "two lines":
            raise BadData("two\nlines")
        elif what == "refused":
            raise BadData(what)

    inputs = [b"abort", b"memory", b"escaped", b"two lines", b"refused", b"read"]
    ended = [end.kind for end in fuzz.outcomes(read, inputs, tmp_path / "input")]
    assert ended == ["crash", "memory", "escaped", "escaped", "refused", "read"]


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 40, 3)])
def test_shape_that_the_file_does_not_hold_is_refused(shape: tuple[int, ...], path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["index"]
        file.create_dataset("index", shape, np.int64, chunks=True)
    with pytest.raises(BadData, match=r"index"):
        formats.read_labels(str(path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made("labels", tmp_path)


def test_compression_bomb_is_refused_and_compression_is_not(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        potentials = file["potentials/0"]
        attributes = dict(potentials.attrs)
        del file["potentials/0"]
        file.create_dataset("potentials/0", data=np.zeros(3), chunks=(3,), compression="gzip")
        file["potentials/0"].attrs.update(attributes)
    formats.read_labels(str(path))
    with h5py.File(path, "r+") as file:
        del file["trace/0/residual"]
        file.create_dataset("trace/0/residual", (1 << 34,), np.float64, compression="gzip")
    with pytest.raises(BadData, match="trace/0/residual' claims"):
        formats.read_labels(str(path))


def archive_of(path: Path, name: str, data: bytes) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def test_tar_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "_SMALL_BYTES", 1 << 20)
    bomb = archive_of(tmp_path / "bomb.tgz", "a.png", bytes(4 << 20))
    with pytest.raises(BadData, match="claims"):
        open_source(str(bomb))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_tar_header_that_is_a_bomb_is_not_unpacked(
    kind: bytes, first: bool, tmp_path: Path
) -> None:
    """Sixty-four megabytes of it lie in the file as some kilobytes, and would be read whole."""
    bomb = tarfile.TarInfo("bomb")
    bomb.type, bomb.size = kind, 1 << 26
    with gzip.open(tmp_path / "bomb.tgz", "wb", 1) as stream:
        if not first:
            stream.write(tarfile.TarInfo("a.png").tobuf())
        stream.write(bomb.tobuf())
        stream.write(bytes(bomb.size))
    tracemalloc.start()
    try:
        with pytest.raises(BadData, match=r"a header claims 6\.7e\+07 bytes"):
            open_source(str(tmp_path / "bomb.tgz"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_tar_with_long_names_and_records_is_read(tmp_path: Path) -> None:
    image = made("png", tmp_path).read_bytes()
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / "long.tgz"
        with tarfile.open(path, "w:gz", format=form) as archive:
            member = tarfile.TarInfo("é" * 300 + ".png")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
        assert open_source(str(path)).keys == [member.name]


def test_member_with_a_path_out_of_the_tar_is_only_a_name(tmp_path: Path) -> None:
    image = made("png", tmp_path).read_bytes()
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    source = open_source(str(archive_of(folder / "images.tar", "../../out.png", image)))
    assert source.keys == ["../../out.png"] and source.image(0).shape == (20, 20, 3)
    assert not (tmp_path / "out.png").exists()


def test_postscript_in_an_image_starts_no_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would hand it to Ghostscript, whatever its name says."""
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("a program ran"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program ran"))
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "picture.png").write_bytes(text)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.format == "EPS"
    with pytest.raises(BadData, match="picture"):
        open_source(str(tmp_path)).image(0)


@pytest.mark.parametrize("suffix", ["png", "txt", "h5"])
def test_pipe_among_the_files_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    if suffix == "txt":
        os.mkfifo(tmp_path / "a.png")
        (tmp_path / "list.lst").write_text("a.png\n")
        with pytest.raises(BadData, match="not a regular file"):
            open_source(str(tmp_path / "list.lst")).image(0)
    elif suffix == "h5":
        with pytest.raises(BadData, match="a device or a pipe"):
            envelope.read_header(str(tmp_path / "pipe.h5"))
    else:
        with pytest.raises(BadData, match="no image in it"):
            open_source(str(tmp_path))


def test_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
        save(tmp_path / name, np.array([[Trap()]], dtype=object))  # type: ignore[operator]
        with pytest.raises(BadData), fuzz.open_scores(str(tmp_path / name)):
            pass
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("a.npy", b"cos\nsystem\n(S'touch sprung'\ntR.")
    with pytest.raises(BadData), fuzz.open_scores(str(tmp_path / "b.npz")):
        pass
    assert not (tmp_path / "sprung").exists()


# ---- load -------------------------------------------------------------------


class Entry:
    """A file in a folder that is not there."""

    def __init__(self, number: int) -> None:
        self.name = f"{number:08d}.png"

    def is_dir(self, follow_symlinks: bool) -> bool:
        return False

    def is_file(self) -> bool:
        return True


def test_listing_keeps_nothing_but_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`list(...)` of the folder would hold all entries at once."""
    alive = most = 0

    class Counted(Entry):
        def __init__(self, number: int) -> None:
            nonlocal alive, most
            super().__init__(number)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    @contextmanager
    def scandir(folder: str) -> Iterator[Iterator[Entry]]:
        yield (Counted(number) for number in range(5000))

    monkeypatch.setattr(sources.os, "scandir", scandir)
    names = sorted(sources._names("nowhere", Counter()))
    assert len(names) == 5000 and names[-1] == "00004999.png"
    assert most <= 2


def test_deep_folder_is_listed_to_its_end(tmp_path: Path) -> None:
    """Deeper than the interpreter's stack, and than the number of files it may have open."""
    depth = 1100
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("a.png", os.O_CREAT, dir_fd=here))
    os.close(here)
    try:
        assert open_source(str(tmp_path)).keys == ["d/" * depth + "a.png"]
    finally:
        # pytest clears old folders by recursion, and would end with an error here.
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_unreadable_folder_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("png", tmp_path)
    (tmp_path / "secret").mkdir()
    real = os.scandir

    def scandir(folder: str) -> Any:
        if folder.rstrip("/").endswith("secret"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(NoInput, match="secret"):
        open_source(str(tmp_path))


# ---- processes --------------------------------------------------------------


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `sela` is this checkout's."""
    tool = folder / "bin" / "sela"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from sela_cli.cli import main\nmain()\n"
    )
    tool.chmod(0o755)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env={**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (
            "schedule --epochs 9 --opts 9 > /dev/full",
            73,
            "standard output: No space left on device",
        ),
        (
            "schedule --epochs 9 --opts 9 --json > /dev/full",
            73,
            "standard output: No space left on device",
        ),
        ("schedule --epochs 9 --opts 9 >&-", 0, ""),
        ("info nothing.h5 2>&-", 66, ""),
        ("info nothing.h5 <&-", 66, "nothing.h5: no such file"),
    ],
)
def test_standard_streams_that_are_full_or_closed(
    line: str, code: int, told: str, tmp_path: Path
) -> None:
    done = shell(f"sela {line}", tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == (f"sela: {told}\n" if told else "")


def test_full_disk_ends_a_process_in_order(tmp_path: Path) -> None:
    """An older libhdf5 than that of the h5py required ends it by SIGSEGV, after the message."""
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).random((3000, 20), np.float32))
    assert shell("sela label scores.npy -o labels.h5", tmp_path).returncode == 0
    with room_for((tmp_path / "labels.h5").stat().st_size - 1):
        done = shell("sela label scores.npy -o more.h5", tmp_path)
    told = "sela: more.h5: File too large; free space, or write elsewhere\n"
    assert done.returncode == 73 and done.stderr.endswith(told), done.stderr
    assert not (tmp_path / "more.h5").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("sela la", {"label"}),
        ("sela re", {"retrain"}),
        ("sela label --assign ", {"balanced", "argmax", "random"}),
        ("sela run --pres", {"--preset"}),
    ],
)
def test_bash_completes_commands_options_and_values(
    words: str, wanted: set[str], tmp_path: Path
) -> None:
    """As the function does that `sela --show-completion bash` prints."""
    place = str(len(words.split(" ")) - 1)
    done = shell(
        "sela", tmp_path, _SELA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place
    )
    assert done.returncode == 0 and wanted <= set(done.stdout.split())


def test_many_readers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python tests/load.py` has a hundred."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    _, seen, codes = load.readers(16, tmp_path)
    assert codes == {0} and len(seen) == 1
    shown = json.loads(seen.pop())
    assert shown["digest"] == envelope.read_header(str(tmp_path / "labels.h5")).digest


def test_listing_is_measured(tmp_path: Path) -> None:
    """In a process of its own, whose peak is its own."""
    seconds, before, peak = load.listing(100, tmp_path)
    assert seconds > 0 and peak >= before > 0
    assert len(list((tmp_path / "photos").iterdir())) == 100


@pytest.mark.slow
def test_stages_work_through_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed to label to train, nothing but the last result on the disk."""
    data = "--data digits --limit 48 --device cpu -q"
    network = "--arch alexnet-small --image-size 16"
    embed = f"sela embed {data} {network} --heads 4x2"
    train = f"sela train {data} {network} --epochs 1 --batch-size 16 --labels"
    piped = shell(f"{embed} -o - | sela label - -q -o - | {train} - -o piped.h5", tmp_path)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "piped.h5"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupt, "listen", lambda: None)
    for line in (f"{embed} -o e.h5", "sela label e.h5 -q -o l.h5", f"{train} l.h5 -o named.h5"):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
    named = envelope.read_header(str(tmp_path / "named.h5"))
    assert envelope.read_header(str(tmp_path / "piped.h5")).digest == named.digest


@pytest.mark.slow
def test_stopped_at_any_file_operation_it_ends_with_the_same_digests() -> None:
    """`python tests/kill.py` does the same at random times, and more often."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kill.py", "--events", "--times=4", "--others=1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Six commands killed, and four of them asked to stop.
    assert done.stdout.count("the same") >= 6 + 4
    assert done.stdout.count(" stopped ") == 4 + 5 + 4


def test_record_keeps_the_other_sections(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("# Title\n\npreface\n")
    for title, text in (("A", "one"), ("B", "two"), ("A", "three")):
        record.section(path, title, text)
    words = path.read_text()
    assert words.startswith("# Title\n\npreface\n\n## A\n")
    assert words.index("three") < words.index("## B") < words.index("two")
    assert "one" not in re.findall(r"^\w+$", words, re.M)
