"""Where data sets come from: registry, proof of bytes, downloads, archives, TCIA. Independent references: hashlib, zipfile, a local server."""
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.data import datasets as ds
from medimg.data import derived, downloads, registry, tcia
from medimg.errors import ChecksumError, DatasetError

ROOT = Path(__file__).resolve().parents[1]


def npz_bytes(n=(6, 3, 4), shape=(5, 5), seed=0, compress=True, **changed):
    """A tiny MedMNIST-style file."""
    rng = np.random.default_rng(seed)
    parts = {}
    for split, k in zip(ds.SPLITS, n):
        parts[f"{split}_images"] = rng.integers(0, 256, (k, *shape), dtype="uint8")
        parts[f"{split}_labels"] = rng.integers(0, 2, (k, 1)).astype("uint8")
    parts.update(changed)
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **parts)
    return file.getvalue()


def info_for(content, url="https://example.org/tiny.npz", **more):
    return ds.DatasetInfo("tiny", "binary", ("no", "yes"), (5, 5), (6, 3, 4), url, hashlib.md5(content).hexdigest(), **more)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty MEDIMG_DATA folder and an empty cache; no waiting between attempts."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("MEDIMG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDIMG_OFFLINE", raising=False)
    monkeypatch.setattr(time, "sleep", lambda s: None)
    ds._UNREACHABLE.clear()
    return tmp_path / "data"


class Server:
    """A loopback server of `content`: `cuts` lists after how many bytes the first answers break off; `seen` lists (Range, If-Range)."""

    def __init__(self, content, *, cuts=(), ranges=True, status=200, etag=None, to=None, length=True):
        self.content, self.cuts, self.etag, self.seen, outer = content, list(cuts), etag, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted, mark = self.headers.get("Range"), self.headers.get("If-Range")
                outer.seen.append((wanted, mark))
                if to:
                    self.send_response(302)
                    self.send_header("Location", to)
                    return self.end_headers()
                if status != 200:
                    return self.send_error(status)
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and ranges and mark in (None, outer.etag) else 0
                if wanted and ranges and start >= len(outer.content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.content) - 1}/{len(outer.content)}")
                if outer.etag:
                    self.send_header("ETag", outer.etag)
                if length:
                    self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start:outer.cuts.pop(0) if outer.cuts else None])

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/files/tiny.npz?download=1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


# ---------------------------------------------------------------- registry

def test_registry_is_complete():
    assert len(ds.REGISTRY) == 71
    for name, info in ds.REGISTRY.items():
        assert info.name == name and info.licence and info.citation and info.task in ds.TASKS and info.kind in registry.KINDS
        assert all(u.startswith("https://") for u in (info.url, info.page, *(p[1] for p in info.parts)) if u)
        assert info.verified == "never" or info.verified[:2] == "20" and (info.md5 or info.sha256)
        for digest, size in ((info.md5, 32), (info.sha256, 64), *((p[2], 32) for p in info.parts)):
            assert digest is None or len(digest) == size and int(digest, 16) >= 0
        if info.kind in ("user", "tcia", "derived"):
            assert info.how and info.page


def test_registry_says_what_medmnist_says():
    """Against facts printed in the MedMNIST v2 paper (table 2), not against the file that the registry is read from."""
    rows = {n: i for n, i in ds.REGISTRY.items() if "mnist" in n}
    assert len(rows) == 12 * 4 + 6 * 2 and len({i.md5 for i in rows.values()}) == 60 and len({i.url for i in rows.values()}) == 60
    paper = {"pathmnist": (9, 107180), "chestmnist": (14, 112120), "dermamnist": (7, 10015), "octmnist": (4, 109309), "pneumoniamnist": (2, 5856),
             "retinamnist": (5, 1600), "breastmnist": (2, 780), "bloodmnist": (8, 17092), "tissuemnist": (8, 236386), "organmnist3d": (11, 1742),
             "nodulemnist3d": (2, 1633), "adrenalmnist3d": (2, 1584), "fracturemnist3d": (3, 1370), "vesselmnist3d": (2, 1908), "synapsemnist3d": (2, 1759)}
    assert {n: (len(rows[n].classes), sum(rows[n].counts)) for n in paper} == paper
    assert rows["organmnist3d-64"].shape == (64, 64, 64) and rows["pathmnist-224"].shape == (224, 224, 3) and rows["octmnist-128"].shape == (128, 128)
    assert all(np.prod(i.shape) * sum(i.counts) < i.max_bytes for i in rows.values())


