"""`course data get` against a small local hub that cuts connections, serves wrong bytes, and knows no file."""
import gzip
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from course import data

BODY = b"".join(json.dumps({"text": f"line {i} " + "x" * 200}).encode() + b"\n" for i in range(2000))
COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The three headers and the Range requests that huggingface_hub relies on."""

    body, claimed, cut_at, requests = BODY, hashlib.sha256(BODY).hexdigest(), None, []

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head: bool):
        if "missing" in self.path or "/resolve/" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if not head:
            Hub.requests.append(start)
        self.send_response(206 if start else 200)
        tag = f'"{self.claimed}"'
        for key, value in (("ETag", tag), ("X-Linked-ETag", tag), ("X-Repo-Commit", COMMIT),
                           ("X-Linked-Size", len(self.body)), ("Content-Length", len(self.body) - start),
                           ("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")):
            self.send_header(key, str(value))
        self.end_headers()
        if head:
            return
        if Hub.cut_at and len(Hub.requests) == 1:
            self.wfile.write(self.body[: Hub.cut_at])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(self.body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A fresh hub on a free port of this machine."""
    Hub.body, Hub.claimed, Hub.cut_at, Hub.requests = BODY, hashlib.sha256(BODY).hexdigest(), None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the other tests run offline
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


def entry(path="train.jsonl", sha256=None, rows=None):
    file = {"repo": "someone/texts", "revision": "main", "path": path, "stage": "pretrain", "size": len(BODY), "sha256": sha256, "rows": rows}
    return {"about": "a test", "licence": "none", "files": [file]}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.open(folder / "pretrain/train.jsonl.gz", "rt")]


def test_downloads_checks_and_converts(hub, tmp_path):
    folder = data.get("texts", entry(), tmp_path)
    assert len(lines(folder)) == 2000 and not (folder / "raw").exists()


def test_a_cut_connection_is_resumed_not_repeated(hub, tmp_path):
    hub.body = BODY * 40  # 18 MB: the library keeps whole pieces of 10 MB
    hub.claimed = hashlib.sha256(hub.body).hexdigest()
    hub.cut_at = 14_000_000
    folder = data.get("texts", entry(rows=2000), tmp_path)
    assert len(lines(folder)) == 2000
    assert hub.requests[0] == 0 and hub.requests[-1] > 0, f"the second request starts again: {hub.requests}"


def test_wrong_bytes_are_refused_and_deleted(hub, tmp_path):
    hub.claimed = "0" * 64
    with pytest.raises(data.DownloadError, match="sha256"):
        data.get("texts", entry(), tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not left, "nothing of the wrong file may remain"


def test_the_manifests_sha256_outranks_the_hubs(hub, tmp_path):
    with pytest.raises(data.DownloadError, match="wanted " + "1" * 64):
        data.get("texts", entry(sha256="1" * 64), tmp_path)


def test_without_the_check_wrong_bytes_would_pass(hub, tmp_path, monkeypatch):
    hub.claimed = "0" * 64
    monkeypatch.setattr(data, "sha256_of", lambda path: "0" * 64)  # the safeguard removed
    assert len(lines(data.get("texts", entry(), tmp_path))) == 2000


def test_a_missing_file_says_what_to_do(hub, tmp_path):
    with pytest.raises(data.DownloadError, match="HF_ENDPOINT"):
        data.get("texts", entry(path="missing.jsonl"), tmp_path)


def test_a_full_disk_is_seen_before_the_download(hub, tmp_path, monkeypatch):
    usage = data.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: usage._replace(free=len(BODY)))
    with pytest.raises(data.DownloadError, match="are free"):
        data.get("texts", entry(), tmp_path)
    assert hub.requests == []


def test_a_second_get_downloads_nothing(hub, tmp_path):
    data.get("texts", entry(), tmp_path)
    before = list(hub.requests)
    data.get("texts", entry(), tmp_path)
    assert hub.requests == before


def test_rows_limits_the_conversion(hub, tmp_path):
    assert len(lines(data.get("texts", entry(rows=10), tmp_path))) == 10


def test_a_broken_line_names_file_and_line_and_leaves_nothing(hub, tmp_path):
    hub.body = b'{"text": "good"}\n{"text": \n'
    hub.claimed = hashlib.sha256(hub.body).hexdigest()
    with pytest.raises(data.DownloadError, match=r"train\.jsonl:2"):
        data.get("texts", entry(), tmp_path)
    assert not list(tmp_path.rglob("pretrain/*.gz"))


def test_parquet_rows_become_conversations_and_preferences(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    other = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": chat, "chosen": chat, "rejected": other}, {"messages": None, "chosen": chat, "rejected": chat}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for stage, wanted in (("sft", {"conversations": chat}), ("dpo", {"chosen": chat, "rejected": other})):
        assert data.convert(tmp_path / "rows.parquet", tmp_path / f"{stage}.gz", stage, None) == (1, 1)
        assert json.loads(gzip.open(tmp_path / f"{stage}.gz", "rt").read()) == wanted


def test_the_shipped_manifest_is_complete():
    sets = data.load_manifest(data.ROOT / "data/manifest.yaml")
    stages = {file["stage"] for file in sets["english"]["files"]}
    assert stages == {"pretrain", "sft", "dpo"} and {"minimind", "fineweb-edu"} <= set(sets)


def test_a_misspelled_key_is_named(tmp_path):
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("x: {about: a, license: b, files: []}")
    with pytest.raises(ValueError, match="license"):
        data.load_manifest(manifest)


def test_an_unknown_name_lists_the_known_ones(capsys):
    from course.__main__ import main

    assert main(["data", "get", "nothing"]) == 2
    assert "minimind" in capsys.readouterr().err
