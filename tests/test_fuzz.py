"""Broken files of every kind we read: a result or a typed one-line error, in bounded time and memory; the hunter itself is tested on parsers that are bad on purpose."""
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import fuzz  # noqa: E402  (tools/fuzz.py)

from medimg.errors import DicomError, MedimgError, printable  # noqa: E402

MUTANTS = 5000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The good files that mutants are made of."""
    return fuzz.seeds(tmp_path_factory.mktemp("seeds"))


def test_five_thousand_mutants_give_a_result_or_a_typed_error(artefacts):
    """In a child process with a limit on its address space; a fault names the mutant, and `python tools/fuzz.py --start N --mutants 1 --keep` makes it again."""
    found = fuzz.hunt(mutants=MUTANTS, out=artefacts / "fuzz")
    total = sum(found["counts"].values())
    print("\n".join(f"{n:>6}  {name}" for name, n in found["counts"].items()), f"\n{total} mutants in {found['seconds']} s; slowest {found['slowest']}", sep="\n")
    assert not found["faults"], "\n".join(map(str, found["faults"][:20]))
    assert total == MUTANTS
    parsers = {name.split(":")[0] for name in found["counts"]}
    assert len(parsers) >= 15, parsers
    for verdict in ("read", "refused"):         # mutants that are all refused, or all read, would test nothing
        assert sum(n for name, n in found["counts"].items() if name.endswith(verdict)) > MUTANTS / 10


def test_every_seed_is_read_by_some_parser(files, tmp_path):
    """A seed that nothing reads would make mutants that test only the front door."""
    readers, unread = fuzz.parsers(), []
    for name, (kind, data) in files.items():
        if "bomb" in name or "nested" in name or name in ("many.zip", "deep.json", "numbers.json"):
            continue
        path = tmp_path / (name if "." in name else f"{name}.dcm")
        path.write_bytes(data)
        if "read" not in [fuzz.judge(function, path)[0] for _, function in readers[kind]]:
            unread.append(name)
    assert not unread
    assert {"dicom", "rtstruct", "seg", "picture", "nifti", "npy", "npz", "csv", "zip", "preprocess", "manifest", "bundle", "encrypted"} <= {kind for kind, _ in files.values()}


def test_a_mutant_is_its_number(files):
    again = dict(reversed(files.items()))
    made = [fuzz.mutant(n, 0, files) for n in range(80)]
    assert made == [fuzz.mutant(n, 0, again) for n in range(80)] and made != [fuzz.mutant(n, 1, files) for n in range(80)]
    assert {o for _, _, done, _ in (fuzz.mutant(n, 0, files) for n in range(400)) for o in done} >= {
        "flip", "truncate", "grow", "cut", "number_bomb", "length_bomb", "vr_swap", "tag_swap", "nest", "syntax_lie", "header_lie", "number_in_text"}


def test_elements_are_those_of_pydicom():
    import pydicom
    path = get_testdata_file("CT_small.dcm")
    ours = [int.from_bytes(Path(path).read_bytes()[at:at + 2], "little") << 16 | int.from_bytes(Path(path).read_bytes()[at + 2:at + 4], "little")
            for at, *_ in fuzz.elements(Path(path).read_bytes())]
    ds = pydicom.dcmread(path)
    assert ours == [int(e.tag) for e in ds.file_meta] + [int(e.tag) for e in ds]


class Talkative(DicomError):
    """An error that does not shorten its message."""

    def __str__(self):
        return "x" * 500


@pytest.mark.parametrize("raised, verdict", [(None, "read"), (DicomError("bad"), "refused"), (ValueError("x"), "untyped"), (Talkative("x"), "message"),
                                             (RecursionError(), "untyped"), (MemoryError(), "untyped")])
def test_the_judge_tells_good_from_bad(raised, verdict):
    def parser(path):
        if raised:
            raise raised
    assert fuzz.judge(parser, Path("x"))[0] == verdict


BAD = """
import os, sys
sys.path.insert(0, {tools!r})
import fuzz
WHAT = {{3: lambda: os.kill(os.getpid(), 11), 5: lambda: os._exit(0), 7: lambda: b'x' * (300 << 20), 9: lambda: 1 / 0}}
def parsers():
    calls = iter(range(10**9))
    def bad(path):
        WHAT.get(int(path.read_bytes()), lambda: 0)()
    return {{"dicom": [("bad", bad)]}}
fuzz.parsers, fuzz.seeds = parsers, lambda folder: {{"x.dcm": ("dicom", b"0")}}
fuzz.mutant = lambda number, seed, files: ("x.dcm", "dicom", [], str(number).encode())
sys.exit(fuzz.main())
"""


def test_the_hunter_survives_crashes_and_names_their_mutants(tmp_path, monkeypatch):
    """A parser that is killed at 3, leaves at 5, bloats at 7 and divides by zero at 9: four faults, and all the others are judged."""
    script = tmp_path / "bad.py"
    script.write_text(BAD.format(tools=str(ROOT / "tools")))
    monkeypatch.setattr(fuzz, "__file__", str(script))
    found = fuzz.hunt(mutants=12, out=tmp_path / "kept")
    assert {f["number"]: f["fault"] for f in found["faults"]} == {3: "crash", 5: "crash", 7: "memory", 9: "untyped"}
    assert found["mutants"] == 12 and found["counts"]["bad: read"] == 8
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["7.dcm", "9.dcm"]


def test_a_hang_is_a_fault(tmp_path, monkeypatch):
    script = tmp_path / "slow.py"
    script.write_text(BAD.format(tools=str(ROOT / "tools")).replace("lambda: os._exit(0)", "lambda: __import__('time').sleep(600)").replace("3: lambda: os.kill(os.getpid(), 11), ", ""))
    monkeypatch.setattr(fuzz, "__file__", str(script))
    monkeypatch.setattr(fuzz, "WALL_S", 2.0)
    found = fuzz.hunt(mutants=3, start=4)
    assert [(f["number"], f["fault"]) for f in found["faults"]] == [(5, "hang")] and found["mutants"] == 3


# ---- properties --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def readers():
    return fuzz.parsers()


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=600), prefix=st.sampled_from([b"", bytes(128) + b"DICM", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"MEDIMGE1", b"\x93NUMPY\x01\x00", b"{", b"n+1\0"]))
def test_any_bytes_at_all(readers, raw, prefix):
    """No parser of any kind does anything but read or refuse."""
    suffixes = {"picture": ".png", "nifti": ".nii", "npy": ".npy", "npz": ".npz", "csv": ".csv", "zip": ".zip", "preprocess": ".json", "manifest": ".json", "bundle": ".medimg", "encrypted": ".enc"}
    with tempfile.TemporaryDirectory() as folder:
        for kind, functions in readers.items():
            path = Path(folder) / f"x{suffixes.get(kind, '.dcm')}"
            path.write_bytes(prefix + raw)
            for name, function in dict(functions).items():
                verdict, said = fuzz.judge(function, path)
                assert verdict in ("read", "refused"), (kind, name, said)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=300), st.text(max_size=80), st.text(max_size=80))
def test_a_message_is_one_printable_line_whatever_was_in_the_file(what, path, remedy):
    said = str(MedimgError(what, path=path, remedy=remedy))
    assert len(said) <= 400 and len(said.splitlines()) <= 1 and printable(said) == said == said.encode().decode()
