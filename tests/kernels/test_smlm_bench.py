"""The SMLM benchmark's cases, and the picture of its results."""

import json
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import smlm_backward, smlm_runs
from benchmarks.kernels.plot_smlm import save_plot
from benchmarks.kernels.smlm_chain import PEERS, make_case
from benchmarks.results import record, write


def test_a_case_is_read_from_its_path() -> None:
    mixed = make_case("4096x14336/r64/mixed/n11")
    assert (mixed.rows, mixed.runs[:4], mixed.pages) == (1568, (1024, 256, 256, 4), (4,) * 11)
    assert mixed.adapter_bytes == 2 * 11 * 64 * (4096 + 14336)
    ranks = make_case("4096x4096/r8-128/dec40/n5")
    assert (ranks.ranks, ranks.pages, ranks.runs) == ((8, 16, 32, 64, 128), (1, 1, 2, 4, 8), (8,) * 5)
    assert make_case("qkv/r16/dec32/n4").adapter_bytes == 2 * 4 * 16 * (3 * 4096 + 6144)
    assert ranks.part(3).runs == (8,) and ranks.part(3).ranks == (64,)


def test_the_picture_shows_every_case_that_has_a_peer(tmp_path: Path) -> None:
    records = []
    for name, (peer, us) in PEERS.items():
        floor = make_case(name).floor_us
        records.append(record(f"smlm/{name}", "fwd_us", 0.6 * us, "us", bound=floor, peer=peer, peer_value=us))
        records.append(record(f"smlm/{name}", "fwd_cold_us", 0.8 * us, "us", bound=floor))
    path = tmp_path / "smlm.json"
    path.write_text(json.dumps({"device": "a GPU", "records": records}))
    assert save_plot(path).read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({"device": "a GPU", "records": records[1:2]}))
    with pytest.raises(ValueError, match="without a fwd_us record that names a peer"):
        save_plot(path)


def test_a_result_names_the_commit_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without .git may lie inside another repository, which git would describe."""

    def commit() -> str:
        return json.loads(write("case", {}, [], tmp_path).read_text())["commit"]

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOQUETIER_COMMIT", "abc1234")
    assert commit() == "abc1234"
    monkeypatch.delenv("LOQUETIER_COMMIT")
    assert re.fullmatch("[0-9a-f]{7,}", commit())


def test_the_backward_has_the_cases_of_its_peers() -> None:
    cases = {case.name: case for case in smlm_backward.make_cases()}
    assert len(cases) == 14 and set(smlm_backward.PEERS) <= set(cases)
    for case in cases.values():
        assert 2 * case.copies <= case.calls <= smlm_backward.MAX_CALLS
        assert case.copies * case.row_bytes >= 1 << 27
    one = cases["4096x14336/r64/mixed/n11"]
    assert (one.packs, one.pages, one.ranks, one.weights) == (1, 4, 64, 64 * (4096 + 14336))
    assert cases["qkv/r16/4x1024/n4"].weights == 4 * 16 * (3 * 4096 + 6144)


@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_chain_of_backwards_is_that_many_backwards(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smlm_backward, "ROWS", 16)
    monkeypatch.setattr(smlm_backward, "POOL_BYTES", 10_000)
    case = smlm_backward.Case("tiny", 2, 32, (48, 16), 20)
    bench = smlm_backward.Bench(case, cold=cold)
    assert (len(bench.state[0]), bench.calls) == (2 if cold else 1, 4)
    got_xs, got_grads = bench.dispatch(bench.compile(smlm_backward.packs_xla, loops=2))
    xs, grads = list(bench.state[0]), list(bench.state[1])
    for i in [*range(bench.calls)] * 2:
        dys, *mine = bench.args
        at = i % len(xs)
        arrays = (xs[at], dys[at], *(arrays[i] for arrays in mine))
        xs[at], *grads[i] = bench.call(smlm_backward.packs_xla, *arrays)
    for got, want in zip([*got_xs, *sum(got_grads, ())], [*xs, *sum(map(tuple, grads), ())], strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=2**-5)


@pytest.mark.slow
def test_the_backward_is_checked_timed_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smlm_backward, "ROWS", 16)
    monkeypatch.setattr(smlm_backward, "POOL_BYTES", 4_000)
    monkeypatch.setattr(smlm_backward, "PEERS", {"tiny": 41.0})
    monkeypatch.setattr("benchmarks.kernels.smlm_chain.CHAIN_MS", 0.02)
    records = smlm_backward.backward_records([smlm_backward.Case("tiny", 1, 32, (48,), 16)])
    found = {r["metric"]: r for r in records}
    assert set(found) == {"bwd_us", "bwd_xla_us", "bwd_cold_us", "bwd_xla_cold_us"}  # torch's need a GPU
    assert found["bwd_us"]["peer_value"] == 41.0 and "peer_value" not in found["bwd_cold_us"]
    assert found["bwd_us"]["bound"] == found["bwd_cold_us"]["bound"] and "bound" not in found["bwd_xla_us"]


def test_random_runs_have_the_rows_and_pages_of_their_packs() -> None:
    for case in smlm_runs.make_cases():
        plan = case.plan()
        wide = plan.wide_pages[: plan.used[1]]
        assert plan.tile_len.sum() == case.packs * case.rows == 1024 and plan.used[1] == plan.used[2]
        assert sorted(set(wide.flatten().tolist())) == [*range(1, 1 + case.packs * case.pages)]


@pytest.mark.slow
def test_runs_are_checked_timed_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smlm_backward, "ROWS", 40)
    monkeypatch.setattr(smlm_backward, "POOL_BYTES", 4_000)
    monkeypatch.setattr("benchmarks.kernels.smlm_chain.CHAIN_MS", 0.02)
    records = smlm_runs.runs_records([smlm_runs.RunsCase("tiny", 4, 32, (48,), 16)])
    kinds = ("runs", "packs", "pack")
    assert [r["metric"] for r in records] == [f"bwd_{kind}_{us}" for us in ("us", "cold_us") for kind in kinds]
