"""`make bench`: our service against other servers of the same network, in one interleaved run.

    python -m tests.bench.serving --sides 32,224 --concurrency 1,8,32 --seconds 6 --rounds 3

Measures, per side, our service with each engine, each peer (tests/bench/peers/) with eager torch as its documentation
shows and with the very int8 file that our engine runs, the in-process limit of each engine (decode and forward, no
HTTP), and an empty route on the same HTTP server; where there is a GPU, its engine too, and the peers' torch on it.
In each round every subject has its turn, in an order shuffled by a fixed seed, so that all meet the same neighbours:
a server is started, warmed up, asked by a closed-loop client at each concurrency (tests/bench/load.py, on the same
cores), its memory read, and stopped. Before the rounds each peer is tried with one worker and with one per core, and
keeps what answers more. Figures are medians over rounds; bars are ratios of medians with the lowest and the highest
ratio of a single round. A peer that cannot be installed or started is reported as skipped; a failure of our own
service fails the run.

Everything is saved after each subject, in tests/bench/results/serving.json; RESULTS.md and the plot follow from it,
again with `--report-only`. Environments, models and logs of the servers lie in `--cache`.
"""

import argparse
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from service.model.machine import cores
from tests.bench import limit, report
from tests.bench.inputs import payloads
from tests.bench.peers.catalogue import MODELS, PEERS
from tests.bench.subjects import WARMUP_S, Setting, Subject, engines, measure, models, subjects
from tests.bench.table import RESULTS, commit, machine

log = logging.getLogger("bench")

SEED = 34
CACHE = Path("/tmp/resnet34-bench")
RAW = RESULTS / "serving.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the report; 1 if our own service failed anywhere."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    if options.report_only:
        report.write(json.loads(options.raw.read_text()), options.raw.parent)
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # servers are stopped on the way out
    options.cache.mkdir(parents=True, exist_ok=True)
    options.raw.parent.mkdir(parents=True, exist_ok=True)
    settings, inputs = {}, {}
    for side_px in options.sides:
        bodies, inputs[str(side_px)] = payloads(side_px, options.cache)
        folder = models(side_px, options.cache)
        settings[side_px] = Setting(
            side_px, folder, options.cache, tuple(options.concurrency), options.seconds, bodies
        )  # fmt: skip
    every, tried = {}, {}
    for side_px, setting in settings.items():
        known = options.tried.get(str(side_px), {})
        chosen, tried[str(side_px)] = tune(options.peers, setting, options.workers, known)
        every[side_px] = subjects(options.peers, options.engines, chosen)
    facts = {
        "date": str(date.today()), "commit": commit(), "machine": machine(), "inputs": inputs, "sides": options.sides,
        "concurrency": options.concurrency, "seconds": options.seconds, "warmup_s": WARMUP_S,
        "rounds": options.rounds, "seed": SEED, "engines_of_service": list(engines()), "workers_tried": tried,
        "versions": {name: PEERS[name].version for name in options.peers},
    }  # fmt: skip
    records: list[dict[str, Any]] = []
    try:
        for record in rounds(every, settings, options.rounds):
            records.append(record)
            options.raw.write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")
    finally:  # whatever ends the run, what was measured is told
        if records:
            report.write({**facts, "records": records}, options.raw.parent)
    ours = [record for record in records if record["kind"] == "ours" and failure(record)]
    for record in ours:
        log.error("OUR OWN SERVICE FAILED: %s, side %d: %s", record["name"], record["side"], failure(record))
    return 1 if ours else 0


