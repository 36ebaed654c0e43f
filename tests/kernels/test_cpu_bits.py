"""What keeps a row's bits on a CPU, and the look at whether they are kept."""

import logging

import jax
import pytest

from loquetier_jax.runtime.warmup import tell_of_broken_bits, warn_of_broken_bits
from pallas_kernels.common import cpu_bits


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Every test finds options out anew, and leaves nothing behind."""
    cpu_bits.cpu_options.cache_clear()
    yield
    cpu_bits.cpu_options.cache_clear()


@pytest.mark.bits
def test_rows_keep_their_bits_here() -> None:
    assert cpu_bits.differing(cpu_bits.SHAPES, cpu_bits.ROWS) == []


@pytest.mark.bits
def test_a_difference_is_seen() -> None:
    """A row alone is multiplied as a vector, which sums in another order."""
    assert cpu_bits.differing(cpu_bits.DEEP_SHAPES, (1,)) == [(1, *cpu_bits.DEEP_SHAPES[0])]


def test_fusions_are_off_unless_the_user_has_switched_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ynn, *others = cpu_bits.FUSIONS
    monkeypatch.setenv("XLA_FLAGS", "")
    assert cpu_bits.compiler_options() == dict.fromkeys(cpu_bits.FUSIONS, "")
    assert cpu_bits.xla_flags("--other=1").split() == ["--other=1", *(f"--{name}=" for name in cpu_bits.FUSIONS)]
    cpu_bits.cpu_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", f"--{ynn}=dot --{others[0]}=")
    assert cpu_bits.compiler_options() == dict.fromkeys(others, "")
    assert cpu_bits.xla_flags(f"--{ynn}=dot").split() == [f"--{ynn}=dot", *(f"--{name}=" for name in others)]


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cpu_bits.compiler_options()
    cpu_bits.cpu_options.cache_clear()
    monkeypatch.setattr(cpu_bits, "FUSIONS", (*cpu_bits.FUSIONS, "xla_cpu_experimental_fusion_of_tomorrow"))
    assert cpu_bits.compiler_options() == known


def test_other_devices_take_no_options_and_are_promised_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cpu_bits.compiler_options() == {}


def test_an_engine_says_once_where_bits_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_bits, "rows_keep_their_bits", lambda _: False)
    warn_of_broken_bits.cache_clear()
    with caplog.at_level(logging.WARNING):
        tell_of_broken_bits()
        tell_of_broken_bits()
    assert [record.getMessage() for record in caplog.records] == [cpu_bits.BROKEN]
    warn_of_broken_bits.cache_clear()
