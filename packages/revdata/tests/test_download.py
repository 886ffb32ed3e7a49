"""Downloads against real servers that misbehave, and by several processes."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import revdata
from revdata import DamagedDataError, MissingDataError, download
from revdata.download import fetch

CONTENT = np.random.default_rng(0).bytes(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, in the ways that the server's attributes say."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        content, start = server.content, 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            sent = start + server.shift
            self.send_header("Content-Range", f"bytes {sent}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:stop])
        self.wfile.flush()
        server.began.set()
        if stop < len(content):
            server.release.wait(20)
            self.close_connection = True

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Attributes: what is served, whether ranges are, and what goes wrong in turn."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.shift = 0  # of the range that the answer claims
        self.errors = []  # status of the first answers
        self.cuts = []  # bytes after which the next connections end
        self.asked = []  # the Range of each request
        self.began = threading.Event()  # something was sent
        self.release = threading.Event()  # a cut connection may end
        self.release.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "_FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "new" / "file.bin"


def part_of(destination):
    return destination.with_name("file.bin.part")


def files(destination):
    return sorted(path.name for path in destination.parent.iterdir())


def check_whole(destination):
    assert destination.read_bytes() == CONTENT
    assert files(destination) == [".file.bin.lock", "file.bin"]


def test_a_file_comes_whole(server, destination, capsys):
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == [None]
    shown = capsys.readouterr().err
    assert server.url in shown
    assert "100%" in shown
    assert "1.00M/1.00M" in shown


def test_what_is_there_is_not_fetched_again(server, destination):
    fetch(server.url, destination, SHA256)
    fetch(server.url, destination, SHA256)
    assert len(server.asked) == 1


def test_cut_connections_go_on_where_they_stopped(server, destination):
    server.cuts = [300_000, 0, 200_000, 1]
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    starts = ["bytes=300000-", "bytes=300000-", "bytes=500000-", "bytes=500001-"]
    assert server.asked == [None, *starts]


def test_a_host_that_ignores_ranges_sends_all_again(server, destination):
    server.cuts, server.ranges = [300_000], False
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == [None, "bytes=300000-"]


def test_a_host_that_sends_another_range_is_asked_for_all(server, destination):
    server.cuts, server.shift = [300_000], 5
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == [None, "bytes=300000-", None]


@pytest.mark.parametrize("status", [500, 502, 503, 408, 429])
def test_a_host_in_trouble_is_asked_again(server, destination, status):
    server.errors = [status] * 4
    fetch(server.url, destination, SHA256)
    check_whole(destination)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 5)])
def test_a_host_that_refuses_is_given_up(server, destination, status, requests):
    server.errors = [status] * 9
    with pytest.raises(MissingDataError, match=rf"cannot download .*{status}.* mirror"):
        fetch(server.url, destination, SHA256)
    assert len(server.asked) == requests
    assert files(destination) == [".file.bin.lock"]


def test_a_host_that_never_gets_further_is_given_up_and_the_rest_comes_later(server, destination):
    server.cuts = [400_000, *[0] * 20]
    with pytest.raises(MissingDataError, match=r"ended after 400,000 of 1,000,000 bytes.*goes on"):
        fetch(server.url, destination, SHA256)
    assert part_of(destination).read_bytes() == CONTENT[:400_000]
    server.cuts, server.asked = [], []
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == ["bytes=400000-"]


def test_a_silent_host_runs_into_the_timeout(server, destination, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.05)
    server.cuts = [100_000]
    server.release.clear()
    fetch(server.url, destination, SHA256)
    check_whole(destination)


def test_nobody_listening_is_an_error(destination):
    with Server() as gone:
        url = gone.url
    with pytest.raises(MissingDataError, match="refused"):
        fetch(url, destination, SHA256)


@pytest.mark.parametrize("url", ["nonsense", "gopher://nowhere/file.bin", "http://"])
def test_what_is_no_url_is_an_error(destination, url):
    with pytest.raises(MissingDataError, match="cannot download"):
        fetch(url, destination, SHA256)


def test_wrong_bytes_are_refused_and_leave_nothing_behind(server, destination):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(DamagedDataError, match=r"not the official file .*another mirror"):
        fetch(server.url, destination, SHA256)
    assert len(server.asked) == 1
    assert files(destination) == [".file.bin.lock"]


@pytest.mark.parametrize(
    "piece",
    [b"x" * 300_000, CONTENT + b"x", b"x" * len(CONTENT)],
    ids=["of another file", "too long", "as long"],
)
def test_a_piece_that_does_not_fit_is_thrown_away(server, destination, piece):
    destination.parent.mkdir()
    part_of(destination).write_bytes(piece)
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == [f"bytes={len(piece)}-", None]


def test_a_whole_piece_is_verified_and_renamed(server, destination):
    destination.parent.mkdir()
    part_of(destination).write_bytes(CONTENT)
    fetch(server.url, destination, SHA256)
    check_whole(destination)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_named(server, destination):
    destination.parent.mkdir()
    part_of(destination).symlink_to("/dev/full")
    with pytest.raises(MissingDataError, match=r"cannot write .*No space left.*make room"):
        fetch(server.url, destination, SHA256)
    assert len(server.asked) == 1  # another try would not help


@pytest.mark.skipif(not Path("/sys").exists(), reason="a folder where nobody may write")
def test_a_folder_that_cannot_be_written_is_named(server):
    with pytest.raises(MissingDataError, match=r"cannot write /sys/revdata/file\.bin"):
        fetch(server.url, Path("/sys/revdata/file.bin"), SHA256)
    assert server.asked == []


def test_a_file_in_place_of_the_folder_is_named(server, destination):
    destination.parent.write_text("")
    with pytest.raises(MissingDataError, match="cannot write"):
        fetch(server.url, destination, SHA256)


def start_process(server, destination):
    """Fetches in a process of its own."""
    code = "import sys, pathlib; from revdata.download import fetch; "
    code += "fetch(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])"
    return subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(destination), SHA256],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_download_once(server, destination):
    server.cuts = [300_000]
    server.release.clear()
    first = start_process(server, destination)
    assert server.began.wait(60)
    second = start_process(server, destination)
    for line in second.stderr:
        if "waiting for another process" in line:
            break
    server.release.set()
    assert first.wait(60) == second.wait(60) == 0
    check_whole(destination)
    assert server.asked == [None, "bytes=300000-"]


def test_a_killed_process_blocks_nobody_and_loses_nothing(server, destination):
    server.cuts = [300_000]
    server.release.clear()
    process = start_process(server, destination)
    assert server.began.wait(60)
    part = part_of(destination)
    while not (part.exists() and part.stat().st_size >= 4 * 65_536):
        assert process.poll() is None
    process.kill()
    process.wait(60)
    kept = part.stat().st_size
    server.release.set()
    fetch(server.url, destination, SHA256)
    check_whole(destination)
    assert server.asked == [None, f"bytes={kept}-"]


def test_load_downloads_from_a_server(official, server, tmp_path):
    server.content = official.packed
    server.cuts = [1000]
    mirror = server.url.removesuffix("/file.bin")
    loaded = revdata.load(official.name, "test", root=tmp_path, download=True, mirror=mirror)
    assert len(loaded)
    assert server.asked == [None, "bytes=1000-"]