# ---------------------------------------------------------------- proof of bytes

def test_official_mirror_and_stranger(site):
    content = npz_bytes()
    info, file = info_for(content), site / "deep" / "er" / "tiny.npz"
    assert ds.find_dataset(info) is None
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert ds.find_dataset(info).provenance == "official file, MD5 verified ($MEDIMG_DATA/deep/er/tiny.npz)"
    other = npz_bytes(seed=1)
    file.write_bytes(other)
    with pytest.raises(ChecksumError, match="SHA256SUMS"):
        ds.find_dataset(info)
    digest = hashlib.sha256(other).hexdigest()
    for folder, line in ((file.parent, f"{digest}  tiny.npz"), (site / "deep", f"{digest.upper()} *er/tiny.npz"), (site, f"{digest}  ./deep/er/tiny.npz")):
        sums = folder / "SHA256SUMS"
        sums.write_text(f"# list\n{'0' * 64}  another.npz\n{line}\n")
        assert "mirror" in ds.find_dataset(info).provenance
        sums.unlink()
    (site / "SHA256SUMS").write_text(f"{'0' * 64}  ./deep/er/tiny.npz\n")
    with pytest.raises(ChecksumError, match="does not match"):
        ds.load_dataset(info)


def test_a_list_outside_the_data_folder_does_not_count(site):
    content = npz_bytes()
    (site / "tiny.npz").write_bytes(content)
    (site.parent / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  data/tiny.npz\n")
    with pytest.raises(ChecksumError):
        ds.find_dataset(ds.DatasetInfo("tiny", "binary", ("n", "y"), (5, 5), url="https://example.org/tiny.npz", md5="0" * 32))


@pytest.mark.parametrize("content, word", [
    (b"", "BadZip|EOF|empty"), (b"not a zip", "read"), (npz_bytes()[:300], "read"), (npz_bytes(n=(6, 3, 5)), "test"), (npz_bytes(shape=(5, 6)), "train"),
    (npz_bytes(train_labels=np.zeros((2, 1), "uint8")), "labels"), (npz_bytes(val_images=np.array([{}], dtype=object)), "pickle|Object"),
    (npz_bytes(train_images=np.zeros((6, 5, 5), "float32")), "float32"), (npz_bytes(train_labels=np.full((6, 1), 7, "uint8")), "0 to 1")])
def test_damaged_or_other_files(site, content, word):
    (site / "tiny.npz").write_bytes(content)
    with pytest.raises(DatasetError, match=word):
        ds.load_dataset(info_for(content))


def test_missing_part_and_bombs(site):
    file = io.BytesIO()
    np.savez(file, train_images=np.zeros((6, 5, 5), "uint8"))
    with pytest.raises(DatasetError, match="no train_labels"):
        ds.read_npz(file, info_for(b""))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", b"\0" * (1 << 22))
    with pytest.raises(DatasetError, match="unpacked"):
        ds.read_npz(bomb, info_for(b"", max_bytes=1 << 20))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 60,)})
    parts = {f"{s}_{k}": header.getvalue() for s in ds.SPLITS for k in ("images", "labels")}
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        for name, value in parts.items():
            archive.writestr(f"{name}.npy", value)
    with pytest.raises(DatasetError):
        ds.read_npz(lying, info_for(b""))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_byte_gives_a_set_or_a_typed_error(place, value):
    content = bytearray(npz_bytes())
    content[place % len(content)] = value
    with contextlib.suppress(DatasetError):
        assert len(ds.read_npz(io.BytesIO(bytes(content)), info_for(b""))["images"]) == 13


# ---------------------------------------------------------------- download

def left_in(site):
    """What lies in the cache's folder of downloads."""
    return sorted(p.name for p in (site.parent / "cache/datasets").iterdir())


def test_download_right(site):
    content = npz_bytes()
    with Server(content) as server:
        d = ds.load_dataset(info_for(content, server.url), data="real", quiet=True)
        assert len(d) == 13 and "official file" in d.source and "$MEDIMG_CACHE/datasets/tiny.npz" in d.source
        ds.load_dataset(info_for(content, server.url), data="real", quiet=True)
    assert server.seen == [(None, None)]      # the second time it came from the cache
    assert left_in(site) == ["tiny.npz"]


