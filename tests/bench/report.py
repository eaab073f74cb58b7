"""From the raw rounds of the serving bench to its page: medians, bars as ratios, tables in RESULTS.md, a plot."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
COLOURS = {"ours": "#1f77b4", "peer": "#b0b0b0", "limit": "#2ca02c", "empty": "#ff7f0e"}
LEGEND = {"ours": "this service", "peer": "peers", "limit": "in process, no HTTP", "empty": "empty route"}


@dataclass(frozen=True)
class Figures:
    """One subject at one side: medians over its rounds."""

    record: Record
    """Its first whole round: name, kind, model, peer, workers."""
    throughput: dict[int, float]
    """By concurrency; of an in-process limit its best way, at every concurrency."""
    p50_ms: dict[int, float]
    p99_ms: dict[int, float]
    errors: dict[str, int]
    n: int
    rounds: dict[int, dict[str, float]]
    """By round: throughput at the highest concurrency, p50 at the lowest."""
    pss: float = math.nan
    rss: float = math.nan
    startup_s: float = math.nan
    first_answer_s: float = math.nan


def figures(records: Iterable[Record], side_px: int, concurrency: Sequence[int]) -> dict[str, Figures]:
    """By subject's name, those that were measured at least once."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        if record["side"] == side_px and ("load" in record or "throughput" in record):
            grouped.setdefault(record["name"], []).append(record)
    return {name: _figures(found, concurrency) for name, found in grouped.items()}


def _figures(found: list[Record], concurrency: Sequence[int]) -> Figures:
    low, high = min(concurrency), max(concurrency)
    if "throughput" in found[0]:
        rate, p50 = (statistics.median(record[key] for record in found) for key in ("throughput", "p50_ms"))
        by_round = {
            record["round"]: {"throughput": record["throughput"], "p50_ms": record["p50_ms"]} for record in found
        }
        n = sum(record["n"] for record in found)
        return Figures(found[0], dict.fromkeys(concurrency, rate), {low: p50}, {}, {}, n, by_round)
    loads = [record["load"] for record in found]

    def medians(key: str) -> dict[int, float]:
        return {count: _median(load[str(count)][key] for load in loads) for count in concurrency}

    errors: dict[str, int] = {}
    for load in loads:
        for entry in load.values():
            for kind, count in entry["errors"].items():
                errors[kind] = errors.get(kind, 0) + count
    by_round = {
        record["round"]: {
            "throughput": record["load"][str(high)]["throughput"], "p50_ms": record["load"][str(low)]["p50_ms"],
        }
        for record in found
    }  # fmt: skip
    return Figures(
        found[0], medians("throughput"), medians("p50_ms"), medians("p99_ms"), errors,
        sum(entry["n"] for load in loads for entry in load.values()), by_round,
        _median(record["memory"]["pss"] for record in found), _median(record["memory"]["rss"] for record in found),
        _median(record["startup_s"] for record in found), _median(record["first_answer_s"] for record in found),
    )  # fmt: skip


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


Bar = tuple[str, str, str]
"""What is compared, with what, and the ratio or difference with its range over rounds."""


def bars(found: dict[str, Figures], concurrency: Sequence[int]) -> list[Bar]:
    """Our service, per engine, against the best peers and the in-process limit of the same engine."""
    high = max(concurrency)
    lines: list[Bar] = []
    for ours in found.values():
        if ours.record["kind"] != "ours":
            continue
        engine = ours.record["model"]
        for what, model in (
            ("best peer as documented (torch)", "torch"),
            ("best peer with the int8 file", "openvino-int8"),
        ):
            peers = [one for one in found.values() if one.record["kind"] == "peer" and one.record["model"] == model]
            if peers:
                best = max(peers, key=lambda one: one.throughput[high])
                lines.append((f"{engine} / {what}", best.record["name"], _ratio(ours, best, "throughput", high)))
        limit = found.get(f"in process, {engine}")
        if limit is not None:
            way = str(limit.record["way"])
            lines.append((f"{engine} / in process, same engine", way, _ratio(ours, limit, "throughput", high)))
            forward = limit.record.get("forward")
            if forward:  # of a GPU
                ratio = f"{forward['infer'] / forward['bare_graph']:.2f}"
                lines.append((f"{engine}: batches of 32 decoded already / the bare CUDA graph", "one round", ratio))
                served, in_process = ours.throughput[high], limit.throughput[high]
                lines.append((f"{engine}: what binds", *bottleneck(served, in_process, forward["infer"])))
            lines.append(
                (
                    f"{engine}: p50 at {min(concurrency)} minus in process",
                    "one image",
                    _difference(ours, limit, concurrency),
                )
            )
    return lines


