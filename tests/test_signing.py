"""Signatures: what a stranger, a thief of bytes or a clumsy disk can do to a bundle is refused; outside tools agree on what is signed."""
import base64
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medimg.deployment import bundle as b
from medimg.deployment import trust
from medimg.deployment.bundle import Bundle, pack, read_files, toy_bundle, toy_images, update_index, verify
from medimg.deployment.exchange import bundle_from_run, diff, sign_bundle
from medimg.deployment.manifest import encode, seal
from medimg.errors import BundleError, ConfigError, DatasetError, SignatureError

pytest.importorskip("model_signing", reason='pip install "medimg[signing]"')
SECRET_MODES = (0o644, 0o640, 0o604, 0o660)


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory):
    """(trust folder of the author, signed bundle)."""
    home, out = tmp_path_factory.mktemp("author") / "trust", tmp_path_factory.mktemp("signed") / "toy"
    trust.init("author", folder=home)
    toy_bundle(out)
    sign_bundle(out, folder=home)
    return home, out


@pytest.fixture
def home(signed_once, tmp_path, monkeypatch):
    """The reader's trust folder: a copy that trusts the author."""
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "reader"))
    trust.add(signed_once[0] / "signing.pub", "author")
    return tmp_path / "reader"


@pytest.fixture
def folder(signed_once, home, tmp_path):
    return shutil.copytree(signed_once[1], tmp_path / "toy")


def tool(*arguments):
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True, timeout=120)


# ---- beside the tool that everybody else uses --------------------------------------------------------------------------------------
def test_model_signing_s_own_command_accepts_ours_and_we_accept_its(signed_once, folder):
    keys = signed_once[0]
    said = tool("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", keys / "signing.pub")
    assert said.returncode == 0, said.stderr
    (folder / "MODEL_CARD.md").write_text("changed")
    assert tool("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", keys / "signing.pub").returncode != 0
    toy_bundle(folder)
    assert not (folder / "model.sig").exists()
    said = tool("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", keys / "signing.key")
    assert said.returncode == 0, said.stderr
    assert Bundle.load(folder).origin == "signed by author"


