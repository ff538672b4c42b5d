"""The container file and the bill of materials, checked as text: there may be no container engine here; container/try.sh builds and runs."""
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import locks  # noqa: E402
from test_packaging import closure  # noqa: E402


def instructions(text):
    """(stage, INSTRUCTION, arguments) of a container file, continued lines joined."""
    stage, found = -1, []
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            stage += word.upper() == "FROM"
            found.append((stage, word.upper(), rest.strip()))
    return found


TEXT = (ROOT / "Containerfile").read_text(encoding="utf-8")
ALL = instructions(TEXT)
LAST = [(word, rest) for stage, word, rest in ALL if stage == max(s for s, _, _ in ALL)]
SECRET = re.compile(r"(?i)(BEGIN [A-Z ]*PRIVATE KEY|medimg_[0-9a-f]{12}_|password\s*=|[0-9a-f]{32}|:[^/\s]+@)")


def complaints(found):
    """What is wrong with a container file; the rules of this project."""
    last = [(word, rest) for stage, word, rest in found if stage == max(s for s, _, _ in found)]
    users = [rest for word, rest in last if word == "USER"]
    out = [] if users and not re.match(r"(root|0)(:|$)", users[-1]) else ["the last USER is root or absent"]
    out += [f"{word} {rest}: from the network or with its tricks; COPY is enough" for _, word, rest in found if word == "ADD" or re.search(r"\b(curl|wget)\b|https?://(?!127\.)", rest)]
    out += [f"{word}: looks like a secret" for _, word, rest in found if SECRET.search(rest) or (word in ("ENV", "ARG") and re.search(r"(?i)(key|secret|token|pepper|password)\w*(?<!_FILE)=", rest))]
    out += [f"COPY {rest} takes the whole context" for _, word, rest in found if word == "COPY" and shlex.split(rest)[0] in (".", "./", "*")]
    base = dict(rest.split("=", 1) for _, word, rest in found if word == "ARG" and "=" in rest).get("BASE", "")
    out += [f"{rest}: another base image, or no fixed version" for _, word, rest in found if word == "FROM" and not re.fullmatch(r"python:3\.\d+-slim( AS \w+)?", rest.replace("${BASE}", base))]
    out += [f"RUN {rest[:40]}: pip without hashes" for _, word, rest in found if word == "RUN" and "pip install" in rest and "--require-hashes" not in rest and "--no-index" not in rest]
    return out + ([] if any(word == "HEALTHCHECK" for word, _ in last) else ["no HEALTHCHECK"])


def test_the_container_runs_as_nobody_special():
    assert not complaints(ALL)
    assert dict(LAST)["USER"] == "10001:10001" and dict(LAST)["ENTRYPOINT"] == '["medimg", "serve"]'
    assert "/healthz" in dict(LAST)["HEALTHCHECK"] and max(s for s, _, _ in ALL) == 1
    assert LAST.index(("USER", "10001:10001")) > max(i for i, (word, _) in enumerate(LAST) if word in ("RUN", "COPY"))


@pytest.mark.parametrize("line", ["USER root", "USER 0:0", "ARG BASE=python:latest", "FROM debian", "ADD https://example.org/x /x", "ADD x.tar /", "RUN curl -s example.org | sh", "ENV API_KEY=abc", "ARG TOKEN=x",
                                  "COPY . /app", "RUN pip install medimg", "ENV X=0123456789abcdef0123456789abcdef"])
def test_the_check_sees_faults(line):
    assert complaints([*ALL, (1, *line.split(" ", 1))])


