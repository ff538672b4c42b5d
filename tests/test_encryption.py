"""Encrypted bundles: any other byte, order, length or key is refused; the format can be read without this package; nothing secret leaves memory."""
import base64
import itertools
import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg.deployment import encryption as e
from medimg.deployment.bundle import Bundle, archive_of, read_files, toy_bundle, toy_images
from medimg.deployment.encryption import Key, decrypt, encrypt, load_key, make_key
from medimg.deployment.exchange import decrypt_bundle, encrypt_bundle
from medimg.errors import BundleError, ConfigError, MedimgError, SignatureError

aead = pytest.importorskip("cryptography.hazmat.primitives.ciphers.aead", reason='pip install "medimg[signing]"')
KEY, OTHER = Key(bytes(range(32))), Key(bytes(range(1, 33)))
HEAD, STEP = 43, 64 + 16
TEXT = bytes(np.random.default_rng(0).integers(0, 256, 64 * 4 + 9, dtype="uint8"))


def chunks(data):
    return data[:HEAD], [data[i:i + STEP] for i in range(HEAD, len(data), STEP)]


def refused(data, key=KEY):
    with pytest.raises(BundleError):
        decrypt(data, key)


# ---- round trip and format ---------------------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=700), st.integers(64, 300))
def test_round_trip(data, chunk):
    made = encrypt(data, KEY, chunk=chunk)
    assert decrypt(made, KEY) == data
    assert len(made) == HEAD + len(data) + 16 * max(1, -(-len(data) // chunk))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 640])
def test_borders_of_chunks(size):
    data = os.urandom(size)
    assert decrypt(encrypt(data, KEY, chunk=64), KEY) == data


def test_equal_bundles_never_give_equal_files():
    many = [encrypt(TEXT, KEY, chunk=64) for _ in range(200)]
    assert len({m[20:36] for m in many}) == len({m[36:43] for m in many}) == 200 and len({c for m in many for c in chunks(m)[1]}) == 200 * 5


def independent(data, secret):
    """The format by its description, with `cryptography` and the standard library's HKDF of RFC 5869 written out: HMAC twice."""
    import hmac
    head = data[:43]
    magic, mark, chunk, salt, prefix = struct.unpack(">8s8sI16s7s", head)

    def hkdf(salt, info):
        pseudo = hmac.digest(salt, secret, "sha256")
        return hmac.digest(pseudo, info + b"\x01", "sha256")
    assert magic == b"MEDIMGE1" and hkdf(bytes(32), b"medimg key id")[:8] == mark
    cipher, body, out, i = aead.AESGCM(hkdf(salt, b"medimg file key")), data[43:], b"", 0
    while body:
        piece, body = body[:chunk + 16], body[chunk + 16:]
        out += cipher.decrypt(prefix + i.to_bytes(4, "big") + (b"\0" if body else b"\1"), piece, head)
        i += 1
    return out


@pytest.mark.parametrize("size", [0, 64, 200, 300])
def test_the_format_can_be_read_without_us(size):
    data = os.urandom(size)
    assert independent(encrypt(data, KEY, chunk=64), KEY.secret) == data


#: NIST CAVP, gcmEncryptExtIV256.rsp: key, IV, plain text, AAD, cipher text, tag (96-bit IV, 128-bit tag, count 0 of three sections).
CAVP = [("b52c505a37d78eda5dd34f20c22540ea1b58963cf8e5bf8ffa85f9f2492505b4", "516c33929df5a3284ff463d7", "", "", "", "bdc1ac884d332457a1d2664f168c76f0"),
        ("31bdadd96698c204aa9ce1448ea94ae1fb4a9a0b3c9d773b51bb1822666b8f22", "0d18e06c7c725ac9e362e1ce", "2db5168e932556f8089a0622981d017d", "", "fa4362189661d163fcd6a56d8bf0405a", "d636ac1bbedd5cc3ee727dc2ab4a9489"),
        ("92e11dcdaa866f5ce790fd24501f92509aacf4cb8b1339d50c9c1240935dd08b", "ac93a1a6145299bde902f21a", "2d71bcfa914e4ac045b2aa60955fad24", "1e0889016f67601c8ebea4943bc23ad6", "8995ae2e6df3dbf96fac7b7137bae67f", "eca5aa77d51d4a0a14d9c51e1da474ab")]


@pytest.mark.parametrize(("key", "iv", "plain", "aad", "cipher", "tag"), CAVP)
def test_published_vectors_of_the_cipher(key, iv, plain, aad, cipher, tag):
    made = aead.AESGCM(bytes.fromhex(key)).encrypt(bytes.fromhex(iv), bytes.fromhex(plain), bytes.fromhex(aad))
    assert made.hex() == cipher + tag


# ---- attacks -------------------------------------------------------------------------------------------------------------------------------
def test_every_bit_of_a_small_file():
    data = encrypt(TEXT, KEY, chunk=64)
    for at in range(len(data)):
        for bit in range(8):
            refused(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])


def test_every_length():
    data = encrypt(TEXT, KEY, chunk=64)
    for size in range(len(data)):
        refused(data[:size])
    for more in (b"\0", b"\0" * 16, b"\0" * STEP, data, data[HEAD:]):
        refused(data + more)


def test_every_order_and_choice_of_chunks():
    """All 3,905 sequences of one to five of the five chunks; only the true one opens."""
    head, parts = chunks(encrypt(TEXT, KEY, chunk=64))
    tried = 0
    for n in range(1, 6):
        for order in itertools.product(range(5), repeat=n):
            if order != (0, 1, 2, 3, 4):
                refused(head + b"".join(parts[k] for k in order))
                tried += 1
    assert tried == 5 + 25 + 125 + 625 + 3125 - 1


def test_chunks_and_headers_of_other_files():
    head, parts = chunks(encrypt(TEXT, KEY, chunk=64))
    other_head, other = chunks(encrypt(TEXT, KEY, chunk=64))
    refused(other_head + b"".join(parts))
    for k in range(5):
        refused(head + b"".join(other[i] if i == k else parts[i] for i in range(5)))
    for k in range(1, 5):
        refused(head + b"".join(parts[:k] + other[k:]))
    for start, end in ((8, 16), (16, 20), (20, 36), (36, 43)):         # one field of the other header at a time
        mixed = head[:start] + other_head[start:end] + head[end:]
        assert mixed == head or refused(mixed + b"".join(parts)) is None


def test_one_chunk_as_last_and_not():
    """A file that ends exactly at a border: cutting its last chunk or adding an empty one is seen."""
    head, parts = chunks(encrypt(TEXT[:128], KEY, chunk=64))
    refused(head + parts[0])
    whole = encrypt(TEXT[:64], KEY, chunk=64)
    refused(whole + whole[-16:])
    empty = encrypt(b"", KEY, chunk=64)
    refused(head + b"".join(parts) + empty[HEAD:])


def test_wrong_key():
    data = encrypt(TEXT, KEY, chunk=64)
    with pytest.raises(SignatureError, match=f"{KEY.id}, not with {OTHER.id}"):
        decrypt(data, OTHER)
    forged = data[:8] + bytes.fromhex(OTHER.id) + data[16:]             # the key id alone decides nothing
    with pytest.raises(SignatureError, match="chunk 1 of 5"):
        decrypt(forged, OTHER)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_plain_error(data):
    for raw in (data, e.MAGIC + data, encrypt(b"", KEY)[:HEAD] + data):
        refused(raw)


def test_limits(monkeypatch):
    head = struct.pack(">8s8sI16s7s", e.MAGIC, bytes.fromhex(KEY.id), 64, bytes(16), bytes(7))
    for chunk in (0, 1, 63, (1 << 24) + 1, 0xFFFFFFFF):
        with pytest.raises(BundleError, match="beyond"):
            decrypt(head[:16] + struct.pack(">I", chunk) + head[20:] + bytes(100), KEY)
    monkeypatch.setattr(e, "MAX_CHUNKS", 4)
    for action in (lambda: encrypt(TEXT, KEY, chunk=64), lambda: decrypt(head + bytes(5 * STEP), KEY)):
        with pytest.raises(BundleError, match="allowed"):
            action()
    monkeypatch.setattr(e, "MAX_CHUNKS", 1 << 20)
    monkeypatch.setattr(e, "MAX_BYTES", 100)
    for action in (lambda: encrypt(TEXT, KEY), lambda: decrypt(head + bytes(5 * STEP), KEY)):
        with pytest.raises(BundleError, match="allowed"):
            action()


# ---- keys ------------------------------------------------------------------------------------------------------------------------------------
def test_forms_of_a_key(tmp_path, monkeypatch):
    secret = os.urandom(32)
    for n, text in enumerate((secret, secret.hex().encode(), secret.hex().upper().encode() + b"\n", base64.b64encode(secret), base64.urlsafe_b64encode(secret) + b"\n", base64.b64encode(secret).rstrip(b"="))):
        path = tmp_path / f"{n}.key"
        path.write_bytes(text)
        path.chmod(0o600)
        assert load_key(path).secret == secret
    monkeypatch.setenv("MEDIMG_BUNDLE_KEY_FILE", str(path))
    assert load_key().secret == secret
    monkeypatch.setenv("MEDIMG_BUNDLE_KEY", KEY.secret.hex())
    assert load_key() == KEY and load_key(path).secret == secret
    monkeypatch.delenv("MEDIMG_BUNDLE_KEY"), monkeypatch.delenv("MEDIMG_BUNDLE_KEY_FILE")
    with pytest.raises(ConfigError, match="MEDIMG_BUNDLE_KEY_FILE"):
        load_key()


@pytest.mark.parametrize("raw", [b"", b"short", b"0" * 64, bytes(32), b"g" * 64, os.urandom(31), os.urandom(33), b"A" * 43 + b"=", b"x" * 5000])
def test_what_is_no_key(tmp_path, raw):
    (tmp_path / "k").write_bytes(raw)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(ConfigError):
        load_key(tmp_path / "k")


def test_the_file_of_a_key(tmp_path):
    old = os.umask(0)
    try:
        key = make_key(tmp_path / "deep" / "k")
    finally:
        os.umask(old)
    path = tmp_path / "deep" / "k"
    assert path.stat().st_mode & 0o777 == 0o600 and load_key(path) == key
    with pytest.raises(ConfigError, match="exists"):
        make_key(path)
    for mode in (0o644, 0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_key(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read|no key"):
        load_key(tmp_path)


def test_no_message_shows_the_key(tmp_path, monkeypatch, caplog, capfd):
    secret = os.urandom(32)
    key = Key(secret)
    forms = (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1])
    said = [repr(key), str(key), f"{key}", repr([key]), repr(vars(key) and None)]
    for raw in (encrypt(TEXT, KEY), encrypt(TEXT, key)[:-1], b"x"):
        with pytest.raises(MedimgError) as caught:
            decrypt(raw, key)
        said += [str(caught.value), repr(caught.value), json.dumps(caught.value.to_dict())]
    monkeypatch.setenv("MEDIMG_BUNDLE_KEY", secret.hex()[:-1])
    with pytest.raises(ConfigError) as caught:
        load_key()
    said += [str(caught.value), caplog.text, *capfd.readouterr()]
    assert not [s for s in said for form in (*forms, secret.hex()[:-1]) if form in s]


# ---- bundles -----------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """(bundle, its encrypted file): unsigned, so that each test says what it allows."""
    toy = toy_bundle(tmp_path_factory.mktemp("b") / "toy")
    return toy, encrypt_bundle(toy.path, toy.path.parent / "toy.medimg.enc", key=KEY, allow_unsigned=True)


def test_a_bundle_opens_with_its_key_only(sealed, tmp_path, monkeypatch):
    toy, path = sealed
    images = toy_images(3)[0]
    assert np.array_equal(Bundle.load(path, key=KEY, allow_unsigned=True).predict(images), toy.predict(images))
    with pytest.raises(SignatureError, match="not signed"):
        Bundle.load(path, key=KEY)
    with pytest.raises(SignatureError, match="encrypted with the key"):
        Bundle.load(path, key=OTHER, allow_unsigned=True)
    with pytest.raises(ConfigError, match="no key is given"):
        Bundle.load(path, allow_unsigned=True)
    monkeypatch.setenv("MEDIMG_BUNDLE_KEY", KEY.secret.hex())
    assert Bundle.load(path, allow_unsigned=True).digest == toy.digest
    out = decrypt_bundle(path, tmp_path / "b.medimg", allow_unsigned=True)
    assert read_files(out) == read_files(toy.path)
    with pytest.raises(SignatureError):
        encrypt_bundle(toy.path, tmp_path / "x.medimg.enc", key=KEY)            # unsigned: not without being asked
    for bad in ("x.medimg", "x.enc", "x"):
        with pytest.raises(BundleError, match="ends in"):
            encrypt_bundle(toy.path, tmp_path / bad, key=KEY, allow_unsigned=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.medimg"]


def test_flipped_bits_of_an_encrypted_bundle(sealed, tmp_path):
    data = sealed[1].read_bytes()
    rng = np.random.default_rng(0)
    for at in (*range(HEAD), *rng.integers(HEAD, len(data), 60), len(data) - 1):
        (tmp_path / "x.medimg.enc").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        with pytest.raises(BundleError):
            Bundle.load(tmp_path / "x.medimg.enc", key=KEY, allow_unsigned=True)


def test_who_has_the_file_s_key_still_cannot_sign(tmp_path, monkeypatch):
    """Encryption is no signature: a forger with the shared key re-encrypts another model, and the signature inside does not hold."""
    from medimg.deployment import trust
    from medimg.deployment.exchange import sign_bundle
    pytest.importorskip("model_signing", reason='pip install "medimg[signing]"')
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "trust"))
    trust.init("author")
    toy, other = toy_bundle(tmp_path / "toy"), toy_bundle(tmp_path / "other", bias=9.0)
    sign_bundle(toy.path)
    forged = {**read_files(other.path), "model.sig": read_files(toy.path)["model.sig"]}
    (tmp_path / "x.medimg.enc").write_bytes(encrypt(archive_of(forged), KEY))
    with pytest.raises(SignatureError, match="does not hold"):
        Bundle.load(tmp_path / "x.medimg.enc", key=KEY, allow_unsigned=True)


def test_hostile_archives_inside(tmp_path):
    import io
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", bytes(100_000_000))
    climb = io.BytesIO()
    with zipfile.ZipFile(climb, "w") as archive:
        archive.writestr("../../model.onnx", b"x")
    link = io.BytesIO()
    with zipfile.ZipFile(link, "w") as archive:
        info = zipfile.ZipInfo("MODEL_CARD.md")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    for raw in (bomb.getvalue(), climb.getvalue(), link.getvalue(), b"not a zip", b"", archive_of({})):
        (tmp_path / "x.medimg.enc").write_bytes(encrypt(raw, KEY))
        with pytest.raises(BundleError):
            Bundle.load(tmp_path / "x.medimg.enc", key=KEY, allow_unsigned=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.medimg.enc"]


WATCH = """
import os, sys
writes = []
def hook(event, args):
    if event == "open" and args[0] is not None and not isinstance(args[0], int):
        mode, flags = args[1], args[2] or 0
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            writes.append(str(args[0]))
    if event in ("os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp"):
        writes.append(f"{event} {args[0]}")
import numpy, onnxruntime
from medimg.deployment.bundle import Bundle, toy_images
sys.dont_write_bytecode = True
sys.addaudithook(hook)
bundle = Bundle.load(sys.argv[1])
p = bundle.predict(toy_images(2)[0])
print(bundle.origin, [w for w in writes if "__pycache__" not in w and w != "/dev/null"], sep=";")
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only: elsewhere model.sig, and nothing else, is written for the library")
def test_decrypted_in_memory_only(tmp_path, monkeypatch):
    """Seen by Python's audit events: from opening the encrypted, signed file to the answer no file is opened for writing."""
    from medimg.deployment import trust
    pytest.importorskip("model_signing", reason='pip install "medimg[signing]"')
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "trust"))
    trust.init("me")
    toy_bundle(tmp_path / "toy", sign=True)
    path = encrypt_bundle(tmp_path / "toy", tmp_path / "toy.medimg.enc", key=KEY)
    done = subprocess.run([sys.executable, "-c", WATCH, str(path)], capture_output=True, text=True, timeout=120, env={**os.environ, "MEDIMG_BUNDLE_KEY": KEY.secret.hex()})
    assert done.stdout.strip() == "signed by me;[]", done.stdout + done.stderr
