"""The download of FineWeb against a local hub, with every fault that the workshop page promises to survive."""

import errno
import hashlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest

from speedrun_lib import fetch
from speedrun_lib.data import DataError, find_shards, read_shard, write_demo
from speedrun_lib.fetch import check_folder, default_data_dir, fetch_fineweb, fineweb_names, shards_needed
from tests.hub import REPO, Fault, Hub, shard_bytes, wait_until

VAL, ONE, TWO, THREE = fineweb_names(3)
CHUNK = 16_384  # the library writes to disk in chunks; 10 MB in use, small here so that small shards have many
TOKENS = 100_000


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub with a validation shard and three training shards; the library set to it, with no other address reachable."
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import close_session

    files = {name: shard_bytes(TOKENS, seed) for seed, name in enumerate((VAL, ONE, TWO, THREE))}
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] == "127.0.0.1", f"a test must not talk to {address}"
        return connect(self, address)

    with Hub(files) as hub:
        for key in [key for key in os.environ if key.upper().endswith("_PROXY") or key.startswith("HF_")]:
            monkeypatch.delenv(key)
        for key, value in hub.env(tmp_path / "home").items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(socket.socket, "connect", connect_here)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
        close_session()  # a client made earlier may have kept a proxy from the environment
        yield hub
        close_session()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "fineweb10B"


def refused(folder, shards=1) -> str:
    "The one-line error of a fetch that must fail; no file may have got a shard's name without being good."
    with pytest.raises(DataError) as caught:
        fetch_fineweb(folder, shards)
    message = str(caught.value)
    assert "\n" not in message and 30 < len(message) < 400, message
    return message


