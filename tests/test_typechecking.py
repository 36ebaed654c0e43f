"""What annotations say of shapes and dtypes is enforced in tests, whatever starts them."""

import importlib

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from loquetier_jax.adapters.pages import AdapterPages, put_pages
from loquetier_jax.step.dropout import dropout
from tests.step.cases import tiny_spec
from tests.typechecking import PACKAGES

ROWS = {"x": jnp.ones((4, 8)), "keys": jnp.zeros(4, jnp.uint32), "rates": jnp.zeros(4), "layer": jnp.int32(0)}


@pytest.mark.parametrize(
    "wrong",
    [{"keys": jnp.zeros(5, jnp.uint32)}, {"x": jnp.ones(4)}, {"rates": jnp.zeros(4, jnp.int32)}, {"group": 3}],
    ids=["another size", "an axis short", "another dtype", "another type"],
)
def test_a_wrong_argument_is_refused(wrong: dict[str, object]) -> None:
    right = ROWS | {"group": "o_proj"}
    assert dropout(**right).shape == (4, 8)
    with pytest.raises(TypeCheckError, match=next(iter(wrong))):
        dropout(**right | wrong)


def test_adapters_are_checked_too() -> None:
    pages = AdapterPages.empty(tiny_spec(), 3, jnp.float32)
    with pytest.raises(TypeCheckError, match="page_ids"):
        put_pages(pages, jnp.ones(1), pages)


@pytest.mark.usefixtures("unchecked")
def test_a_test_may_ask_for_the_functions_own_refusal() -> None:
    with pytest.raises(TypeError, match="shapes"):
        dropout(**ROWS | {"group": "o_proj", "keys": jnp.zeros(5, jnp.uint32)})


def test_every_package_is_hooked() -> None:
    """A package that was imported before the hook was installed would not be checked at all."""
    for package in PACKAGES:
        assert "jaxtyping" in type(importlib.import_module(package).__spec__.loader).__module__, package
