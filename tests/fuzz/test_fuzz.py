"""Mutated inputs of every kind: refused by the documented errors or rightly taken, and nothing is left behind."""

import warnings

import pytest

from loquetier_jax.errors import DataError
from tests.fuzz.kind import fuzz
from tests.fuzz.kinds import KINDS

GROWTH = 1.05
ENGINE = pytest.mark.xdist_group("0-engine")  # it shares compiled functions with those tests


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=ENGINE if name == "requests" else ()) for name in KINDS])
def test_mutated_inputs_are_refused_by_type_or_rightly_taken(name, count, tmp_path):
    with KINDS[name](tmp_path) as kind:
        outcome = fuzz(kind, count)
    assert outcome.accepted and sum(outcome.refused.values()) > count / 10
    assert outcome.growth <= GROWTH


class Clumsy:
    """Refuses its inputs, and does `blunder` at one of them."""

    errors = (DataError,)

    def __init__(self, blunder):
        self.left, self._blunder = [], blunder

    def attempt(self, rng):
        if rng.random() < 0.2:
            self._blunder(self)
        raise DataError("line 1: wrong")

    def traces(self):
        return list(self.left)


def raw(kind):
    raise KeyError("messages")


def unprintable(kind):
    raise DataError("got \ud800")


def endless(kind):
    raise DataError("x" * 10_000)


@pytest.mark.parametrize(
    ("blunder", "told"),
    [
        (raw, "KeyError"),
        (lambda kind: warnings.warn("overflow", RuntimeWarning, stacklevel=1), "RuntimeWarning"),
        (lambda kind: kind.left.append("x"), "is .'x'"),
        (unprintable, "of no use"),
        (endless, "of no use"),
    ],
)
def test_a_blunder_would_be_seen(blunder, told):
    with pytest.raises(AssertionError, match=told):
        fuzz(Clumsy(blunder), 50)