def finished(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.bin"))


def leftovers(folder) -> list[Path]:
    return [path for path in (folder / ".partial").glob("*") if path.name != "lock"]


def same(folder, hub, *names) -> bool:
    return all((folder / name).read_bytes() == hub.files[name] for name in names)


# ---- the good case -------------------------------------------------------------------------------------------------

def test_one_shard_is_enough(hub, folder):
    lines = []
    summary = fetch_fineweb(folder, 1, lines.append)
    assert same(folder, hub, VAL, ONE) and finished(folder) == [ONE, VAL] and not leftovers(folder)
    assert (summary.files, summary.downloaded, summary.train_tokens, summary.val_tokens) == (2, 2, TOKENS, TOKENS)
    assert str(summary) == f"2 shards in {folder} (2 downloaded): 100,000 training tokens, 100,000 validation tokens"
    assert len(lines) == 3 and VAL in lines[1] and ONE in lines[2]
    assert [path.name for path in find_shards(folder, "train")] == [ONE]
    assert read_shard(folder / ONE)[0] == 50256


def test_what_the_hub_is_asked(hub, folder):
    fetch_fineweb(folder, 1)
    path = f"/datasets/{REPO}/resolve/main/"
    asked = [(seen.server, seen.method, seen.path.partition("?")[0]) for seen in hub.seen]
    expected = [("hub", "HEAD", path + name) for name in (VAL, ONE)]
    for name in (VAL, ONE):
        expected += [("hub", "GET", path + name), ("cdn", "GET", "/blobs/" + name)]
    assert asked == expected, "one look-up per file, then one download per file, and nothing of Xet"
    assert {seen.authorization for seen in hub.seen if seen.server == "hub"} == {"Bearer hf_of_the_test"}
    assert {seen.authorization for seen in hub.gets()} == {None}, "the token must not leave the hub"
    assert {seen.encoding for seen in hub.seen} == {"identity"}, "a compressed answer has no ranges"


def test_good_files_are_not_fetched_again(hub, folder):
    fetch_fineweb(folder, 1)
    before = (folder / ONE).stat().st_mtime_ns
    hub.seen.clear()
    assert fetch_fineweb(folder, 1).downloaded == 0 and hub.seen == []
    summary = fetch_fineweb(folder, 3)
    assert {seen.name for seen in hub.seen} == {TWO, THREE} and summary.downloaded == 2
    assert summary.train_tokens == 3 * TOKENS and (folder / ONE).stat().st_mtime_ns == before


def test_complete_folder_needs_no_hub_and_no_permission(hub, folder, monkeypatch):
    fetch_fineweb(folder, 1)
    shutil.rmtree(folder / ".partial")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert fetch_fineweb(folder, 1).downloaded == 0
    assert not (folder / ".partial").exists(), "nothing is written"


def test_progress_bar_of_the_library(hub, folder, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the library's switch for bars without a terminal
    fetch_fineweb(folder, 1)
    shown = capfd.readouterr().err
    assert f"{VAL}: 100%" in shown and f"{ONE}: 100%" in shown


@pytest.mark.parametrize("shards", [0, -1, 104])
def test_shards_out_of_range(hub, folder, shards):
    assert "1 to 103" in refused(folder, shards)
    assert hub.seen == [] and not folder.exists()


def test_names_and_folders(monkeypatch, tmp_path):
    names = fineweb_names(103)
    assert len(names) == 104 and names[0] == "fineweb_val_000000.bin" and names[-1] == "fineweb_train_000103.bin"
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert default_data_dir("fineweb10B") == tmp_path / "data" / "fineweb10B"
    monkeypatch.delenv("DATA_PATH")
    assert default_data_dir("demo_bytes") == Path("data/demo_bytes")


# ---- interruptions -------------------------------------------------------------------------------------------------

def test_one_cut_is_healed_within_the_call(hub, folder):
    hub.faults[ONE] = Fault(cut_at=3 * CHUNK + 100, cuts=1)
    fetch_fineweb(folder, 1)
    assert same(folder, hub, ONE)
    assert [seen.range for seen in hub.gets(ONE)] == [None, f"bytes={3 * CHUNK}-"]


def test_cut_connection_resumes_on_the_next_call(hub, folder):
    hub.faults[ONE] = Fault(cut_at=5 * CHUNK)
    message = refused(folder)
    assert hub.url in message and ONE in message and "same command again" in message
    assert finished(folder) == [VAL], "what came before the cut stays"
    assert [path.stat().st_size for path in leftovers(folder)] == [5 * CHUNK]
    hub.faults.clear()
    hub.seen.clear()
    lines = []
    fetch_fineweb(folder, 1, lines.append)
    assert same(folder, hub, VAL, ONE) and not leftovers(folder)
    assert [seen.range for seen in hub.gets()] == [f"bytes={5 * CHUNK}-"], "no byte is asked for twice"
    assert sum(seen.sent for seen in hub.gets()) == len(hub.files[ONE]) - 5 * CHUNK
    assert f"from byte {5 * CHUNK:,} on" in lines[1]


def test_complete_but_unverified_part_is_not_fetched_again(hub, folder):
    hub.faults[ONE] = Fault(cut_at=CHUNK)
    refused(folder)
    part, = leftovers(folder)
    part.write_bytes(hub.files[ONE])
    hub.seen.clear()
    fetch_fineweb(folder, 1)
    assert hub.gets() == [] and same(folder, hub, ONE)


def test_stalled_connection(hub, folder, monkeypatch):
    logger, warnings = logging.getLogger("huggingface_hub"), []
    monkeypatch.setattr(logger, "handlers", [types.SimpleNamespace(level=0, handle=warnings.append)])
    level = logger.level
    hub.faults[VAL] = Fault(stall_at=2 * CHUNK)
    message = refused(folder)
    assert warnings == [], "the library's warnings about its five attempts are not shown"
    assert logger.level == level
    assert "timed out" in message and VAL in message and finished(folder) == []
    assert leftovers(folder)[0].stat().st_size == 2 * CHUNK


@pytest.fixture
def ctrl_c():
    "Ctrl-C interrupts Python, also where the tests run in the background: a shell starts those with it ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_keeps_what_arrived(hub, folder, ctrl_c, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 120)  # nothing but the interrupt ends the wait
    hub.faults[VAL] = Fault(stall_at=2 * CHUNK)

    def press_ctrl_c():
        wait_until(lambda: any(path.stat().st_size == 2 * CHUNK for path in leftovers(folder)), 60)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        fetch_fineweb(folder, 1)
    presser.join()
    assert leftovers(folder)[0].stat().st_size == 2 * CHUNK and finished(folder) == []
    hub.faults.clear()
    hub.resume.set()
    fetch_fineweb(folder, 1)
    assert same(folder, hub, VAL, ONE) and hub.gets(VAL)[-1].range == f"bytes={2 * CHUNK}-"


SCRIPT = """
import sys
def only_here(event, args):
    if event == "socket.connect" and args[1][0] != "127.0.0.1":
        raise SystemExit(f"a test must not talk to {args[1]}")
sys.addaudithook(only_here)
from speedrun_lib.fetch import default_data_dir, fetch_fineweb
assert not any(name.startswith("huggingface_hub") for name in sys.modules), "the library is imported when it is used"
print(fetch_fineweb(default_data_dir("fineweb10B"), 1))
"""


def test_killed_process_resumes_in_the_next(tmp_path):
    "Two real processes that know the hub and the folder from their environment only; chunks of 10 MB as in use."
    big = shard_bytes(13_000_000)
    with Hub({VAL: shard_bytes(100), ONE: big}, {ONE: Fault(stall_at=25_000_000)}) as hub:
        environment = hub.env(tmp_path / "home") | {"DATA_PATH": str(tmp_path)}
        folder = tmp_path / "data" / "fineweb10B"
        first = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, start_new_session=True)
        try:
            wait_until(lambda: any(path.stat().st_size >= 20 * 2**20 for path in leftovers(folder)))
        finally:
            first.kill()  # no handler runs, as in a power cut
            first.wait()
        assert finished(folder) == [VAL]
        part, = leftovers(folder)
        have = part.stat().st_size
        assert have == 20 * 2**20
        hub.faults.clear()
        hub.seen.clear()
        second = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, text=True,
                                capture_output=True, timeout=60)
        assert second.returncode == 0, second.stderr
        assert [(seen.name, seen.range) for seen in hub.gets()] == [(ONE, f"bytes={have}-")]
        assert hub.gets()[0].sent == len(big) - have
        assert hashlib.sha256((folder / ONE).read_bytes()).digest() == hashlib.sha256(big).digest()
        assert "13,000,000 training tokens" in second.stdout and second.stderr == ""


