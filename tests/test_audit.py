"""The audit log: an independent verifier agrees, every tampering is found, writers share one file, and kill -9 leaves an account of itself."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medimg.deployment import audit, chain
from medimg.deployment.audit import AuditError, AuditLog, verify
from medimg.errors import ConfigError

KEY, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
EVENT = {"action": "result.read", "actor": "dr.wu", "outcome": "ok"}
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def no_fsync(monkeypatch):
    """Durability is not what a property test measures."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write_log(path, count, head=None):
    log = AuditLog(path, KEY, head=head)
    log.write_many([{**EVENT, "count": i} for i in range(count)])
    return log


def fresh(tmp_path):
    """A folder of its own for each example of a property."""
    folder = tmp_path / os.urandom(6).hex()
    folder.mkdir()
    return folder


# ---- an independent verifier ---------------------------------------------------------------------------------------------------
def independent_macs(path, key):
    """The chain worked out again from the text of the file by OpenSSL's HMAC (through `cryptography`), not by the package."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.hmac import HMAC
    before = ""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        body = json.dumps([record["n"], record["t"], record["e"], before], sort_keys=True, separators=(",", ":"))
        code = HMAC(key.encode(), hashes.SHA256())
        code.update(b"medimg-audit-line\0" + body.encode())
        before = code.finalize().hex()
        yield before == record["m"]


def test_an_independent_hmac_agrees(tmp_path):
    log = write_log(tmp_path / "a.jsonl", 5)
    assert list(independent_macs(log.path, KEY)) == [True] * 6
    assert not any(independent_macs(log.path, OTHER))
    assert oct(log.path.stat().st_mode & 0o777) == "0o600"


# ---- what may be written ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("event", [
    {"action": "login", "patient": "x"}, {"action": "login", "actor": "DOE^JANE"}, {"action": "login", "actor": "Jane Doe"},
    {"action": "login", "reason": "a\nb"}, {"action": "login", "study": "1.2.840.113619.2.1"}, {"action": "login", "status": "200"},
    {"action": "login", "status": True}, {"action": "login", "outcome": ["ok"]}, {"action": "Log In"}, {"actor": "dr.wu"}, {}, {"action": "x" * 41},
    {"action": "login", "peer": "::1\n"}, {"action": "login", "log": "0" * 32}, {"action": "login", "torn": 3}, {"action": "login", "bundle": "a b"}])
def test_fields_are_allow_listed(event, tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", KEY)
    with pytest.raises(ConfigError) as error:
        log.write(event)
    assert not log.path.exists()
    assert not any(str(v) in str(error.value) for v in event.values() if isinstance(v, str) and len(v) > 3 and " " in v)


@quick
@given(st.dictionaries(st.sampled_from([*chain.FIELDS, "patient", "name"]), st.one_of(st.text(max_size=30), st.integers(), st.none(), st.booleans(), st.lists(st.text()))))
def test_what_is_taken_holds_no_free_text(event):
    try:
        taken = chain.checked(event)
    except ConfigError:
        return
    for value in taken.values():
        assert isinstance(value, int) or (value.isascii() and not set(value) & set(" ^=\n\r\t\"'<>;,"))


def test_studies_are_pseudonyms(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", KEY, pseudonym_key=OTHER)
    log.write({**EVENT, "study": log.study("1.2.840.1")})
    assert "1.2.840" not in log.path.read_text() and log.study("1.2.840.1") == audit.pseudonym(OTHER, "1.2.840.1") != audit.pseudonym(KEY, "1.2.840.1")


# ---- tampering -------------------------------------------------------------------------------------------------------------------
TAMPER = {
    "modified": (lambda g: [*g[:3], g[3].replace(b'"count":2', b'"count":7'), *g[4:]], (4, "modified")),
    "removed": (lambda g: g[:3] + g[4:], (4, "before it record 3 is missing")),
    "two removed": (lambda g: g[:3] + g[5:], (4, "before it records 3 to 4 are missing")),
    "first removed": (lambda g: g[1:], (1, "before it record 0 is missing")),
    "reordered": (lambda g: [*g[:3], g[4], g[3], *g[5:]], (4, "before it record 3 is missing")),
    "repeated": (lambda g: [*g[:4], g[2], *g[4:]], (5, "record 2 stands here again")),
    "inserted": (lambda g: [*g[:4], g[3].replace(b'"count":2', b'"count":3'), *g[4:]], (5, "modified or inserted")),
    "overwritten": (lambda g: [*g[:3], b"x" * (len(g[3]) - 1) + b"\n", *g[4:]], (4, "is no record")),
    "reformatted": (lambda g: [*g[:3], g[3].replace(b":", b": ", 1), *g[4:]], (4, "is no record")),
    "tail cut": (lambda g: g[:5], (0, "records 5 to 6 are missing at the end")),
    "emptied": (lambda g: [], (0, "records 0 to 6 are missing at the end")),
}


@pytest.mark.parametrize("deed", TAMPER)
def test_each_tampering_names_its_line(deed, tmp_path):
    log = write_log(tmp_path / "a.jsonl", 6, tmp_path / "head")
    good = log.path.read_bytes().splitlines(keepends=True)
    change, (line, what) = TAMPER[deed]
    log.path.write_bytes(b"".join(change(good)))
    report = verify(log.path, KEY, tmp_path / "head")
    assert not report.ok and report.problems[0][0] == line and what in report.problems[0][1], str(report)
    assert len(report.problems) <= 2, str(report)


def test_wrong_key_says_so(tmp_path):
    log = write_log(tmp_path / "a.jsonl", 3)
    report = verify(log.path, OTHER)
    assert not report.ok and report.count == 0 and "another key" in report.problems[0][1]


def test_a_genuine_line_of_another_log_is_refused(tmp_path):
    here, there = (write_log(tmp_path / name, 4).path.read_bytes().splitlines(keepends=True) for name in ("a", "b"))
    (tmp_path / "a").write_bytes(b"".join([*here[:2], there[2], *here[3:]]))
    report = verify(tmp_path / "a", KEY)
    assert report.problems[0][0] == 3 and "does not follow" in report.problems[0][1]


@quick
@given(data=st.data(), count=st.integers(1, 6))
def test_any_change_of_bytes_is_found(data, count, tmp_path, no_fsync):
    """One deed at random on the bytes: flip, delete, insert, cut, swap two lines. With the head nothing passes; only the identical file does."""
    folder = fresh(tmp_path)
    log = write_log(folder / "a", count, folder / "head")
    good = log.path.read_bytes()
    i = data.draw(st.integers(0, len(good) - 1))
    deed = data.draw(st.sampled_from(["flip", "delete", "insert", "cut", "swap"]))
    if deed == "swap":
        lines = good.splitlines(keepends=True)
        a, b = data.draw(st.integers(0, count)), data.draw(st.integers(0, count))
        lines[a], lines[b] = lines[b], lines[a]
        bad = b"".join(lines)
    else:
        byte = bytes([data.draw(st.integers(0, 255))])
        bad = {"flip": good[:i] + byte + good[i + 1:], "delete": good[:i] + good[i + 1:], "insert": good[:i] + byte + good[i:], "cut": good[:i]}[deed]
    log.path.write_bytes(bad)
    assert verify(log.path, KEY, folder / "head").ok == (bad == good)


@quick
@given(junk=st.binary(max_size=3000))
def test_any_bytes_give_a_report(junk, tmp_path):
    path = fresh(tmp_path) / "a"
    path.write_bytes(junk)
    report = verify(path, KEY)
    assert report.count == 0 and (report.ok or report.problems) and str(report)


# ---- the head --------------------------------------------------------------------------------------------------------------------
def test_the_head_of_an_earlier_moment_still_holds(tmp_path):
    log = write_log(tmp_path / "a", 3, tmp_path / "head")
    early = (tmp_path / "head").read_text()
    log.write(EVENT)
    assert verify(log.path, KEY, early).ok and verify(log.path, KEY, json.loads(early)).ok
    assert not verify(log.path, KEY, {**json.loads(early), "mac": "0" * 64}).ok
    with pytest.raises(ConfigError):
        verify(log.path, KEY, "{}")


def test_a_stream_gets_the_heads(tmp_path):
    import io
    stream = io.StringIO()
    log = write_log(tmp_path / "a", 1, stream)
    log.write(EVENT)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and all(line.startswith("medimg-audit-head ") for line in lines)
    assert verify(log.path, KEY, lines[1].split(" ", 1)[1]).ok


@pytest.mark.parametrize("deed", ["cut", "deleted", "last line changed", "replaced"])
def test_nothing_is_written_behind_a_damaged_end(deed, tmp_path):
    log = write_log(tmp_path / "a", 4, tmp_path / "head")
    lines = log.path.read_bytes().splitlines(keepends=True)
    if deed == "deleted":
        log.path.unlink()
    elif deed == "replaced":
        log.path.unlink()
        write_log(log.path, 9)
    else:
        log.path.write_bytes(b"".join(lines[:-1] + ([lines[-1].replace(b"wu", b"li")] if deed == "last line changed" else [])))
    for writer in ([log] if deed != "last line changed" else []) + [AuditLog(tmp_path / "a", KEY, head=tmp_path / "head")]:
        with pytest.raises(AuditError) as error:
            writer.write(EVENT)
        assert error.value.status == 503


def test_a_running_writer_sees_a_cut_tail_without_a_head(tmp_path):
    log = write_log(tmp_path / "a", 4)
    log.path.write_bytes(b"".join(log.path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(AuditError):
        log.write(EVENT)


# ---- keys ------------------------------------------------------------------------------------------------------------------------
def test_rotation_needs_both_keys_and_pins_the_past(tmp_path):
    log = write_log(tmp_path / "a", 2, tmp_path / "head")
    log.rotate(OTHER)
    log.write(EVENT)
    assert verify(log.path, [KEY, OTHER], tmp_path / "head").ok and verify(log.path, [OTHER, KEY]).ok
    assert not verify(log.path, KEY).ok and not verify(log.path, OTHER).ok
    with pytest.raises(AuditError):
        AuditLog(log.path, KEY).write(EVENT)
    AuditLog(log.path, OTHER).write(EVENT)
    assert verify(log.path, [KEY, OTHER]).count == 7


def test_an_old_key_rewrites_nothing(tmp_path):
    """Whoever has the old key re-signs a changed past; the first record under the new key no longer follows it."""
    log = write_log(tmp_path / "a", 3)
    log.rotate(OTHER)
    lines, before = log.path.read_bytes().splitlines(keepends=True), ""
    for i, line in enumerate(lines[:-1]):
        record = json.loads(line)
        record.pop("m")
        record["p"], record["e"] = before, {**record["e"], **({"actor": "dr.li"} if record["e"].get("actor") else {})}
        record["m"] = before = chain._mac(KEY.encode(), record)
        lines[i] = chain._line(record)
    log.path.write_bytes(b"".join(lines))
    report = verify(log.path, [KEY, OTHER])
    assert [line for line, _ in report.problems] == [len(lines)] and "does not follow" in report.problems[0][1]


def test_an_old_key_writes_nothing_new(tmp_path):
    log = write_log(tmp_path / "a", 1)
    log.rotate(OTHER)
    last = json.loads(log.path.read_bytes().splitlines()[-1])
    for event in (EVENT, {"action": "audit.rotated", "keyid": chain.key_id(OTHER)}):
        forged = chain._record(KEY.encode(), last["n"] + 1, event, last["m"])
        bent = tmp_path / "bent"
        bent.write_bytes(log.path.read_bytes() + chain._line(forged))
        report = verify(bent, [KEY, OTHER])
        assert not report.ok and "another key" in report.problems[0][1]


@pytest.mark.parametrize("key", ["", "short", b"x" * 31])
def test_short_keys_are_refused(key, tmp_path):
    with pytest.raises(ConfigError):
        AuditLog(tmp_path / "a", key)


# ---- torn writes -----------------------------------------------------------------------------------------------------------------
def test_a_cut_at_every_byte_is_recovered_and_told(tmp_path, no_fsync):
    """The last line cut at each of its bytes: verify calls it torn, the next writer accounts for it, and with the head it is seen as loss."""
    write_log(tmp_path / "whole", 2, tmp_path / "head")
    good = (tmp_path / "whole").read_bytes()
    start = good.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start, len(good)):
        path = tmp_path / f"{cut}"
        path.write_bytes(good[:cut])
        path.chmod(0o600)
        report = verify(path, KEY)
        assert report.ok and report.count == 2 and len(report.notes) == (cut > start)
        assert not verify(path, KEY, tmp_path / "head").ok
        AuditLog(path, KEY).write({**EVENT, "count": 99})
        report = verify(path, KEY)
        whole = cut == len(good) - 1                   # only the line end was missing: the record counts
        assert report.ok and len(report.notes) == (start < cut < len(good) - 1), (cut, str(report))
        assert report.count == (4 if whole else 3 + (cut > start))


def test_torn_again_while_recovering(tmp_path, no_fsync):
    log = write_log(tmp_path / "a", 2)
    with open(log.path, "ab") as file:
        file.write(b'{"n":3,"t":"20\n{"n":3,"t":')
    AuditLog(log.path, KEY).write(EVENT)
    report = verify(log.path, KEY)
    assert report.ok and report.count == 5 and len(report.notes) == 1


def test_garbage_that_no_record_accounts_for_is_a_problem(tmp_path):
    log = write_log(tmp_path / "a", 4)
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join([*lines[:2], b"junk\n", *lines[2:]]))
    report = verify(log.path, KEY)
    assert not report.ok and report.problems == ((3, report.problems[0][1]),)


WRITER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from medimg.deployment.audit import AuditLog
log = AuditLog({path!r}, {key!r}, head={head!r})
mode, real, count = sys.argv[1], os.write, 0
def half(handle, data):
    global count
    count += 1
    if mode == "half" and count == 3 and len(data) > 50:
        real(handle, bytes(data[:len(data) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)
    return real(handle, data)
os.write = half
n = 0
while True:
    log.write({{"action": "result.read", "count": n}})
    real(1, b"%d\\n" % n)
    n += 1
"""