def test_openssl_checks_the_envelope(signed_once, folder, tmp_path):
    """The fingerprint is that of the PEM file, and the signature is plain ECDSA over the DSSE encoding."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed; remedy: apt-get install openssl")
    found = json.loads((folder / "model.sig").read_text())
    payload = base64.b64decode(found["dsseEnvelope"]["payload"])
    (tmp_path / "message").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(found["dsseEnvelope"]["signatures"][0]["sig"]))
    said = subprocess.run(["openssl", "dgst", "-sha256", "-verify", signed_once[0] / "signing.pub", "-signature", tmp_path / "sig", tmp_path / "message"], capture_output=True, text=True)
    assert "Verified OK" in said.stdout
    said = subprocess.run(["openssl", "dgst", "-sha256", signed_once[0] / "signing.pub"], capture_output=True, text=True)
    assert said.stdout.split()[-1] == trust.fingerprint(signed_once[0] / "signing.pub") == trust.claimed_signer(read_files(folder))


# ---- the default ---------------------------------------------------------------------------------------------------------------
def test_signed_by_a_trusted_key(folder):
    bundle = Bundle.load(folder)
    assert (bundle.origin, bundle.warnings, bundle.signer.name) == ("signed by author", (), "author") and bundle.signer.fingerprint in bundle.signature
    assert verify(folder)["origin"] == "signed by author" and verify(folder)["files"] == 9
    assert Bundle.load(pack(folder, folder.parent / "toy.medimg")).origin == "signed by author"


def test_unsigned_and_unknown_are_refused_unless_asked_for(folder, home, monkeypatch):
    with pytest.raises(SignatureError, match="medimg trust add"):
        trust.remove("author")
        Bundle.load(folder)
    opened = Bundle.load(folder, allow_unsigned=True)
    assert opened.origin == "unknown signer" and "not trusted here" in opened.warnings[0] and opened.signature is None
    (folder / "model.sig").unlink()
    for setting in (None, "", "0"):
        monkeypatch.delenv("MEDIMG_ALLOW_UNSIGNED", raising=False) if setting is None else monkeypatch.setenv("MEDIMG_ALLOW_UNSIGNED", setting)
        with pytest.raises(SignatureError, match="not signed.*medimg trust init.*MEDIMG_ALLOW_UNSIGNED=1"):
            Bundle.load(folder)
    monkeypatch.setenv("MEDIMG_ALLOW_UNSIGNED", "1")
    assert Bundle.load(folder).origin == "unsigned" and "not proven" in Bundle.load(folder).warnings[0]
    with pytest.raises(SignatureError):
        Bundle.load(folder, allow_unsigned=False)


def test_a_bundle_of_the_package_needs_no_key_wherever_it_is_copied(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "none"))
    for name in b.shipped():
        away = shutil.copytree(b.bundles_dir() / name, tmp_path / "away" / name)
        assert Bundle.load(name).origin == Bundle.load(away).origin == "shipped" and Bundle.load(away).warnings == ()
        manifest = json.loads((away / "manifest.json").read_text())
        (away / "manifest.json").write_bytes(encode(seal({**manifest, "version": "99"})))
        with pytest.raises(SignatureError, match="not signed"):
            Bundle.load(away)


def test_build_signs_with_the_local_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "trust"))
    with pytest.raises(ConfigError, match="medimg trust init"):
        toy_bundle(tmp_path / "toy", sign=True)
    assert toy_bundle(tmp_path / "toy", sign=None).origin == "unsigned"
    key = trust.init("me")
    assert toy_bundle(tmp_path / "toy", sign=None).signer == key and Bundle.load(tmp_path / "toy").origin == "signed by me"
    assert toy_bundle(tmp_path / "toy").origin == "unsigned" and not (tmp_path / "toy" / "model.sig").exists()
    toy_bundle(tmp_path / "index" / "toy", sign=True)
    update_index(tmp_path / "index")
    assert not (tmp_path / "index" / "toy" / "model.sig").exists()


def test_a_prediction_names_the_signer(folder):
    from medimg.deployment.intake import Study
    from medimg.deployment.predict import answer
    record = answer(Bundle.load(folder), Study("a.png", toy_images(2, seed=5)[0][1]))
    found = json.loads(record.to_json())["model"]
    assert found["origin"] == "signed by author" and found["signature"] == f"signed by author, key {trust.list_keys()[0].fingerprint}" and not [w for w in record.warnings if "signed" in w]
    assert type(record).from_json(record.to_json()).model["signature"] == found["signature"]


# ---- attacks: nothing that was changed after signing gets in, not even with allow_unsigned -------------------------------------------
def refused(folder, match=None):
    for options in ({}, {"allow_unsigned": True}):
        with pytest.raises(SignatureError, match=match):
            Bundle.load(folder, **options)


def resealed(folder, **changes):
    """What a forger does: change the content, then recompute every digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: b.sha256_of(p) for p in folder.iterdir() if p.name not in ("manifest.json", "model.sig")}
    (folder / "manifest.json").write_bytes(encode(seal({**manifest, "files": files, **changes})))


def test_swapped_network_with_a_perfect_seal(folder, tmp_path):
    other = toy_bundle(tmp_path / "other", bias=9.0)
    shutil.copy(other.path / "model.onnx", folder / "model.onnx")
    resealed(folder)
    refused(folder, "signature of author does not hold.*changed")