# ---- bad content ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("content", "words"), [
    (shard_bytes(500, magic=1234), "magic"),
    (shard_bytes(500, version=7), "version 7"),
    (shard_bytes(500, count=600), "should have 2,224 bytes for its 600 tokens but has 2,024"),
    (shard_bytes(500, count=400), "should have 1,824 bytes"),
    (shard_bytes(500, count=-5), "should have"),
    (shard_bytes(500)[:-2], "should have 2,024 bytes"),
    (shard_bytes(0), "no tokens"),
    (shard_bytes(0)[:100], "too short"),
    (b"<html>", "too short"),
])
def test_hub_offers_a_bad_shard(hub, folder, content, words):
    good, hub.files[ONE] = hub.files[ONE], content
    message = refused(folder)
    assert words in message and ONE in message and "not kept" in message and ".partial" not in message
    assert finished(folder) == [VAL] and not leftovers(folder)
    hub.files[ONE] = good
    fetch_fineweb(folder, 1)
    assert same(folder, hub, ONE)


def test_byte_changed_on_the_way(hub, folder):
    hub.faults[ONE] = Fault(flip=30_000)
    message = refused(folder)
    assert "SHA-256" in message and finished(folder) == [VAL] and not leftovers(folder)
    hub.faults.clear()
    fetch_fineweb(folder, 1)
    assert same(folder, hub, ONE)


def test_hub_sends_less_than_announced(hub, folder):
    hub.faults[ONE] = Fault(drop_from=70_000)
    message = refused(folder)
    assert "did not arrive whole" in message and str(len(hub.files[ONE])) in message and "70000" in message
    assert finished(folder) == [VAL]
    message = refused(folder)
    assert "416" in message and "fewer bytes" in message, "the hub still has no more: the part is given up"
    assert not leftovers(folder)
    assert "did not arrive whole" in refused(folder)
    hub.faults.clear()
    fetch_fineweb(folder, 1)
    assert hub.gets(ONE)[-1].range == "bytes=70000-" and same(folder, hub, ONE), "an honest hub continues"


def test_part_longer_than_the_file(hub, folder):
    hub.faults[ONE] = Fault(cut_at=CHUNK)
    refused(folder)
    leftovers(folder)[0].write_bytes(bytes(len(hub.files[ONE]) + 1))
    hub.faults.clear()
    fetch_fineweb(folder, 1)
    assert same(folder, hub, ONE) and hub.gets(ONE)[-1].range is None


def test_new_version_on_the_hub_is_not_mixed_with_the_old(hub, folder):
    hub.faults[ONE] = Fault(cut_at=5 * CHUNK)
    refused(folder)
    hub.faults.clear()
    hub.files[ONE] = shard_bytes(TOKENS, seed=99)
    fetch_fineweb(folder, 1)
    assert hub.gets(ONE)[-1].range is None and same(folder, hub, ONE) and not leftovers(folder)


def test_server_without_ranges(hub, folder):
    hub.faults[ONE] = Fault(cut_at=5 * CHUNK)
    refused(folder)
    hub.faults[ONE] = Fault(ignore_range=True)
    fetch_fineweb(folder, 1)
    assert same(folder, hub, ONE), "the whole file arrives again and replaces the part"