def test_download_wrong_checksum_keeps_nothing(site):
    content = npz_bytes()
    with Server(npz_bytes(seed=1)) as server, pytest.raises(ChecksumError, match="published checksum"):
        ds.load_dataset(info_for(content, server.url), quiet=True)
    assert left_in(site) == []


@pytest.mark.parametrize("ranges, etag, second", [(True, '"v1"', ("bytes=150000-", '"v1"')), (True, None, ("bytes=150000-", None)),
                                                  (False, None, ("bytes=150000-", None)), (True, 'W/"v1"', ("bytes=150000-", None))])
def test_download_goes_on_after_a_break(site, ranges, etag, second):
    content = npz_bytes(compress=False, padding=np.zeros(200_000, "uint8"))
    with Server(content, cuts=[150_000], ranges=ranges, etag=etag) as server:
        assert ds.fetch(info_for(content, server.url), progress=False).read_bytes() == content
    assert server.seen == [(None, None), second]
    assert left_in(site) == ["tiny.npz"]


def test_download_goes_on_in_a_later_call(site):
    content = np.random.default_rng(0).bytes(400_000)
    with Server(content, cuts=[100_000] * 4) as server:
        with pytest.raises(DatasetError, match="not on this computer.*400000 bytes") as error:
            ds.fetch(info_for(content, server.url), progress=False)
        assert server.url in str(error.value) and "tiny.npz" not in left_in(site) and "tiny.npz.part" in left_in(site)
        server.cuts.clear()
        assert ds.fetch(info_for(content, server.url), progress=False).read_bytes() == content


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_two_versions_are_never_glued(site, etag):
    """No published checksum: only the version mark can tell that the file changed between two calls."""
    old, new = np.random.default_rng(0).bytes(300_000), np.random.default_rng(1).bytes(300_000)
    with Server(old, cuts=[200_000] * 4, etag=etag) as server:
        with pytest.raises(DatasetError, match="again"):
            downloads.download(server.url, site / "set.bin", progress=False)
        assert (site / "set.bin.part").stat().st_size == 200_000
        server.content, server.etag, server.seen = new, etag and '"v2"', []
        server.cuts.clear()
        assert downloads.download(server.url, site / "set.bin", progress=False).read_bytes() == new
        assert server.seen == [("bytes=200000-", '"v1"') if etag else (None, None)]


def test_download_stale_part_starts_again(site):
    content = npz_bytes()
    part = site.parent / "cache/datasets/tiny.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (len(content) + 5))
    with Server(content) as server:
        assert ds.fetch(info_for(content, server.url), progress=False).read_bytes() == content
    assert server.seen == [(f"bytes={len(content) + 5}-", None), (None, None)]      # 416, then anew


@pytest.mark.parametrize("status, tries", [(404, 1), (403, 1), (429, 4), (503, 4)])
def test_download_refused(site, status, tries):
    with Server(b"", status=status) as server, pytest.raises(DatasetError, match=f"{status}.*MEDIMG_DATA"):
        ds.load_dataset(info_for(npz_bytes(), server.url), data="real")
    assert len(server.seen) == tries


@pytest.mark.parametrize("length", [True, False])
def test_download_too_large(site, length):
    content = npz_bytes()
    with Server(content, length=length) as server, pytest.raises(DatasetError, match="believed|bytes came"):
        downloads.download(server.url, site / "tiny.npz", max_bytes=100, progress=False)
    assert not (site / "tiny.npz").exists()


@pytest.mark.parametrize("to, word", [("http://example.org/a", "only https"), ("ftp://127.0.0.1/a", "only https"), ("file:///etc/passwd", "not allowed")])
def test_a_redirect_to_another_scheme_is_refused(site, to, word):
    with Server(b"x", to=to) as server, pytest.raises(DatasetError, match=word):
        downloads.download(server.url, site / "a", progress=False)


def test_redirects_on_this_machine_are_followed_but_not_for_ever(site):
    with Server(b"abc") as last, Server(b"", to=last.url) as first:
        assert downloads.download(first.url, site / "a", progress=False).read_bytes() == b"abc"
    with Server(b"", to="/again") as loop, pytest.raises(DatasetError, match="redirect"):
        downloads.download(loop.url, site / "b", progress=False)


