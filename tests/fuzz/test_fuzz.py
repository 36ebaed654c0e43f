"""Mutated inputs of every kind: refused by the documented errors or rightly taken, and nothing is left behind."""

import random
import warnings
from functools import partial

import pytest

from loquetier_jax.errors import DataError, JobError
from tests.fuzz import mutate
from tests.fuzz.kind import MOST_GROWTH, fuzz, listing
from tests.fuzz.kinds import KINDS

# Of a checkpoint forged with good checksums orbax still reads other arrays when one has made it close its event loop.
pytestmark = pytest.mark.filterwarnings("ignore:(?s)Exception ignored in.*Event loop is closed")
ENGINE = pytest.mark.xdist_group("0-engine")  # it shares compiled functions with those tests


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=ENGINE if name == "requests" else ()) for name in KINDS])
def test_mutated_inputs_are_refused_by_type_or_rightly_taken(name, count, tmp_path):
    outcome = fuzz(KINDS[name], tmp_path, count)
    assert outcome.accepted and sum(outcome.refused.values()) > count / 10
    assert outcome.growth <= MOST_GROWTH


def test_a_seed_is_an_input():
    tree = {"messages": [{"role": "user", "content": "Hi"}], "n": [1, 2.5, None]}
    for make in (mutate.mutate_tree, mutate.mutate_bytes):
        given = tree if make is mutate.mutate_tree else b"some bytes"
        before = repr(given)
        made = [[repr(make(random.Random(f"0/{i}"), given)) for i in range(50)] for _ in range(2)]
        assert made[0] == made[1] and len(set(made[0])) > 20
        assert repr(given) == before


class Clumsy:
    """Refuses its input, having done what must be noticed."""

    errors = (DataError,)

    def __init__(self, folder, blunder):
        self.folder, self._blunder = folder, blunder

    def attempt(self, rng):
        self._blunder(self)
        raise DataError("line 1: wrong")

    def traces(self):
        return listing(self.folder)


def raises(error):
    def blunder(kind):
        raise error

    return blunder


HELD = []
BLUNDERS = {
    "KeyError": raises(KeyError("messages")),
    "JobError": raises(JobError("not what its documentation says")),
    "RuntimeWarning": lambda kind: warnings.warn("overflow", RuntimeWarning, stacklevel=1),
    "of no use": raises(DataError("x" * 10_000)),
    "'left'": lambda kind: (kind.folder / "left").touch(),
    "left open": lambda kind: HELD.append((kind.folder / "data").open()),
}


@pytest.mark.parametrize("told", BLUNDERS)
def test_a_blunder_would_be_seen(told, tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(AssertionError, match=told):
        fuzz(partial(Clumsy, blunder=BLUNDERS[told]), tmp_path, 1)
    while HELD:
        HELD.pop().close()
