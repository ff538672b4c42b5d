"""Exercises: what counts as the same answer, and checks that cannot be written carelessly."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medimg import course
from medimg.errors import ConfigError

numbers = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
values = st.recursive(numbers | st.booleans() | st.none() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)


@settings(deadline=None)
@given(values)
def test_a_value_is_the_same_as_itself(value):
    assert course.same(value, value)


@settings(deadline=None)
@given(values, values)
def test_same_never_raises_and_is_symmetric(a, b):
    assert course.same(a, b) == course.same(b, a)


@settings(deadline=None)
@given(numbers, st.floats(1e-3, 10))
def test_tolerance_is_absolute(value, tol):
    assert course.same(value + 0.9 * tol, value, tol=tol)
    assert not course.same(value + 1.1 * tol + 1e-6, value, tol=tol)


@pytest.mark.parametrize("answer, expected, good", [
    (np.float32(0.9), 0.9, True), (np.array([1, 2]), (1, 2), True), (range(3), [0, 1, 2], True), (np.bool_(True), True, True),
    (" Lung. ", "lung", True), ("'b'", "b", True), ({"a": [1.0]}, {"a": (1,)}, True), (np.array(3.0), 3, True),
    (1, True, False), (0, False, False), (None, 0, False), ("1", 1, False), ([1, 2], [2, 1], False), ("ab", ["a", "b"], False),
    ([1], 1, False), ({"a": 1}, {"b": 1}, False), (np.zeros((2, 3)), np.zeros((3, 2)), False), (object(), 1, False), (..., 1, False),
    (float("nan"), 1.0, False), (float("inf"), 1.0, False), (lambda: 1, 1, False)])
def test_table(answer, expected, good):
    assert course.same(answer, expected) is good


def test_check_speaks(capsys):
    course.exercise("t-a", expected=0.9, tol=0.01, hint="divide by the sick", wrong=[0.8, 9])
    assert course.check("t-a", 0.905) is True
    assert course.check("t-a", 0.8) is False
    assert course.check("t-a", ...) is False
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["✓ t-a: right", "✗ t-a: not yet; hint: divide by the sick", "· t-a: not answered yet, replace the ..."]


def test_a_cell_may_run_twice():
    for expected in (1, 2):
        course.exercise("t-b", expected=expected, wrong=[3, 4])
    assert course.check("t-b", 2) and not course.check("t-b", 1)


@pytest.mark.parametrize("arguments, text", [
    (dict(expected=1, wrong=[2]), "lists 1 wrong answers"), (dict(expected=1, wrong=[2, 1.0]), "accepts the wrong answer 1.0"),
    (dict(check=lambda a: True, wrong=[2, 3]), "accepts the wrong answer 2"), (dict(wrong=[2, 3]), "either check= or expected="),
    (dict(check=bool, expected=1, wrong=[0, ""]), "either check= or expected=")])
def test_careless_exercises_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        course.exercise("t-careless", **arguments)
    with pytest.raises(ConfigError):
        course.check("t-careless", 1)


def test_an_answer_that_breaks_the_check_is_wrong(capsys):
    course.exercise("t-c", check=lambda f: f(2) == 4, wrong=[4, lambda x: 1 / 0, lambda x: x + 1])
    assert not course.check("t-c", "no function") and course.check("t-c", lambda x: x * x)


def test_unknown_names_get_the_nearest():
    course.exercise("t-data-01-a", expected=1, wrong=[2, 3])
    with pytest.raises(ConfigError, match="t-data-01-a"):
        course.check("t-data-01-b", 1)