@pytest.mark.parametrize("content", [b"", b"abcde", shard_bytes(50, version=2), shard_bytes(50)[:-1]])
def test_bad_file_in_place_is_left_alone(hub, folder, content):
    folder.mkdir(parents=True)
    (folder / ONE).write_bytes(content)
    message = refused(folder)
    assert str(folder / ONE) in message and ("delete it" in message or "download it again" in message)
    assert (folder / ONE).read_bytes() == content and hub.seen == [] and finished(folder) == [ONE]


def test_several_bad_files_and_a_folder_in_place(hub, folder):
    (folder / ONE).mkdir(parents=True)
    (folder / VAL).write_bytes(b"")
    assert VAL in refused(folder) and "1 more" in refused(folder)
    (folder / VAL).unlink()
    assert str(folder / ONE) in refused(folder) and hub.seen == []


# ---- the hub and the network ---------------------------------------------------------------------------------------

def test_missing_shard_is_found_before_anything_is_fetched(hub, folder):
    del hub.files[TWO]
    message = refused(folder, 3)
    assert "404" in message and TWO in message and "fewer shards" in message
    assert hub.gets() == [] and finished(folder) == []


def test_unreachable_hub(hub, folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    message = refused(folder)
    assert address in message and "HF_ENDPOINT" in message and "network" in message and VAL in message


def test_endpoint_is_read_at_every_call(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")  # the library was imported with another one long ago
    fetch_fineweb(folder, 1)
    for nonsense in ("huggingface", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "http://[127"):
        monkeypatch.setenv("HF_ENDPOINT", nonsense)
        assert f"HF_ENDPOINT={nonsense.rstrip('/')} is not a web address" in refused(folder, 2)
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert fetch.hub_endpoint() == "https://huggingface.co"


def test_not_a_hub(hub, folder):
    hub.faults[VAL] = Fault(plain_web=True)
    assert "not like a Hugging Face hub" in refused(folder)


@pytest.mark.parametrize(("status", "words"), [
    (401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "no such file"), (429, "few minutes"), (500, "later"), (503, "later")])
def test_status_of_the_hub(hub, folder, status, words):
    hub.faults[VAL] = Fault(status=status)
    message = refused(folder)
    assert f"answered {status} for {VAL}" in message and words in message


def test_offline_mode(hub, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(folder) and hub.seen == []


# ---- the local disk ------------------------------------------------------------------------------------------------

@pytest.fixture
def full_disk(tmp_path):
    "A folder on a disk of 320 KB: room for one shard of 201 KB and a part of the second."
    small = tmp_path / "small"
    small.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(small)], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield small
    subprocess.run(["umount", str(small)], check=True)


def test_too_little_space_is_seen_before_the_download(hub, full_disk):
    message = refused(full_disk / "data", 1)
    assert "2 shards need 402kB" in message and re.search(r"only [\d.]+kB are free", message)
    assert hub.gets() == []


def test_disk_that_fills_up_on_the_way(hub, full_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**12))
    folder = full_disk / "data"
    message = refused(folder)
    assert "disk is full" in message and str(folder) in message and finished(folder) == [VAL]
    part, = leftovers(folder)
    assert part.read_bytes() == hub.files[ONE][: part.stat().st_size] and part.stat().st_size >= CHUNK
    have = part.stat().st_size
    (folder / VAL).unlink()  # somebody makes room
    hub.seen.clear()
    hub.files[VAL] = shard_bytes(100)
    fetch_fineweb(folder, 1)
    assert same(folder, hub, VAL, ONE) and hub.gets(ONE)[0].range == f"bytes={have}-"


def test_disk_that_fills_up_without_root(hub, folder, monkeypatch):
    "The same through /dev/full, which every user can write to and which always answers `no space left`."
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    hub.faults[VAL] = Fault(cut_at=CHUNK)
    refused(folder)
    part, = leftovers(folder)
    part.unlink()
    part.symlink_to("/dev/full")
    hub.faults.clear()
    assert "disk is full" in refused(folder) and finished(folder) == []


def test_space_counts_what_is_there(hub, folder, monkeypatch):
    hub.faults[ONE] = Fault(cut_at=9 * CHUNK)
    refused(folder)
    hub.faults.clear()
    rest = len(hub.files[ONE]) - 9 * CHUNK
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=rest - 1))
    assert "1 shards need" in refused(folder) or "need" in refused(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=rest))
    fetch_fineweb(folder, 1)


@pytest.fixture
def closed_folder():
    "A folder that may be read but not written, seen by an ordinary user: root gives its rights away for the test."
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    closed = base / "closed"
    closed.mkdir()
    (closed / VAL).write_bytes(shard_bytes(100))
    closed.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield closed
    if root:
        os.seteuid(0)
    closed.chmod(0o755)
    shutil.rmtree(base)


