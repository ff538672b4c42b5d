"""The threat model names tests that exist, and covers every kind."""
import ast
from pathlib import Path

import pytest

from medimg.deployment.threats import STRIDE, THREATS, Threat, threat_table
from medimg.errors import ConfigError

TESTS = Path(__file__).parent


def functions(path):
    """Names of the test functions of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_named_test_exists():
    known = {f"{path.name}::{name}" for path in TESTS.glob("test_*.py") for name in functions(path)}
    named = {name for threat in THREATS for name in threat.tests}
    assert len(named) > 60 and not sorted(named - known)


def test_every_kind_is_answered_and_no_row_twice():
    assert {t.kind for t in THREATS} == set(STRIDE)
    assert len({(t.where, t.threat) for t in THREATS}) == len(THREATS)
    assert threat_table().count("\n") == len(THREATS) + 1 and all(t.control in threat_table() for t in THREATS)
    assert sum(threat_table(kind=k).count("\n") - 1 for k in STRIDE) == len(THREATS)


def test_a_row_without_a_test_is_refused():
    for kind, tests in (("S", ()), ("X", ("a::b",))):
        with pytest.raises(ConfigError):
            Threat(kind, "a", "b", "c", tests)
    with pytest.raises(ConfigError):
        threat_table(kind="Z")