@pytest.mark.parametrize("mode", ["half", "any", "any", "any"])
def test_kill_9_loses_nothing_that_was_acknowledged(mode, tmp_path):
    """`half` dies in the middle of a write; `any` is killed from outside after a moment."""
    path, head = tmp_path / "a", tmp_path / "head"
    code = textwrap.dedent(WRITER).format(root=os.getcwd(), path=str(path), key=KEY, head=str(head))
    child = subprocess.Popen([sys.executable, "-c", code, mode], stdout=subprocess.PIPE)
    if mode == "any":
        child.stdout.readline()
        time.sleep(0.05 + 0.2 * int.from_bytes(os.urandom(1)) / 256)
        child.send_signal(signal.SIGKILL)
    told = child.stdout.read().split()
    assert child.wait() == -signal.SIGKILL
    acknowledged = int(told[-1]) + 1 if told else mode == "any"
    report = verify(path, KEY, head)
    assert report.ok and report.count >= 1 + acknowledged, str(report)
    if mode == "half":
        assert len(report.notes) == 1 and "torn write" in report.notes[0][1]
    AuditLog(path, KEY, head=head).write(EVENT)
    after = verify(path, KEY, head)
    assert after.ok and after.count > report.count


# ---- many writers ----------------------------------------------------------------------------------------------------------------
def test_processes_share_one_chain(tmp_path):
    path, head, n = tmp_path / "a", tmp_path / "head", 15
    code = ("import sys; from medimg.deployment.audit import AuditLog\n"
            f"log = AuditLog({str(path)!r}, {KEY!r}, head={str(head)!r})\n"
            f"for i in range({n}): log.write({{'action': 'job', 'actor': sys.argv[1], 'count': i}})")
    children = [subprocess.Popen([sys.executable, "-c", code, f"p{i}"]) for i in range(4)]
    assert [c.wait() for c in children] == [0] * 4
    report = verify(path, KEY, head)
    assert report.ok and report.count == 4 * n + 1
    events = [json.loads(line)["e"] for line in path.read_text().splitlines()]
    for i in range(4):                              # each writer's own order is kept
        assert [e["count"] for e in events if e.get("actor") == f"p{i}"] == list(range(n))