BUSY = 0.8
"""Of what a stage can do by itself: who does so much of it is held up by that stage, not by the next one."""


def bottleneck(served: float, in_process: float, forward: float) -> tuple[str, str]:
    """What holds a service on one GPU up, and the images per second that say so.

    `served` over HTTP, `in_process` with decoding on all cores and no HTTP, `forward` of batches decoded already.
    """
    if served >= BUSY * forward:
        binds = "the GPU"
    elif served >= BUSY * in_process:
        binds = "decoding and resizing, on the processor"
    else:
        binds = "HTTP and batching, on the processor"
    return binds, f"{served:.0f}/s served, {in_process:.0f} in process, {forward:.0f} decoded already"


def _ratio(one: Figures, other: Figures, key: str, high: int) -> str:
    ratios = _both(one, other, key, lambda a, b: a / b if b else math.nan)
    middle = one.throughput[high] / other.throughput[high] if other.throughput[high] else math.nan
    return f"{middle:.2f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")


def _difference(one: Figures, other: Figures, concurrency: Sequence[int]) -> str:
    differences = _both(one, other, "p50_ms", lambda a, b: a - b)
    middle = one.p50_ms[min(concurrency)] - other.p50_ms[min(concurrency)]
    return f"{middle:.2f} ms" + (f" ({min(differences):.2f} to {max(differences):.2f})" if differences else "")


def _both(one: Figures, other: Figures, key: str, of: Callable[[float, float], float]) -> list[float]:
    """`of` in each round that both took part in."""
    return [of(one.rounds[i][key], other.rounds[i][key]) for i in sorted(one.rounds.keys() & other.rounds.keys())]


def write(data: dict[str, Any], folder: Path) -> None:
    """RESULTS.md into the folder above `folder`, the plot into `folder`."""
    tables = {side_px: figures(data["records"], side_px, data["concurrency"]) for side_px in data["sides"]}
    tables = {side_px: found for side_px, found in tables.items() if found}
    (folder.parent / "RESULTS.md").write_text(page(data, tables, folder.name))
    if tables:
        plot(tables, data["concurrency"], folder / "serving.png")


def page(data: dict[str, Any], tables: dict[int, dict[str, Figures]], folder: str = "results") -> str:
    """The Markdown page."""
    done = max((record["round"] for record in data["records"]), default=0)
    lines = [
        "# Serving", "", f"{data['date']}, {_commit(data)}, {data['machine']}. Written by `make bench`; raw rounds: "
        f"[serving.json]({folder}/serving.json).", "",
        f"Closed-loop client on the same cores, keep-alive, {data['seconds']:g} s at each concurrency after "
        f"{data['warmup_s']:g} s of warm-up; {done} of {data['rounds']} rounds, subjects in shuffled turns "
        f"(seed {data['seed']}). Figures are medians over rounds; n is the sum of answers. What binds where a bar is "
        f"missed, and what was tried: [serving-limits.md]({folder}/serving-limits.md).",
        "", f"![Throughput]({folder}/serving.png)",
    ]  # fmt: skip
    for side_px, found in tables.items():
        lines += ["", f"## {side_px} px", "", f"Inputs: {data['inputs'][str(side_px)]}.", ""]
        lines += _bars_table(bars(found, data["concurrency"]), max(data["concurrency"]))
        lines += ["", *_table(found, data)]
        tried = data.get("workers_tried", {}).get(str(side_px), {})
        lines += ["", *_workers(tried), *_missing(data["records"], side_px)]
    return "\n".join(lines).rstrip() + "\n"


def _commit(data: dict[str, Any]) -> str:
    return f"commit {data['commit']}" if data.get("commit") else "commit not recorded"


def _bars_table(lines: list[Bar], high: int) -> list[str]:
    rows = [f"| {what} | {other} | {value} |" for what, other, value in lines]
    title = f"| this service / other, throughput at {high} | the other | ratio (rounds) |"
    return [title, "|---|---|---|", *rows]