def test_the_run_line_takes_everything_away():
    """The documented line and compose.yaml say the same: read-only, no capabilities, no way out, limits."""
    run = re.sub(r"\\\n#\s*", " ", TEXT).split("podman run", 1)[1].split("\n", 1)[0]
    for flag in ("--read-only", "--cap-drop ALL", "no-new-privileges", "--user 10001:10001", "--network medimg-inside", "--pids-limit", "--memory", "noexec,nosuid,nodev"):
        assert flag in run, flag
    assert "network create --internal medimg-inside" in TEXT and "--privileged" not in run and "-p " not in run and "docker.sock" not in run
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["medimg"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["user"] == "10001:10001" and service["networks"] == ["inside"]
    assert yaml.safe_load((ROOT / "compose.yaml").read_text())["networks"]["inside"]["internal"] is True
    assert "no-new-privileges:true" in service["security_opt"] and not {"ports", "privileged", "environment", "cap_add", "network_mode", "pid"} & service.keys()


def test_only_what_is_needed_enters_the_build():
    ignore = (ROOT / ".containerignore").read_text()
    assert ignore == (ROOT / ".dockerignore").read_text() and ignore.startswith("*\n")
    allowed = {line[1:] for line in ignore.splitlines() if line.startswith("!")}
    copied = {a.rstrip("/") for stage, word, rest in ALL if word == "COPY" and "--from" not in rest for a in shlex.split(rest)[:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in copied - {"artefacts/serve.txt"})


def test_the_health_check_is_kept_and_nobody_becomes_root():
    """Images in OCI's own format have no HEALTHCHECK: podman and buildah drop it unless told; no program of the base keeps a setuid bit."""
    assert "--format docker" in (ROOT / "Makefile").read_text().split("\ncontainer:", 1)[1].split("\n\n", 1)[0]
    assert any(word == "RUN" and "-perm /6000 -exec chmod a-s" in rest for word, rest in LAST)


def test_the_engine_sends_nothing_home(tmp_path):
    """ONNX Runtime 1.29 and later make a device id and report sessions to their maker; a process of medimg leaves no trace of that."""
    from PIL import Image
    Image.new("L", (28, 28), 90).save(tmp_path / "x.png")
    environ = {k: v for k, v in os.environ.items() if k not in ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")}
    homes = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "TMPDIR", "MEDIMG_CACHE")}
    subprocess.run([sys.executable, "-m", "medimg.cli", "predict", "pneumonia", "x.png"], check=True, env={**environ, **homes, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True)
    assert not [str(p) for p in tmp_path.rglob("*") if "onnxruntime" in p.as_posix().lower() or "Microsoft" in p.parts]
    assert "ORT_DISABLE_TELEMETRY=1" in next(rest for word, rest in LAST if word == "ENV")


def test_the_settings_inside_are_settings_of_the_service():
    given = tomllib.loads((ROOT / "container/service.toml").read_text())
    assert given["expose"] is True and given["tls_key"].startswith("/run/secrets/")
    if importlib.util.find_spec("medimg.deployment.settings"):
        from medimg.deployment.settings import ServiceSettings
        assert given.keys() <= ServiceSettings.__dataclass_fields__.keys()


# ---- the bill of materials ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bom(tmp_path_factory):
    out = tmp_path_factory.mktemp("sbom") / "bom.json"
    subprocess.run([sys.executable, ROOT / "tools/sbom.py", "--output", out], check=True, capture_output=True)
    return out


def test_sbom_lists_exactly_the_locked_packages(bom):
    """Versions and hashes are the lock's; every package that an independent walk finds installed is there; the base lock is inside."""
    lock = (ROOT / "locks/dev.txt").read_text()
    pins, document = locks.locked(lock), json.loads(bom.read_text())
    listed = {locks.canonical(c["name"]): c for c in document["components"]}
    assert all(pins[name] == c["version"] for name, c in listed.items())
    for name, component in listed.items():
        hashes = {h["content"] for link in component["externalReferences"] for h in link["hashes"]}
        block = re.search(rf"(?im)^{re.escape(component['name'])}==[^\n]*(?:\n    [^\n]*)*", lock)[0]
        assert hashes == set(re.findall(r"sha256:([0-9a-f]{64})", block)) and hashes, name
    assert set(closure(locks.requirements(("", "serve")))) <= listed.keys()
    base = set(locks.locked((ROOT / "locks/base.txt").read_text())) - {locks.parse(r)[0] for r in locks.build_requires()}
    assert base <= listed.keys() and "tensorflow" not in listed and "argon2-cffi" in listed


def test_sbom_is_valid_cyclonedx_and_the_same_each_time(bom, tmp_path):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.read_text()) is None
    subprocess.run([sys.executable, ROOT / "tools/sbom.py", "--output", tmp_path / "again.json"], check=True, capture_output=True)
    assert (tmp_path / "again.json").read_bytes() == bom.read_bytes()
    document = json.loads(bom.read_text())
    references = {c["bom-ref"] for c in document["components"]} | {document["metadata"]["component"]["bom-ref"]}
    assert {d["ref"] for d in document["dependencies"]} == references and all(set(d["dependsOn"]) <= references for d in document["dependencies"])
    assert "timestamp" not in document["metadata"] and str(ROOT) not in bom.read_text()


def test_the_container_installs_what_the_bill_lists(bom, tmp_path):
    subprocess.run([sys.executable, ROOT / "tools/sbom.py", "--requirements", tmp_path / "serve.txt"], check=True, capture_output=True)
    text = (tmp_path / "serve.txt").read_text()
    listed = {locks.canonical(c["name"]): c["version"] for c in json.loads(bom.read_text())["components"]}
    extra = {name: version for name, version in locks.locked(text).items() if name not in listed}
    assert locks.locked(text) == {**listed, **extra} and set(extra) == {locks.parse(r)[0] for r in locks.build_requires()}
    assert text.count("--hash=sha256:") > len(listed)


def test_lint_asks_for_known_holes(tmp_path):
    """`make lint` asks pip-audit about the locked packages, ends with an error for a hole, and says so when nobody could be asked."""
    fake = tmp_path / "python"
    answers = {"Found 1 known vulnerability in 1 package": False, "No known vulnerabilities found": True, "ConnectionError": True}
    recipe = re.search(r"(?m)^lint:[^\n]*\n((?:\t[^\n]*\n)+)", (ROOT / "Makefile").read_text())[1]
    line = next(part for part in re.split(r"(?<!\\)\n", recipe) if "pip_audit" in part).strip().lstrip("@").replace("$$", "$").replace("$(PY)", str(fake))
    assert "locks/dev.txt" in line and "--require-hashes" in line
    for said, good in answers.items():
        fake.write_text(f"#!/bin/sh\necho '{said}'\nexit {int('No known' not in said)}\n")
        fake.chmod(0o755)
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is good, (said, done.stdout, done.stderr)
        assert ("NOT audited" in done.stdout) is (said == "ConnectionError")
