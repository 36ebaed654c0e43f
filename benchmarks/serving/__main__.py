"""Serving figures of the shipped preset at Llama-3.1-8B shapes, one engine for all of them.

    python -m benchmarks.serving                                       # on a GPU
    python -m benchmarks.serving decode offline --peer vllm.json       # some of them, beside a peer's figures
    python -m benchmarks.serving --tiny                                # the same code on a CPU, to see that it runs

Writes results/<device>/serving.json. A peer's file has {"name", "records": [{"case", "metric", "value"}]}, measured on
the same card within the hour.
"""

import argparse
import json
import traceback
from pathlib import Path

from benchmarks.results import write
from benchmarks.serving import arrivals, decode, long_prompt, mixed_ranks, offline, overload, prefill, prefix, ttft
from benchmarks.serving.world import make_world

PARTS = {
    "decode": decode.run,
    "offline": offline.run,
    "prefill": prefill.run,
    "ttft": ttft.run,
    "arrivals": arrivals.run,
    "mixed_ranks": mixed_ranks.run,
    "overload": overload.run,
    "long_prompt": long_prompt.run,
    "prefix": prefix.run,
}


def beside(records: list[dict], path: Path | None) -> list[dict]:
    """The records with the peer's figures for the same cases, where the file has any."""
    if path is None:
        return records
    peer = json.loads(path.read_text(encoding="utf-8"))
    values = {(r["case"], r["metric"]): r["value"] for r in peer["records"]}
    found = [(r, values.get((r["case"], r["metric"]))) for r in records]
    return [r if value is None else {**r, "peer": peer["name"], "peer_value": value} for r, value in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--preset", help="another engine config than gpu (cpu with --tiny), to explore")
    parser.add_argument("--peer", type=Path, help="a peer's figures (JSON)")
    parser.add_argument("--out", type=Path, help="folder for the result, instead of benchmarks/results")
    args = parser.parse_args()
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"got {sorted(unknown)}, expected some of {list(PARTS)}")
    preset = args.preset or ("cpu" if args.tiny else "gpu")
    world, records, failures = make_world(args.tiny, preset), [], 0
    decode.ms_per_step(world, 8, len(world.adapters))  # what loads at first use has been loaded
    for name in args.parts or PARTS:
        try:  # a part that fails must not cost the others their turn on the machine
            found = beside(PARTS[name](world), args.peer)
        except Exception:
            traceback.print_exc()
            failures += 1
            continue
        records += found
        for r in found:
            ratio = f"  {r['value'] / r['peer_value']:.2f} x {r['peer']}" if "peer_value" in r else ""
            print(f"{r['case']:32} {r['metric']:20} {r['value']:10.2f} {r['unit']}{ratio}", flush=True)
    world.engine.check_integrity()
    shapes = "tiny" if args.tiny else "Llama-3.1-8B"
    print(write("serving", {"shapes": shapes, "preset": preset}, records, folder=args.out))
    raise SystemExit(failures)


if __name__ == "__main__":
    main()