def test_threads_share_one_fsync(tmp_path, monkeypatch):
    """While one thread syncs, sixteen others queue: they are written together, and each returns only when its event is in the file."""
    syncs, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (syncs.append(1), time.sleep(0.02), real(handle))[2])
    log, missing = AuditLog(tmp_path / "a", KEY), []

    def work(i):
        for k in range(5):
            log.write({**EVENT, "count": 100 * i + k})
            if f'"count":{100 * i + k}}}' not in log.path.read_text():
                missing.append(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not missing and verify(log.path, KEY).count == 81
    assert len(syncs) <= 30, len(syncs)


def test_a_full_disk_is_an_error_and_no_damage(tmp_path, monkeypatch):
    log, real = write_log(tmp_path / "a", 2, tmp_path / "head"), os.write
    def full(handle, data):
        real(handle, bytes(data[:20]))
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(AuditError, match="No space left"):
            log.write(EVENT)
    log.write(EVENT)
    report = verify(log.path, KEY, tmp_path / "head")
    assert report.ok and report.count == 4 and not report.notes


def test_a_log_that_others_can_read_is_refused(tmp_path):
    log = write_log(tmp_path / "a", 1)
    log.path.chmod(0o644)
    with pytest.raises(AuditError, match="open to other users"):
        AuditLog(log.path, KEY).write(EVENT)


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError):
        AuditLog(tmp_path / "a", KEY).write(EVENT)
    assert (tmp_path / "elsewhere").read_text() == ""