def _table(found: dict[str, Figures], data: dict[str, Any]) -> list[str]:
    counts, high = data["concurrency"], max(data["concurrency"])
    header = ["subject", "version", *(f"img/s at {count}" for count in counts)]
    header += [f"p50 ms at {count}" for count in counts] + [f"p99 ms at {count}" for count in counts]
    header += ["PSS MiB", "RSS MiB", "ready s", "first answer s", "errors", "n"]
    rows = []
    for name, one in sorted(found.items(), key=lambda entry: -entry[1].throughput[high]):
        limit = one.record["kind"] == "limit"
        rate = [f"{one.throughput[count]:.0f}" if count == high or not limit else "" for count in counts]
        cells = [
            f"{name} ({one.record['way']})" if limit else name,
            data["versions"].get(one.record["peer"], ""),
            *rate,
        ]
        cells += [_number(table.get(count), 1) for table in (one.p50_ms, one.p99_ms) for count in counts]
        cells += [_number(one.pss, 0), _number(one.rss, 0), _number(one.startup_s, 1), _number(one.first_answer_s, 1)]
        cells += [", ".join(f"{count} {kind}" for kind, count in one.errors.items()), str(one.n)]
        rows.append("| " + " | ".join(cells) + " |")
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *rows]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _workers(tried: dict[str, dict[str, float]]) -> list[str]:
    """What each peer answered per second with other numbers of workers, before the rounds."""
    rates = [
        f"{name}: " + ", ".join(f"{rate:.0f} with {count}" for count, rate in by_count.items())
        for name, by_count in tried.items()
        if by_count
    ]
    return [f"- workers of peers tried beforehand, img/s; the best was kept: {'; '.join(rates)}"] if rates else []


def _missing(records: Iterable[Record], side_px: int) -> list[str]:
    """A line for each subject that was skipped or failed, and each round with errors."""
    lines = []
    for record in records:
        if record["side"] != side_px:
            continue
        loud = "**" if record["kind"] == "ours" else ""
        for key in ("skipped", "failed"):
            if key in record:
                reason = " ".join(str(record[key]).split())[:400]
                lines.append(f"- {loud}{record['name']} {key}{loud} (round {record['round']}): {reason}")
        for count, entry in record.get("load", {}).items():
            if entry["errors"]:
                first = " ".join(entry["first_error"].split())[:200]
                lines.append(
                    f"- {loud}{record['name']} had errors{loud} (round {record['round']}, at {count}): "
                    f"{entry['errors']}, the first: {first}"
                )
    return lines


def plot(tables: dict[int, dict[str, Figures]], concurrency: Sequence[int], path: Path) -> None:
    """Throughput of every subject, a bar per concurrency, on a log scale; one panel a side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    high = max(concurrency)
    rows = max(len(found) for found in tables.values())
    figure, axes = pyplot.subplots(1, len(tables), figsize=(8 * len(tables), 1.5 + 0.42 * rows), squeeze=False)
    for panel, (side_px, found) in zip(axes[0], tables.items(), strict=True):
        ordered = sorted(found.values(), key=lambda one: one.throughput[high])
        height = 0.8 / len(concurrency)
        for place, one in enumerate(ordered):
            kind = one.record["kind"]
            shown = [high] if kind == "limit" else list(concurrency)
            for step, count in enumerate(shown):
                value = one.throughput[count]
                thick = 0.8 if kind == "limit" else height
                at = place if kind == "limit" else place + (step - (len(shown) - 1) / 2) * height
                shade = 1.0 if len(shown) == 1 else 0.35 + 0.65 * step / (len(shown) - 1)
                panel.barh(at, value, height=thick * 0.92, color=COLOURS[kind], alpha=shade)
            panel.annotate(
                f"{one.throughput[high]:.0f}", (one.throughput[high], place), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        panel.set_yticks(range(len(ordered)), [one.record["name"] for one in ordered], fontsize=9)
        panel.set_xscale("log")
        panel.margins(x=0.12, y=0.01)
        panel.set_xlabel("images per second (log scale)")
        panel.set_title(f"{side_px} px")
        panel.grid(axis="x", alpha=0.3)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=LEGEND[kind]) for kind in LEGEND]
    shades = ", ".join(str(count) for count in concurrency)
    figure.legend(
        handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9,
        title=f"pale to full: concurrency {shades}; figures at {high}", title_fontsize=9,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.9 / (1.5 + 0.42 * rows), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