@pytest.mark.parametrize("name", [n for n in b.REQUIRED if n not in ("manifest.json", "model.sig")])
def test_any_file_changed_and_resealed(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    resealed(folder)
    refused(folder, "does not hold")


def test_file_added_or_taken_and_resealed(folder):
    (folder / "model.keras").write_bytes(b"x")
    resealed(folder)
    refused(folder, "Extra files found: model.keras")
    (folder / "model.keras").unlink()
    resealed(folder)
    Bundle.load(folder)
    card = (folder / "MODEL_CARD.md").read_bytes()
    (folder / "MODEL_CARD.md").unlink()
    resealed(folder)
    refused(folder, "MODEL_CARD")
    (folder / "MODEL_CARD.md").write_bytes(card)


def test_every_byte_of_the_signature(folder):
    """A flipped bit in model.sig is refused, or changes nothing that was signed: JSON has room for harmless bits (the media type's case is none of them)."""
    good = (folder / "model.sig").read_bytes()
    accepted = []
    for at in range(0, len(good), 11):
        (folder / "model.sig").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        try:
            Bundle.load(folder)
            accepted.append(at)
        except SignatureError:
            pass
    (folder / "model.sig").write_bytes(good)
    envelope = json.loads(good)["dsseEnvelope"]
    for part in (envelope["payload"], envelope["signatures"][0]["sig"]):
        start = good.index(part.encode())
        assert not [at for at in accepted if start <= at < start + len(part.rstrip("=")) - 1]
    assert len(accepted) <= 12, [good[max(0, a - 20):a + 5] for a in accepted]


def test_spliced_signatures(folder, signed_once, tmp_path, home):
    other = toy_bundle(tmp_path / "other", version="2.0")
    sign_bundle(other.path, folder=signed_once[0])
    shutil.copy(other.path / "model.sig", folder / "model.sig")
    refused(folder, "does not hold")


def test_a_thief_signs_under_the_author_s_name(folder, tmp_path):
    thief = tmp_path / "thief"
    trust.init("author", folder=thief)
    found = json.loads(trust.sign(read_files(folder), folder=thief))
    author = trust.list_keys()[0].fingerprint
    assert found["verificationMaterial"]["publicKey"]["hint"] != author
    found["verificationMaterial"]["publicKey"]["hint"] = author
    (folder / "model.sig").write_text(json.dumps(found))
    refused(folder, "does not hold: it is not of this key")


def test_a_signature_may_leave_nothing_out(folder, signed_once, tmp_path):
    """model-signing lets a signature list paths to ignore; even a trusted key cannot use that to leave a file free."""
    keys, sig = signed_once[0], tmp_path / "loose.sig"
    assert tool("sign", "key", folder, "--signature", sig, "--private_key", keys / "signing.key", "--ignore-paths", folder / "model.onnx", "--ignore-paths", folder / "model.sig").returncode == 0
    shutil.copy(sig, folder / "model.sig")
    assert tool("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", keys / "signing.pub", "--ignore-paths", folder / "model.sig").returncode == 0
    refused(folder, "Extra files found: model.onnx")


@pytest.mark.parametrize("raw", [b"", b"{}", b"null", b"[]", b"[" * 100_000, b"\xff", b'{"verificationMaterial": {"publicKey": {"hint": null}}}', b'{"verificationMaterial": {"publicKey": {"hint": "x"}}}',
                                 b'{"verificationMaterial": {"publicKey": {"hint": ["a"]}}}', b" " * (2 << 20)])
def test_hostile_signature_files(folder, raw):
    (folder / "model.sig").write_bytes(raw)
    refused(folder, "model.sig")


@pytest.mark.parametrize("change", [lambda s: s.pop("dsseEnvelope"), lambda s: s["dsseEnvelope"].update(signatures=[]), lambda s: s["dsseEnvelope"].update(payload="!!"), lambda s: s.update(mediaType="x"),
                                    lambda s: s["dsseEnvelope"].update(payloadType="text/plain"), lambda s: s["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode())])
def test_signature_files_with_parts_missing(folder, change):
    found = json.loads((folder / "model.sig").read_text())
    change(found)
    (folder / "model.sig").write_text(json.dumps(found))
    refused(folder)


def test_signature_files_with_any_part_replaced(folder):
    """Six hundred well-formed JSON files that differ from the true one in a field: each is refused, or the field was not signed and says the same."""
    rng, good = np.random.default_rng(0), (folder / "model.sig").read_text()
    values = [None, 1, -1, 0.5, True, "x", "", [], [1], {}, {"a": "b"}, "0" * 64, "A" * 5000]
    for _ in range(600):
        found = spot = json.loads(good)
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            key = keys[rng.integers(len(keys))]
            if isinstance(spot[key], (dict, list)) and spot[key] and rng.random() < 0.8:
                spot = spot[key]
                continue
            break
        spot[key] = values[rng.integers(len(values))]
        (folder / "model.sig").write_text(json.dumps(found))
        try:
            assert Bundle.load(folder).signer.name == "author" and key in ("tlogEntries", "keyid", "timestampVerificationData"), (key, spot[key])
        except SignatureError:
            pass


def test_links_folders_and_names(folder, tmp_path):
    real = tmp_path / "real.sig"
    shutil.move(folder / "model.sig", real)
    (folder / "model.sig").symlink_to(real)
    refused(folder, "link")
    (folder / "model.sig").unlink()
    shutil.move(real, folder / "model.sig")
    (folder / "empty").mkdir()                                  # model-signing itself does not see it
    refused(folder, "empty")
    (folder / "empty").rmdir()
    assert Bundle.load(folder).origin == "signed by author"
    for name in ("../model.onnx", "a/b", "a\nb", ".hidden", "x" * 200):
        with pytest.raises(SignatureError, match="plain file name"):
            trust.sign({name: b"x"}, folder=_own(tmp_path))


def _own(tmp_path):
    if not (tmp_path / "own").exists():
        trust.init("own", folder=tmp_path / "own")
    return tmp_path / "own"


# ---- keys ------------------------------------------------------------------------------------------------------------------------
def test_the_private_key_is_private(tmp_path):
    old = os.umask(0)
    try:
        trust.init("me", folder=tmp_path / "trust")
    finally:
        os.umask(old)
    key = tmp_path / "trust" / "signing.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    before = key.read_bytes()
    with pytest.raises(ConfigError, match="already"):
        trust.init("other", folder=tmp_path / "trust")
    assert key.read_bytes() == before
    for mode in SECRET_MODES:
        key.chmod(mode)
        with pytest.raises(ConfigError, match=f"{mode:04o}.*chmod 600"):
            trust.sign({"model.onnx": b"x"}, folder=tmp_path / "trust")


def test_no_key_in_a_repository(tmp_path):
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    for place in ("trust", "deep/er/trust"):
        with pytest.raises(ConfigError, match="repository"):
            trust.init("me", folder=tmp_path / "repo" / place)
        assert not (tmp_path / "repo" / place).exists()
    from medimg.deployment.encryption import make_key
    with pytest.raises(ConfigError, match="repository"):
        make_key(tmp_path / "repo" / "bundle.key")


def test_no_key_in_this_repository():
    """Neither private keys nor bundle keys are among the files of the repo."""
    root = Path(__file__).resolve().parents[1]
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout; remedy: run the tests from a clone")
    mark = b"-----BEGIN " + b"PRIVATE KEY"
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = root / name
        assert path.suffix not in (".key", ".pem") and not (path.is_file() and path.stat().st_size < 5_000_000 and mark in path.read_bytes()), name


def test_a_list_that_others_can_write_is_no_list(folder, home):
    for place, mode in ((home / "trusted", 0o777), (home, 0o770), (home / "trusted" / "author.pub", 0o666)):
        before = stat.S_IMODE(place.stat().st_mode)
        place.chmod(mode)
        with pytest.raises(ConfigError, match="chmod go-w"):
            Bundle.load(folder)
        place.chmod(before)
    (home / "trusted" / "junk.pub").write_text("junk")
    with pytest.raises(ConfigError, match="junk.pub"):
        Bundle.load(folder)


def test_what_may_be_added(tmp_path, home):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    def pem(key):
        return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    path = tmp_path / "key.pub"
    for key in (rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        path.write_bytes(pem(key))
        with pytest.raises(ConfigError, match="P-256"):
            trust.add(path, "x")
    path.write_bytes(pem(ec.generate_private_key(ec.SECP384R1())))
    assert trust.add(path, "x").name == "x" and trust.add(path, "x").name == "x"
    for name in ("y", "author"):
        with pytest.raises(ConfigError, match="already"):
            trust.add(path, name)
    for name in ("../x", "", "a/b", ".x", "x" * 65, "a\nb"):
        with pytest.raises(ConfigError, match="no name"):
            trust.add(path, name)
    for data in (b"", b"junk", b"x" * 1_000_000):
        path.write_bytes(data)
        with pytest.raises(ConfigError):
            trust.add(path, "z")
    with pytest.raises(ConfigError, match="cannot be read"):
        trust.add(tmp_path / "none.pub", "z")
    assert [k.name for k in trust.list_keys()] == ["author", "x"] and not any(k.own for k in trust.list_keys())
    trust.remove("x")
    with pytest.raises(ConfigError, match="did you mean author"):
        trust.remove("autor")


# ---- what is loaded, and when --------------------------------------------------------------------------------------------------------
PROBE = """
import sys
from medimg.deployment.bundle import Bundle
bundle = Bundle.load(sys.argv[1], allow_unsigned=len(sys.argv) > 2)
print(bundle.origin, "model_signing" in sys.modules, "cryptography" in sys.modules, "tensorflow" in sys.modules, sep=";")
"""


def test_model_signing_is_imported_for_signed_bundles_only(folder, tmp_path):
    def probe(*arguments):
        return subprocess.run([sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120).stdout.strip()
    assert probe("phantom-cxr") == "shipped;False;False;False"
    assert probe(folder) == "signed by author;True;True;False"
    assert probe(toy_bundle(tmp_path / "plain").path, "yes") == "unsigned;False;False;False"


def test_verification_uses_the_bytes_that_are_used(folder, monkeypatch):
    """After reading no file of the bundle is opened again: there is no moment in which it could be swapped."""
    files = read_files(folder)
    shutil.rmtree(folder)
    assert trust.verify_signature(files).name == "author"


def test_a_shipped_bundle_is_not_signed_over(home):
    with pytest.raises(BundleError, match="shipped"):
        sign_bundle("phantom-cxr")


def test_sign_refuses_what_is_broken(folder, signed_once):
    (folder / "MODEL_CARD.md").write_text("changed")
    with pytest.raises(SignatureError, match="MODEL_CARD"):
        sign_bundle(folder, folder=signed_once[0])


def test_sign_an_archive_in_place(folder, signed_once, tmp_path):
    toy_bundle(folder)
    path = pack(folder, tmp_path / "a.medimg")
    assert sign_bundle(path, folder=signed_once[0]).name == "author" and Bundle.load(path).origin == "signed by author"


# ---- trusted hands, hostile content: nothing in a bundle is executed --------------------------------------------------------------------
class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_in_the_reference_is_not_opened(tmp_path):
    from medimg.deployment.reference import read_reference
    with open(tmp_path / "x.npz", "wb") as file:
        np.savez(file, mean=np.array([Bomb(tmp_path / "ran")], dtype=object), precision=np.zeros((1, 1)), validation=np.zeros(1), facts=np.zeros(1))
    with pytest.raises(BundleError):
        read_reference((tmp_path / "x.npz").read_bytes())
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["mean"]
    assert (tmp_path / "ran").exists()          # the bomb is live


def test_a_lambda_in_the_keras_weights_is_not_run(folder, signed_once, tmp_path):
    """A trusted author signs a bundle whose model.keras holds a Lambda with Python bytecode: loading it for an update refuses, and the code never runs."""
    keras = pytest.importorskip("keras", reason='pip install "medimg[train]"')
    from medimg.api import _network
    from medimg.models.networks import load_model
    ran = tmp_path / "ran"
    inputs = keras.Input((16, 16, 1))
    evil = keras.layers.Lambda(eval(f"lambda x: (__import__('pathlib').Path({str(ran)!r}).touch(), x)[1]"))
    path = tmp_path / "evil.keras"
    keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(evil(inputs)))).save(path)
    ran.unlink(missing_ok=True)
    shutil.copy(path, folder / "model.keras")
    resealed(folder)
    sign_bundle(folder, folder=signed_once[0])
    bundle = Bundle.load(folder)
    assert bundle.origin == "signed by author" and bundle.predict(toy_images(2)[0]).shape == (2, 2)
    with pytest.raises(ConfigError, match="Lambda|safe"):
        load_model(path)
    with pytest.raises(ConfigError, match="Lambda|safe"):
        _network(bundle, read_files(folder)["model.keras"])
    assert not ran.exists()
    keras.saving.load_model(path, safe_mode=False)(np.zeros((1, 16, 16, 1), "float32"))
    assert ran.exists()                         # the bomb is live


# ---- diff and build ------------------------------------------------------------------------------------------------------------------
def test_diff(folder, tmp_path):
    other = toy_bundle(tmp_path / "other", version="1.1", bias=-1.0, thresholds={"bright": 0.3}, metrics={"auc": {"value": 0.9, "low": 0.8, "high": 1.0}})
    found = diff(folder, other)
    assert not found["same"] and found["manifest"] == {"version": ["1.0", "1.1"]} and found["thresholds"] == {"bright": [0.5, 0.3]}
    assert found["metrics"] == {"auc.value": [None, 0.9], "auc.low": [None, 0.8], "auc.high": [None, 1.0]}
    assert found["files"]["model.onnx"] == "changed" and "preprocess.json" not in found["files"] and found["origin"] == ["signed by author", "unsigned"]
    back = diff(other, folder)
    assert back["thresholds"] == {"bright": [0.3, 0.5]} and diff(folder, folder)["same"] and json.dumps(found)
    with pytest.raises(BundleError):
        diff(folder, tmp_path / "nowhere")


def test_build_from_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow", reason='pip install "medimg[train]"')
    from medimg import api
    monkeypatch.setenv("MEDIMG_TRUST", str(tmp_path / "trust"))
    trust.init("me")
    api.train("phantom-cxr", out=tmp_path / "run", profile="ci", data="phantom", n=40, epochs=1, progress=False)
    made = bundle_from_run(tmp_path / "bundle", tmp_path / "run", name="mine", version="1.0", population={"description": "phantoms"}, weights=True)
    assert made.origin == "signed by me" and made.manifest["metrics"]["split"].startswith("validation") and "model.keras" in made.sizes
    from medimg.deployment.predict import predict
    from medimg.data.datasets import load_dataset
    image = load_dataset("phantom-cxr", data="phantom", n=40, quiet=True).images[0]
    assert predict(tmp_path / "bundle", image)[0].model["origin"] == "signed by me"
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    (tmp_path / "run" / "data.json").write_text(json.dumps({**kept, "seed": 5}))
    with pytest.raises(DatasetError, match="not what it was"):
        bundle_from_run(tmp_path / "again", tmp_path / "run", name="mine", version="1.0", population={"description": "phantoms"})


# ---- the command -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def medimg(capsys, monkeypatch):
    """The command in this process: `medimg(*arguments, cwd=…, code=…)` gives what it printed."""
    from medimg.cli import main

    def run(*arguments, cwd, code=0, **env):
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in {"MEDIMG_TRUST": str(cwd / "trust"), **env}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert end.value.code == code, out + err
        return out if code != 2 else err
    return run


def test_two_clinics_on_the_command_line(tmp_path, medimg):
    a, c = tmp_path / "a", tmp_path / "c"
    for place in (a, c):
        place.mkdir()
    toy_bundle(a / "toy")
    key = json.loads(medimg("trust", "init", "--name", "clinic-a", "--json", cwd=a))
    assert "not signed" in medimg("bundle", "verify", "toy", cwd=a, code=2)
    assert json.loads(medimg("bundle", "sign", "toy", "--json", cwd=a))["fingerprint"] == key["fingerprint"]
    medimg("bundle", "encrypt", "toy", "--out", c / "toy.medimg.enc", "--key", c / "file.key", "--new-key", cwd=a)
    assert "no key is given" in medimg("bundle", "verify", "toy.medimg.enc", cwd=c, code=2)
    secret = {"MEDIMG_BUNDLE_KEY_FILE": str(c / "file.key")}
    assert "not trusted here" in medimg("bundle", "verify", "toy.medimg.enc", cwd=c, code=2, **secret)
    assert json.loads(medimg("trust", "list", "--json", cwd=c)) == []
    medimg("trust", "add", key["public_key"], "--name", "clinic-a", cwd=c)
    assert json.loads(medimg("bundle", "verify", "toy.medimg.enc", "--json", cwd=c, **secret))["origin"] == "signed by clinic-a"
    medimg("bundle", "decrypt", "toy.medimg.enc", "--out", "toy.medimg", "--key", "file.key", cwd=c)
    assert "the same bundle" in medimg("bundle", "diff", "toy.medimg", a / "toy", cwd=c) and "signed by clinic-a" in medimg("bundle", "inspect", "toy.medimg", cwd=c)
    assert "thresholds" in medimg("bundle", "diff", "toy.medimg", "pneumonia", cwd=c, code=1)
    medimg("trust", "remove", "clinic-a", cwd=c)
    medimg("bundle", "verify", "toy.medimg", cwd=c, code=2)
    assert "phantom-cxr" in medimg("bundle", "list", cwd=c)
