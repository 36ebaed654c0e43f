"""Workloads: generated ones have the promised statistics, files are read or refused by line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loquetier_jax.cli.serve_loop import read_workload
from loquetier_jax.cli.workload import Workload, arrivals
from loquetier_jax.errors import ConfigError, DataError


def gaps(burstiness: float) -> np.ndarray:
    workload = Workload(rate=5.0, burstiness=burstiness, num_requests=4000)
    return np.diff([a.at for a in arrivals(workload, ["base"])])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation_of_a_gamma_process(burstiness: float) -> None:
    found = gaps(burstiness)
    assert found.mean() == pytest.approx(1 / 5.0, rel=0.1)
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_same_seed_same_requests() -> None:
    one, other = (arrivals(Workload(seed=3), ["a", "b"]) for _ in range(2))
    assert one == other
    assert len(one) == 100
    assert one != arrivals(Workload(seed=4), ["a", "b"])
    assert all(16 <= a.input_length <= 64 for a in one)


def test_rate_zero_is_all_at_once() -> None:
    assert {a.at for a in arrivals(Workload(rate=0.0, num_requests=5), ["base"])} == {0.0}


def test_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 2000, "input_length": 7, "output_length": 3, "hash_ids": [1]},
        {"timestamp": 500, "prompt": "hello", "output_length": 4, "adapter": "b"},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = arrivals(Workload(source=str(path), time_scale=0.5, output_len=(9, 9)), ["a", "b"])
    assert [a.at for a in found] == [0.0, 0.25, 1.0]
    assert [a.adapter for a in found] == ["a", "b", "a"]
    assert (found[2].input_length, found[2].output_length, found[2].prompt) == (7, 3, None)
    assert (found[0].output_length, found[0].prompt[0]["content"]) == (9, "hi")


def test_arrivals_a_second_a_line(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.txt"
    path.write_text("2\n3\n3\n10\n")
    found = arrivals(Workload(source=str(path), num_requests=3), ["base"])
    assert [a.at for a in found] == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("t.jsonl", "{", "t.jsonl:2: not JSON"),
        ("t.jsonl", "[]", "t.jsonl:2: got"),
        ("t.jsonl", '{"tokens": 3}', "t.jsonl:2: got"),
        ("t.jsonl", '{"timestamp": -1}', "t.jsonl:2: timestamp: got -1"),
        ("t.jsonl", '{"input_length": 0}', "t.jsonl:2: input_length: got 0"),
        ("t.jsonl", '{"prompt": "a", "messages": []}', "t.jsonl:2: got prompt and messages"),
        ("t.jsonl", '{"messages": [5]}', "t.jsonl:2: messages: got [5]"),
        ("t.jsonl", '{"prompt": 5}', "t.jsonl:2: prompt: got 5"),
        ("t.txt", "soon", "t.txt:2: got 'soon'"),
        ("t.txt", "nan", "t.txt:2: got 'nan'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, name: str, line: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(("{}" if name == "t.jsonl" else "1") + f"\n{line}\n")
    with pytest.raises(DataError) as error:
        arrivals(Workload(source=str(path)), ["base"])
    assert message in str(error.value)


def test_a_trace_may_not_name_an_adapter_that_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"adapter": "c"}\n')
    with pytest.raises(ConfigError, match=r"\['c'\]"):
        arrivals(Workload(source=str(path)), ["a"])


def test_assignments() -> None:
    names = ["a", "b", "c"]
    dealt = [a.adapter for a in arrivals(Workload(num_requests=6), names)]
    assert dealt == names * 2
    counts = Counter(a.adapter for a in arrivals(Workload(num_requests=3000, assign="zipf"), names))
    shares = np.array([counts[n] for n in names]) / 3000
    np.testing.assert_allclose(shares, np.array([6, 3, 2]) / 11, atol=0.03)
    even = Counter(a.adapter for a in arrivals(Workload(num_requests=3000, assign="uniform"), names))
    assert min(even.values()) > 900


@pytest.mark.parametrize("name", ["poisson", "burst", "offline"])
def test_presets_load(name: str) -> None:
    assert arrivals(read_workload(name, ["num_requests=3"]), ["base"])


@pytest.mark.parametrize(
    "wrong",
    [{"burstiness": 0}, {"num_requests": 0}, {"input_len": [4]}, {"input_len": [4, 2]}, {"assign": "fair"}, {"x": 1}],
)
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Workload.from_dict(wrong)