def test_no_permission(hub, closed_folder, tmp_path):
    for folder in (closed_folder, closed_folder / "fineweb10B"):
        message = refused(folder)
        assert f"cannot write to {folder}: no permission" in message and "DATA_PATH" in message
    assert hub.seen == []
    if os.getuid() == 0:  # a folder of somebody else that may not even be looked into
        assert "no permission" in refused(tmp_path / "data")


def test_file_that_may_not_be_read(hub, closed_folder):
    euid = os.geteuid()
    os.seteuid(os.getuid())
    (closed_folder / VAL).chmod(0o000)
    os.seteuid(euid)
    assert f"{closed_folder / VAL} cannot be read" in refused(closed_folder)
    rows, problems = check_folder(closed_folder)
    assert rows == [] and "cannot be read" in problems[0]


def test_folder_that_is_a_file(hub, tmp_path):
    (tmp_path / "file").write_text("something")
    message = refused(tmp_path / "file")
    assert "cannot write" in message and os.strerror(errno.ENOTDIR) in message


def test_two_processes_in_one_folder(hub, folder):
    from huggingface_hub.utils import WeakFileLock

    (folder / ".partial").mkdir(parents=True)
    with WeakFileLock(folder / ".partial" / "lock"):
        assert "another process" in refused(folder) and hub.seen == []
    fetch_fineweb(folder, 1)
    assert same(folder, hub, VAL, ONE)


# ---- looking at a folder, and how many shards ------------------------------------------------------------------------

def test_check_folder_reports_every_bad_shard(tmp_path):
    good = {"fineweb_val_000000.bin": shard_bytes(100), "fineweb_train_000001.bin": shard_bytes(1_100_000),
            "fineweb_train_000002.bin": shard_bytes(100)[:1024] + shard_bytes(100)[1026:] + b"\1\1"}
    bad = {"fineweb_train_000003.bin": (shard_bytes(100, magic=5), "magic"),
           "fineweb_train_000004.bin": (shard_bytes(100)[:-2], "should have"),
           "fineweb_train_000005.bin": (b"", "too short"),
           "fineweb_train_000006.bin": (shard_bytes(0), "no tokens"),
           "fineweb_train_000007.bin": (shard_bytes(100).replace(b"\x50\xc4", b"\x51\xc4"), "50257"),
           "fineweb_train_000008.bin": (shard_bytes(100).replace(b"\x50\xc4", b"\x4f\xc4"), "no document token"),
           "fineweb_train_000009.bin": (shard_bytes(100, version=3), "version 3")}
    for name, content in (good | {name: content for name, (content, _) in bad.items()}).items():
        (tmp_path / name).write_bytes(content)
    rows, problems = check_folder(tmp_path)
    assert [row["shard"] for row in rows] == sorted(good)
    by_name = {row["shard"]: row for row in rows}
    assert by_name["fineweb_train_000001.bin"] == {
        "shard": "fineweb_train_000001.bin", "tokens": 1_100_000, "document token": 50256, "starts a document": True,
        "documents in the first million": 20_000}
    assert by_name["fineweb_train_000002.bin"]["starts a document"] is False, "documents run over shard borders"
    assert len(problems) == len(bad)
    for (name, (_, word)), problem in zip(bad.items(), problems, strict=True):
        assert name in problem and word in problem and "\n" not in problem


def test_check_folder_as_a_whole(tmp_path):
    rows, problems = check_folder(tmp_path / "nothing")
    assert rows == [] and len(problems) == 2 and "no train shards" in problems[0] and "no val shards" in problems[1]
    write_demo(tmp_path / "demo", "bytes")
    rows, problems = check_folder(tmp_path / "demo")
    assert problems == [] and {row["document token"] for row in rows} == {256}
    (tmp_path / "demo" / "fineweb_train_000001.bin").write_bytes(shard_bytes(1000))
    rows, problems = check_folder(tmp_path / "demo")
    assert len(rows) == 3 and len(problems) == 1 and "mixes" in problems[0]


def test_shards_needed():
    assert shards_needed(364_380_160) == 5, "record 82; the original fetches nine"
    assert shards_needed(1) == shards_needed(77_000_000) == 1 and shards_needed(77_000_001) == 2
    assert shards_needed(100_000_000, kept=1.0) == 1 and shards_needed(100_000_001, kept=1.0) == 2
    assert shards_needed(10**12) == 103
    assert fineweb_names(shards_needed(10_255_073_280))[-1] == "fineweb_train_000103.bin"