@pytest.mark.parametrize("url", ["http://example.org/a", "file:///etc/passwd", "ftp://example.org/a", "a.npz", "http://127.0.0.1.example.org/a"])
def test_other_schemes_are_refused(site, url):
    with pytest.raises(DatasetError, match="only https"):
        downloads.download(url, site / "a")


def test_two_processes_do_not_write_one_part(site):
    fcntl = pytest.importorskip("fcntl", reason="file locks are POSIX; remedy: none needed elsewhere")
    with open(site / "a.part.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Server(b"abc") as server, pytest.raises(DatasetError, match="another process"):
            downloads.download(server.url, site / "a", progress=False)


# ---------------------------------------------------------------- archives

def zip_of(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return file.getvalue()


def tar_of(*entries):
    """entries: (name, content, type)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, value, kind in entries:
            entry = tarfile.TarInfo(name)
            entry.size, entry.type, entry.linkname = len(value), kind, "../x" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(entry, io.BytesIO(value))
    return file.getvalue()


@pytest.mark.parametrize("content", [zip_of(**{"a/b.txt": b"1", "c.txt": b"22"}),
                                     tar_of(("a", b"", tarfile.DIRTYPE), ("a/b.txt", b"1", tarfile.REGTYPE), ("c.txt", b"22", tarfile.REGTYPE))])
def test_extract(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    folder = downloads.extract(tmp_path / "x", tmp_path / "out")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.txt")} == {"a/b.txt": b"1", "c.txt": b"22"}
    with pytest.raises(DatasetError, match="exists"):
        downloads.extract(tmp_path / "x", tmp_path / "out")


def _zip_link():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        entry = zipfile.ZipInfo("door")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc")
    return file.getvalue()


@pytest.mark.parametrize("content, word", [
    (zip_of(**{"ok": b"1", "../evil": b"x"}), "outside"), (zip_of(**{"/etc/evil": b"x"}), "outside"), (zip_of(**{"a\\..\\..\\evil": b"x"}), "outside"),
    (zip_of(**{"C:/evil": b"x"}), "outside"), (_zip_link(), "link"), (tar_of(("../evil", b"x", tarfile.REGTYPE)), "outside"),
    (tar_of(("door", b"", tarfile.SYMTYPE)), "link"), (tar_of(("door", b"", tarfile.LNKTYPE)), "link"), (tar_of(("dev", b"", tarfile.CHRTYPE)), "device"),
    (tar_of(("pipe", b"", tarfile.FIFOTYPE)), "device"), (zip_of(zeros=bytes(1 << 22)), "believed"), (tar_of(("zeros", bytes(1 << 22), tarfile.REGTYPE)), "believed"),
    (tar_of(*[(f"f{i}", b"", tarfile.REGTYPE) for i in range(60)]), "more than 50"), (zip_of(a=b"1")[:-30], "cannot be unpacked"),
    (tar_of(("a", bytes(np.random.default_rng(0).bytes(5000)), tarfile.REGTYPE))[:2000], "cannot be unpacked"), (b"neither", "cannot be unpacked"),
    (tar_of(("a", b"1", tarfile.REGTYPE), ("a", b"2", tarfile.REGTYPE)), "cannot be unpacked")])
def test_bad_archives_leave_nothing(tmp_path, content, word):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_bytes(content)
    with pytest.raises(DatasetError, match=word):
        downloads.extract(tmp_path / "in/x", tmp_path / "in/out", max_bytes=1 << 20, max_files=50)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x"] and not (tmp_path / "in/out").exists()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_flipped_byte_in_an_archive(tmp_path_factory, place, value, tar):
    content = bytearray(tar_of(("a/b", b"12345" * 40, tarfile.REGTYPE)) if tar else zip_of(**{"a/b": b"12345" * 40}))
    content[place % len(content)] = value
    home = tmp_path_factory.mktemp("flip") / "in"
    home.mkdir()
    (home / "x").write_bytes(bytes(content))
    with contextlib.suppress(DatasetError):
        downloads.extract(home / "x", home / "out", max_bytes=1 << 16)
    assert not [p for p in home.parent.rglob("*") if p.is_file() and not p.is_relative_to(home / "out") and p.name != "x"]


def test_fetch_of_an_archive_without_published_checksum(site):
    """It is unpacked, its first checksum is recorded, and other bytes under its name are noticed."""
    content = zip_of(**{"Set/benign/a.png": b"1"})
    with Server(content) as server:
        info = ds.DatasetInfo("lesions", "binary", ("a", "b"), (), url=server.url.replace("tiny.npz", "Set.zip"), kind="archive")
        folder = ds.fetch(info, progress=False)
        assert (folder / "Set/Set/benign/a.png").read_bytes() == b"1" and ds.fetch(info, progress=False) == folder
    assert len(server.seen) == 1
    archive = folder.parent / "Set.zip"
    assert hashlib.sha256(content).hexdigest() in (archive.parent / "SHA256SUMS").read_text()
    assert "publishes no checksum" in ds.verify_file(archive, info)
    archive.write_bytes(content + b"x")
    with pytest.raises(ChecksumError):
        ds.verify_file(archive, info)


def test_fetch_of_several_archives_goes_on(site):
    parts = [tar_of((f"images/{i}.png", bytes([i]), tarfile.REGTYPE)) for i in range(2)]
    with Server(parts[0]) as one, Server(b"something else") as two:
        info = ds.DatasetInfo("films", "multilabel", ("a",), (), kind="archive",
                              parts=tuple((f"images_{i}.tar.gz", s.url, hashlib.md5(p).hexdigest()) for i, (s, p) in enumerate(zip((one, two), parts))))
        with pytest.raises(ChecksumError):
            ds.fetch(info, progress=False)
        two.content = parts[1]
        folder = ds.fetch(info, progress=False)
    assert sorted(p.name for p in folder.rglob("*.png")) == ["0.png", "1.png"] and len(one.seen) == 1


@pytest.mark.parametrize("name, word", [("rsna-pneumonia", "import_rsna"), ("busi-128", "data_scripts/busi.py"), ("phantom-cxr", "load_dataset")])
def test_what_cannot_be_fetched_says_how(site, name, word):
    with pytest.raises(DatasetError, match=word):
        ds.fetch(name)


@pytest.mark.parametrize("name", ["nih-cxr14", "lidc-idri", "rsna-pneumonia", "busi"])
def test_folders_of_files_are_not_loaded_as_arrays(site, name):
    with pytest.raises(DatasetError, match="folder of files"):
        ds.load_dataset(name, data="real")


def test_large_sets_are_not_downloaded_unasked(site, monkeypatch):
    monkeypatch.setattr(ds, "fetch", lambda *a, **k: pytest.fail("it was downloaded"))
    assert ds.load_dataset("chestmnist-224", n=4, quiet=True).name == "phantom-cxr"
    with pytest.raises(DatasetError, match="no phantom stands in"):
        ds.load_dataset("nodulemnist3d-64", quiet=True)


# ---------------------------------------------------------------- derived sets

def test_facts_of_the_derived_sets(data_root):
    """Numbers of the data folder's README, and the official box list, read here by other means."""
    nih = ds.load_dataset("nih-cxr-1000", data="real", quiet=True)
    assert np.bincount(nih.labels).tolist() == [500, 500] and "SHA-256 verified" in nih.source and str(data_root) not in nih.source
    ap = nih.meta["view"] == "AP"
    assert [round(ap[nih.labels == k].mean(), 2) for k in (1, 0)] == [0.45, 0.68]
    assert all(derived.patient_fold(p) == f for p, f in zip(nih.patient_ids.tolist(), nih.meta["fold"].tolist()))
    busi = ds.load_dataset("busi-128", data="real", quiet=True)
    assert np.bincount(busi.labels).tolist() == [133, 437, 210] and busi.meta["interval"] == "image-level"
    twins = [sorted(busi.meta["image_name"][rows]) for rows in busi.duplicates()]
    assert ["benign (433)", "malignant (145)"] in twins
    lungs = ds.load_dataset("cxr-lungs-256", data="real", quiet=True)
    assert len(lungs) == 582 and set(lungs.meta["fold"][lungs.splits == "test"]) == {3} and not (lungs.meta["fold"][lungs.splits != "test"] == 3).any()
    assert lungs.masks.dtype == np.uint8 and (lungs.masks.reshape(582, -1).max(axis=1) == 1).all()
    for d in (nih, lungs):
        sets = [set(d.patient_ids[d.splits == s].tolist()) for s in ds.SPLITS]
        assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert all(len(set(busi.splits[busi.meta["group"] == g])) == 1 for g in set(busi.meta["group"].tolist()))


def test_other_tasks_of_the_derived_sets(data_root):
    many = ds.load_dataset("nih-cxr-1000", data="real", task="multilabel", quiet=True)
    table = {r["image_name"]: r for r in csv.DictReader(open(data_root / "nih_cxr/nih_pneumonia1000_128_meta.csv"))}
    for name, row in zip(many.meta["image_name"].tolist(), many.labels.tolist()):
        assert {c for c, v in zip(many.classes, row) if v} == set(table[name]["finding_labels"].split("|")) - {"No Finding"}
    found = ds.load_dataset("nih-cxr-1000", data="real", task="detection", quiet=True)
    official = {}
    for r in csv.reader(open(data_root / "nih_cxr/BBox_List_2017.csv")):
        if r[1] == "Pneumonia":
            official.setdefault(r[0], []).append([float(v) for v in r[2:6]])
    assert len(found) == 543 and found.labels.sum() == 43
    for name, boxes, label in zip(found.meta["image_name"].tolist(), found.boxes, found.labels.tolist()):
        known = [[(b[0] + b[2]) * 4, (b[1] + b[3]) * 4] for b in boxes.tolist() if b[0] == b[0]]      # centres at 1024 pixels
        assert bool(known) == bool(label)
        wanted = [[y + h / 2, x + w / 2] for x, y, w, h in official.get(name, [])] if label else []
        np.testing.assert_allclose(sorted(known), sorted(wanted), atol=0.01)
    lesions = ds.load_dataset("busi-128", data="real", task="segmentation", quiet=True)
    assert (lesions.labels == (lesions.masks.reshape(780, -1).max(axis=1) > 0)).all() and np.bincount(lesions.labels).tolist() == [133, 647]
    with pytest.raises(DatasetError, match="known: binary, detection, multilabel"):
        ds.load_dataset("nih-cxr-1000", data="real", task="nonsense")


def png(path, array):
    """Written by Pillow, so that the reader under test is not its own reference."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def official_nih(home, n=12):
    rng = np.random.default_rng(0)
    rows, images = [], {}
    for i in range(n):
        name, label = f"{i:08d}_000.png", "Edema|Pneumonia" if i % 3 == 0 else "No Finding" if i % 3 == 1 else "Hernia"
        images[name] = rng.integers(0, 256, (1024, 1024), dtype="uint8")
        png(home / f"images_{i % 2:03d}" / "images" / name, images[name])
        rows.append(f"{name},{label},0,{i},{50 + i},{'MF'[i % 2]},{'AP' if i % 2 else 'PA'},2682,2749,0.143,0.143")
    (home / "Data_Entry_2017_v2020.csv").write_text("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],"
                                                    "OriginalImagePixelSpacing[x,y]\n" + "\n".join(rows) + "\n")
    (home / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000003_000.png,Pneumonia,512,256,64,128,,,\n99999999_000.png,Mass,1,2,3,4,,,\n")
    return images


def test_derive_nih_from_the_source_s_form(tmp_path, site):
    images = official_nih(tmp_path / "nih")
    made = derived.derive_nih(tmp_path / "nih", per_class=3)
    assert made["label"].tolist() == [1, 1, 1, 0, 0, 0] and all("Pneumonia" in t for t in made["finding_labels"][:3])
    for name, small in zip(made["image_name"].tolist(), made["images"]):
        assert np.abs(images[name].reshape(128, 8, 128, 8).mean(axis=(1, 3)) - small).max() <= 0.5
    assert made["fold"].tolist() == [int(hashlib.sha256(p.encode()).hexdigest(), 16) % 5 for p in made["patient_id"].tolist()]
    named = derived.derive_nih(tmp_path / "nih", names=["00000003_000.png", "00000001_000.png"])
    assert named["image_name"].tolist() == ["00000003_000.png", "00000001_000.png"] and named["bbox_index"].tolist() == [0]
    np.testing.assert_array_equal(named["bbox_xywh_1024"], [[512, 256, 64, 128]])
    info = ds.dataset_info("nih-cxr-1000")
    path = derived.write_derived("nih-cxr-1000", named, site)
    got = downloads.read_arrays(path, ["image_name"], info)
    assert got["image_name"].tolist() == named["image_name"].tolist() and "mirror" in downloads.find_dataset(info).provenance
    with pytest.raises(DatasetError, match="not in the table"):
        derived.derive_nih(tmp_path / "nih", names=["x.png"])
    (tmp_path / "nih/images_001/images/00000001_000.png").unlink()
    with pytest.raises(DatasetError, match="1 images are missing"):
        derived.derive_nih(tmp_path / "nih", names=["00000001_000.png"])


def test_derive_lungs_from_the_source_s_form(tmp_path):
    film = np.random.default_rng(0).integers(0, 256, (60, 80), dtype="uint8")
    side = np.zeros((60, 80), "uint8")
    side[:, :40] = 255
    png(tmp_path / "m/MontgomerySet/CXR_png/MCUCXR_0001_0.png", film)
    png(tmp_path / "m/MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png", side)
    png(tmp_path / "m/MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png", np.where(np.arange(80) > 59, 255, 0)[None].repeat(60, 0).astype("uint8"))
    png(tmp_path / "s/ChinaSet_AllFiles/CXR_png/CHNCXR_0327_1.png", film)
    png(tmp_path / "s/ChinaSet_AllFiles/CXR_png/CHNCXR_0002_0.png", film)      # has no mask
    png(tmp_path / "k/mask/CHNCXR_0327_1_mask.png", side)
    made = derived.derive_lungs(tmp_path / "m", tmp_path / "s", tmp_path / "k", size=20)
    assert made["names"].tolist() == ["CHNCXR_0327_1", "MCUCXR_0001_0"] and made["tb_label"].tolist() == [1, 0]
    assert made["source"].tolist() == ["CHNCXR", "MCUCXR"] and made["patient_id"].tolist() == ["CHNCXR_0327", "MCUCXR_0001"]
    assert made["masks"].sum(axis=(1, 2)).tolist() == [200, 300]
    np.testing.assert_allclose(made["images"][0], film.reshape(20, 3, 20, 4).mean(axis=(1, 3)), atol=0.51)
    with pytest.raises(DatasetError, match="its mask"):
        derived.derive_lungs(tmp_path / "m", tmp_path / "s", tmp_path / "k", names=["CHNCXR_0002_0"])


def official_busi(home):
    rng = np.random.default_rng(0)
    for c, n in (("normal", 2), ("benign", 11), ("malignant", 1)):
        for i in range(1, n + 1):
            png(home / f"Dataset_BUSI_with_GT/{c}/{c} ({i}).png", rng.integers(0, 256, (32, 48, 3), dtype="uint8"))
            png(home / f"Dataset_BUSI_with_GT/{c}/{c} ({i})_mask.png", np.zeros((32, 48), bool))
    return home


def test_the_script_of_busi_converts_writes_and_compares(tmp_path, site, capsys, data_root):
    official_busi(tmp_path / "full")
    spec = importlib.util.spec_from_file_location("busi_script", ROOT / "data_scripts/busi.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main_of("busi-128", [str(tmp_path / "full"), "--out", str(site)]) == 0
    out = capsys.readouterr().out
    assert "14 images" in out and "CC0" in out and "Al-Dhabyani" in out and "no file to compare with" in out
    again = ds.load_dataset("busi-128", quiet=True)
    assert len(again) == 14 and "mirror" in again.source and sorted(np.bincount(again.labels).tolist()) == [1, 2, 11]
    assert script.main_of("busi-128", [str(tmp_path / "full"), "--out", str(site)]) == 0
    assert "'labels': {'equal': 1.0}" in capsys.readouterr().out
    (tmp_path / "full/Dataset_BUSI_with_GT/benign/benign (11)_mask.png").unlink()
    assert script.main_of("busi-128", [str(tmp_path / "full")]) == 2 and "benign (11) has no mask" in capsys.readouterr().err


def test_names_and_order_of_busi_are_those_of_the_file(data_root, tmp_path):
    """The conversion gives names, labels and order as the file has them; which filter it used is not known."""
    with np.load(data_root / "busi/busi_128.npz") as file:
        names, labels, sizes = file["names"], file["labels"], file["orig_hw"]
    for name, (h, w) in zip(names.tolist(), sizes.tolist()):
        png(tmp_path / name.split()[0] / f"{name}.png", np.zeros((h // 8, w // 8), "uint8"))
        png(tmp_path / name.split()[0] / f"{name}_mask.png", np.zeros((h // 8, w // 8), bool))
    made = derived.derive_busi(tmp_path, size=4)
    assert (made["names"] == names).all() and (made["labels"] == labels).all() and (made["orig_hw"] == sizes // 8).all()


# ---------------------------------------------------------------- The Cancer Imaging Archive

class Archive(Server):
    """NBIA's two addresses; `change` alters what a series' archive holds."""

    def __init__(self, rows, change=lambda files: files):
        super().__init__(b"")
        outer = self

        def do_GET(handler):
            outer.seen.append(handler.path.split("?")[0])
            body = json.dumps(rows).encode()
            if "getImageWithMD5Hash" in handler.path:
                files = {f"1-{i}.dcm": bytes([65 + i]) * 99 for i in range(3)}
                sums = "Filename,MD5Hash\n" + "".join(f"{n},{hashlib.md5(b).hexdigest().upper()}\n" for n, b in files.items())
                body = zip_of(**change({**files, "md5hashes.csv": sums.encode()}))
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(body)

        self.server.RequestHandlerClass.do_GET = do_GET
        self.url = f"http://127.0.0.1:{self.server.server_port}/"


def series(*names, size=300):
    return [{"SeriesInstanceUID": f"1.2.{i}", "PatientID": n, "Modality": "CT", "ImageCount": 3, "FileSize": size} for i, n in enumerate(names)]


LUNGS = ds.DatasetInfo("lungs", "detection", ("nodule",), (), kind="tcia", source="LUNGS")


def test_tcia_fetches_what_is_missing_only(tmp_path, site):
    with Archive(series("B", "A", "A")) as server:
        tcia.fetch_collection(LUNGS, tmp_path / "l", patients=1, base=server.url, progress=False)
        assert sorted(p.relative_to(tmp_path / "l").as_posix() for p in (tmp_path / "l").rglob("*.dcm")) == [f"A/1.2.{s}/1-{i}.dcm" for s in (1, 2) for i in range(3)]
        tcia.fetch_collection(LUNGS, tmp_path / "l", base=server.url, progress=False)
    assert server.seen.count("/getImageWithMD5Hash") == 3
    assert not [p for p in (tmp_path / "l").rglob("*") if p.name.startswith(".") or p.suffix in (".zip", ".part", ".lock")]


@pytest.mark.parametrize("change", [
    lambda f: {**f, "1-1.dcm": b"x" + f["1-1.dcm"][1:]}, lambda f: {k: v for k, v in f.items() if k != "1-1.dcm"}, lambda f: {**f, "1-9.dcm": b"x"},
    lambda f: {k: v for k, v in f.items() if k != "md5hashes.csv"}, lambda f: {"md5hashes.csv": b"Filename,MD5Hash\n"}])
def test_tcia_refuses_what_was_not_published(tmp_path, site, change):
    with Archive(series("A"), change) as server, pytest.raises(ChecksumError):
        tcia.fetch_collection(LUNGS, tmp_path / "l", base=server.url, progress=False)
    assert not [p for p in (tmp_path / "l").rglob("*") if p.is_file()] and not (tmp_path / "l/A/1.2.0").exists()


@pytest.mark.parametrize("rows, word", [
    (series("../../etc"), "cannot be a folder"), ([{"SeriesInstanceUID": "../1", "PatientID": "A"}], "cannot be a folder"), (series(".."), "cannot be a folder"),
    ([], "knows no such series"), ({"error": 1}, "no list"), ([1, 2], "no list"), (series("A", size=10**18), "the disk has")])
def test_tcia_bad_lists(tmp_path, site, rows, word):
    with Archive(rows) as server, pytest.raises(DatasetError, match=word):
        tcia.fetch_collection(LUNGS, tmp_path / "l", base=server.url, progress=False)


def test_tcia_addresses_are_those_of_tcia_utils():
    """tcia_utils 3.3 (nbia.setApiUrl): host nbia, version 4; getSeries and getImageWithMD5Hash."""
    assert tcia.NBIA == "https://nbia.cancerimagingarchive.net/nbia-api/services/v4/"
    assert {n: ds.REGISTRY[n].source for n in ("nsclc-radiomics", "lidc-idri")} == {"nsclc-radiomics": "NSCLC-Radiomics", "lidc-idri": "LIDC-IDRI"}