def tune(
    peers: Sequence[str], setting: Setting, counts: Sequence[int], known: Mapping[str, Mapping[str, float]]
) -> tuple[dict[tuple[str, str], int], dict[str, dict[str, float]]]:
    """The number of workers with which each peer and model answers most at the highest concurrency, and all rates.

    `known`: rates of an earlier run, which are not measured again.
    """
    chosen, tried = {}, {}
    short = replace(setting, concurrency=(max(setting.concurrency),), seconds=min(3.0, setting.seconds))
    for name in peers:
        for model in MODELS:
            rates = {int(count): rate for count, rate in known.get(f"{name}, {model}", {}).items()}
            for count in [count for count in counts if count not in rates] if len(counts) > 1 else ():
                measured = measure(Subject("peer", model, name, count), short)
                rates[count] = next(iter(measured["load"].values()))["throughput"] if "load" in measured else 0.0
                log.info("side %d %s, %s with %d workers: %.0f/s", setting.side_px, name, model, count, rates[count])
            chosen[name, model] = max(counts, key=lambda count: rates.get(count, 0.0))
            tried[f"{name}, {model}"] = {str(count): round(rate, 1) for count, rate in rates.items()}
    return chosen, tried


def rounds(
    every: Mapping[int, Sequence[Subject]], settings: Mapping[int, Setting], count: int
) -> Iterator[dict[str, Any]]:
    """Yield the record of each subject, round by round; what was skipped once has no further turn."""
    turns = [(number, side_px) for number in range(1, count + 1) for side_px in settings]
    skipped: set[tuple[int, str]] = set()
    started_s, done, total = time.monotonic(), 0, sum(len(every[side_px]) for _, side_px in turns)
    order = random.Random(SEED)
    for number, side_px in turns:
        for subject in order.sample(list(every[side_px]), len(every[side_px])):
            done += 1
            if (side_px, subject.name) in skipped:
                continue
            measured = measure(subject, settings[side_px])
            if "skipped" in measured:
                skipped.add((side_px, subject.name))
            record = {
                "side": side_px, "round": number, "name": subject.name, "kind": subject.kind, "model": subject.model,
                "peer": subject.peer, "workers": subject.workers, **measured,
            }  # fmt: skip
            left_min = (time.monotonic() - started_s) / done * (total - done) / 60
            log.info(
                "[%d/%d] round %d side %d %s: %s (about %.0f min left)",
                done, total, number, side_px, subject.name, summary(record), left_min,
            )  # fmt: skip
            if subject.kind == "ours" and failure(record):
                log.error("!!! OUR OWN SERVICE FAILED: %s: %s", subject.name, failure(record))
            yield record


def summary(record: dict[str, Any]) -> str:
    """A record in a few words."""
    if "load" in record:
        return ", ".join(
            f"{entry['throughput']:.0f}/s at {count}" + (f" ERRORS {entry['errors']}" if entry["errors"] else "")
            for count, entry in record["load"].items()
        )
    if "throughput" in record:
        return f"{record['throughput']:.0f}/s by {record['way']}, {record['p50_ms']:.1f} ms for one"
    return next(f"{key} ({record[key]})" for key in ("skipped", "failed") if key in record)


def failure(record: dict[str, Any]) -> str:
    """What went wrong with a server, if anything."""
    for key in ("failed", "skipped"):
        if key in record:
            return str(record[key])
    return "; ".join(
        f"{entry['errors']} at {count} ({entry['first_error']})"
        for count, entry in record.get("load", {}).items()
        if entry["errors"] or not entry["n"]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    def words(known: Sequence[str], text: str) -> list[str]:
        chosen = [part for part in text.split(",") if part]
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
        return chosen

    known = list(limit.engines())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=numbers, default=[32, 224])
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=6.0, help="of load at each concurrency, after 2 s of warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=lambda text: words(list(PEERS), text), default=list(PEERS))
    parser.add_argument("--engines", type=lambda text: words(known, text), default=known)
    parser.add_argument(
        "--tried", type=lambda path: json.loads(Path(path).read_text())["workers_tried"], default={}, metavar="JSON",
        help="serving.json of an earlier run, whose trials of workers hold",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=numbers, default=sorted({1, cores()}), help="of peers; of several the best is found first"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--raw", type=Path, default=RAW, help="where the raw rounds go; the report lies beside")
    parser.add_argument("--report-only", action="store_true", help="write RESULTS.md and the plot from --raw again")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
