"""Laws of bulk work on URLs: what is behind one is what a folder would hold."""

from __future__ import annotations

import functools
import http.server
import json
import os
import platform
import subprocess
import sys
import threading

import pytest
from test_bulk import as_tar, contents, encoded, photos, tokenizer  # noqa: F401

from monobath import UserError
from monobath.data.bulk import claimed, finish, run_shard
from monobath.data.bulk_decoding import BulkDecoding, DecodingWork
from monobath.data.bulk_encoding import BulkEncoding, EncodingWork
from monobath.data.folders import open_folder

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def remote():
    """A folder behind a URL; the files of memory:// are this process's own."""
    yield "memory://bucket/latents"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def copied(url: str) -> dict[str, bytes]:
    folder = open_folder(url)
    names = sorted(name for name in folder.names() if name not in (".lock", "done", "partial"))
    return dict(zip(names, folder.read(names), strict=True))  # type: ignore[arg-type]


def test_a_url_holds_what_a_folder_would_however_often_it_was_interrupted(tokenizer, photos, tmp_path, remote):  # noqa: F811
    whole = contents(encoded(tokenizer, photos, tmp_path / "whole"))
    work = EncodingWork(tokenizer, str(photos), remote, BulkEncoding(pictures_a_shard=3, batch=2))
    with claimed(work) as missing:
        assert missing == [0, 1, 2]
        run_shard(work, 1)
        assert run_shard(work, 1).again
        with pytest.raises(UserError, match="is being written by another command"), claimed(work):
            pass
    with claimed(work) as missing:
        assert missing == [0, 2]
        assert not any(run_shard(work, number).error for number in missing)
        finish(work)
    assert copied(remote) == whole
    assert not work.folder.names() & {".lock", "done", "partial"}

    pictures = []
    for number, (source, out) in enumerate([(tmp_path / "whole", tmp_path / "back"), (remote, f"{remote}-back")]):
        decoding = DecodingWork(tokenizer, source, out, BulkDecoding(batch=2))
        with claimed(decoding) as missing:
            assert not any(run_shard(decoding, n).error for n in missing)
            finish(decoding)
        pictures.append(copied(out) if number else contents(out))
    assert pictures[0] == pictures[1]


def test_a_lock_outlives_its_process_only_where_nobody_can_tell(tokenizer, photos, remote):  # noqa: F811
    work = EncodingWork(tokenizer, str(photos), remote, BulkEncoding())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for host, process in ((platform.node(), ended.pid), (platform.node(), os.getpid()), ("elsewhere", ended.pid)):
        text = json.dumps({"host": host, "process": process, "key": ""})
        fsspec.filesystem("memory").pipe_file("/bucket/latents/.lock", text.encode())
        if host == "elsewhere":
            with pytest.raises(UserError, match=r"process \d+ on elsewhere.* delete memory://bucket/latents/.lock"):
                claimed(work).__enter__()
        else:
            with claimed(work) as missing:
                assert missing == [0]


@pytest.mark.parametrize(("out", "message"), [
    ("https://x.org/latents", "write to a folder, and upload it"), ("hf://datasets/a/b", "upload it"),
    ("nowhere://x", "nowhere://x cannot be used"),
])  # fmt: skip
def test_urls_that_cannot_be_written_to(tokenizer, photos, out, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        EncodingWork(tokenizer, str(photos), out, BulkEncoding())


def test_a_signed_address_is_what_it_is_without_its_signature(tokenizer, photos, tmp_path):  # noqa: F811
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    as_tar(photos, tmp_path / "served/a.tar")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        out = encoded(tokenizer, f"{url}?Signature=one", tmp_path / "out")
        before = contents(out)
        assert json.loads((out / "latents.json").read_text())["counts"] == [7]
        assert contents(encoded(tokenizer, f"{url}?Signature=two", out)) == before
        assert contents(encoded(tokenizer, url, tmp_path / "other")) == before
        with pytest.raises(UserError, match=r"absent.tar is not there: check the source"):
            encoded(tokenizer, url.replace("a.tar", "absent.tar?Signature=two"), tmp_path / "none")
        server.shutdown()
