"""Regular expressions and all other patterns, of any text: bounded, and refused by us alone."""

import contextlib
import time
import tracemalloc

import pytest
from helpers import Net, changed_parts, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_inject import ArgumentError, LoRAInjectError, plan
from lora_inject.core.expressions import Expression, Limits
from lora_inject.core.patterns import parse

pytestmark = pytest.mark.cpu("nothing is computed")

# Pieces of the syntax of expressions and globs, so that what is drawn is often one.
PIECES = [
    "a", "q_proj", "layers", "0", ".", "\\.", ".*", ".+", "a?", "*", "?", "+", "[", "]", "[^a]",
    "[a-z]",
    "(", ")", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?P<x>", "(?P=x)", "(?P>x)", "(?&x)",
    "(?R)", "(?1)", "(?i)", "(?x)", "(?V0V1)", "(?au)", "(?(1)a|b)", "(?|", "|", "^", "$", "\\1",
    "\\b", "\\X", "\\p{L}", "\\L<x>", "{2}", "{2,}", "{,3}", "{99}", "{99999}", "{e<=1}", "{", "}",
    "\\", "[[a]", "[a--b]", "[a&&b]", "\n", " ", "#", "\x00", "\ud800", "é", "!", "-", "9" * 5000,
]  # fmt: skip
text = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(), max_size=20),
)
NET = Net()
NET.add_module("a" * 40 + "!", nn.Linear(2, 2))


def attempt(targets, **more):
    """A plan, or an error of ours, soon."""
    before, started = snapshot(NET), time.process_time()
    with contextlib.suppress(LoRAInjectError):
        plan(NET, targets, r=1, **more)
    assert time.process_time() - started < 20  # two seconds are the limit; the machine is shared
    assert changed_parts(before, snapshot(NET)) == []


@pytest.mark.filterwarnings("error")
@given(st.booleans(), text)
def test_any_text_is_a_target_or_is_refused_by_us(expression, pattern):
    attempt(f"re:{pattern}" if expression else pattern)


@given(
    st.recursive(
        st.one_of(text, st.none(), st.integers(), st.floats(), st.binary(max_size=3),
                  st.sampled_from([nn.Linear, int, nn.Linear(1, 1), lambda path, module: True])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3),
            st.dictionaries(text, st.dictionaries(st.sampled_from(["r", "alpha", "dropout", "x"]),
                                                  inner, max_size=2), max_size=3)),
        max_leaves=6,
    ),
    st.sampled_from(["exclude", "train_also", "layers", "targets", "parts", "rows"]),
)  # fmt: skip
def test_any_value_is_an_argument_or_is_refused_by_us(value, argument):
    attempt(**{"targets": "q_proj", argument: value})


@pytest.mark.parametrize(
    "expression",
    ["a{99999999}", "(((a{99}){99}){99}){99}", "(?x)a{9 9 9 9 9 9 9}", "(?x)a{9#\n9999999}",
     "(?:a{2,9999}){99999}", "(?>a{0,9}){9999999}", "(?R)", "(?1)(a)", "(?P<x>a(?&x))"],
)  # fmt: skip
def test_what_would_fill_the_memory_is_refused_unread(expression):
    tracemalloc.start()
    with pytest.raises(ArgumentError, match=r"multiply to more than|calls a group"):
        plan(NET, f"re:{expression}")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_counts_that_people_write_stay():
    assert [s.path for s in plan(NET, r"re:layers\.\d{1,3}\.[qv]_proj").sites] == [
        f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qv"
    ]
    Expression("a{1000}", "targets", ArgumentError, Limits())
    Expression("a{1}b{0,9}" * 30, "targets", ArgumentError, Limits())
    for above in ("a{7}b{7}c{7}d{7}", "a{1001}"):
        with pytest.raises(ArgumentError, match="multiply"):
            Expression(above, "targets", ArgumentError, Limits())


@pytest.mark.parametrize("flags", ["(?V0V1)", "(?au)", "(?Lu)"])
def test_flags_that_exclude_each_other_are_an_argument_error(flags):
    with pytest.raises(ArgumentError, match="not a regular expression"):
        parse(f"re:{flags}a", "targets")


def test_the_time_of_an_expression_is_that_of_a_whole_model():
    limits = Limits(seconds=0.3)
    assert Expression("a+", "targets", ArgumentError, limits).matches("aaa")
    assert 0.1 < limits.left < 0.3
    slow = Expression("(a|aa|aaa)+$", "targets", ArgumentError, limits)
    other = Expression("(b|bb|bbb)+$", "targets", ArgumentError, limits)
    started = time.perf_counter()
    for pattern, path in ((slow, "a" * 60 + "!"), (other, "b" * 60 + "!")):
        with pytest.raises(ArgumentError, match=r"longer than 0\.3 s"):
            pattern.matches(path)
    assert -10 < limits.left < 0
    assert time.perf_counter() - started < 30  # without: longer than anybody would wait


def test_expressions_have_a_length():
    with pytest.raises(ArgumentError, match="1 to 5 characters, 'aaaaaa' has 6"):
        Expression("a" * 6, "targets", ArgumentError, Limits(characters=5))
    Expression("a" * 2000, "targets", ArgumentError, Limits())
    with pytest.raises(ArgumentError, match="has 2001"):
        Expression("a" * 2001, "targets", ArgumentError, Limits())
    with pytest.raises(ArgumentError, match="has 0"):
        Expression("", "targets", ArgumentError, Limits())
