"""The SMLM benchmark's cases, and the picture of its results."""

import json
import re
import subprocess
from pathlib import Path

import pytest

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
