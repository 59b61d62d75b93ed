"""The benchmark's arithmetic: from what was measured to what bench.json and the table say. PURE."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftvm_lab.bench_work import Outcome
from ftvm_lab.figures import quantile

UNPROTECTED = "unprotected"
POLICIES = ("fixed", "event", "adaptive")
PAGE = 4096
#: What a checkpoint consists of, in its order; as engine/stats.py names them.
STAGES = ("stop", "rest", "capture", "resume", "ship", "ack")
#: At most so many checkpoints of a workload, each time, are kept for the plots.
SAMPLES = 400

Row = dict[str, Any]
#: workload -> policy -> row
Rows = dict[str, dict[str, Row]]


@dataclass(frozen=True, slots=True)
class Epochs:
    """The checkpoints of a time, one entry each in every list. wire_bytes: what memory and devices took on the link."""

    pause_ms: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    epoch_ms: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    #: By stage.
    stages_ms: dict[str, list[float]] = field(default_factory=dict)


def epochs_between(text: str, start: float, end: float) -> Epochs:
    """From the engine's statistics, those lines that tell of nothing but the time from `start` to `end` (wall clock).

    A line is written a second after the last one, or later. The last line may be cut, and is left out.
    """
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    befores = [0.0, *(row["at"] for row in rows)]
    inside = [row for before, row in zip(befores, rows, strict=False) if start <= max(before, row["at"] - 1.5)
              and row["at"] <= end]

    def column(name: str) -> list[Any]:
        return [value for row in inside for value in row[name]]

    return Epochs(
        pause_ms=column("pause_ms"),
        pages=column("pages"),
        epoch_ms=column("epoch_ms"),
        wire_bytes=column("wire_bytes"),
        stages_ms={stage: column(f"{stage}_ms") for stage in STAGES},
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the hosts' kernels have counted, at a moment (wall clock). By the names of the parts."""

    at: float
    cpu_s: Mapping[str, float]
    rss_mib: Mapping[str, float]
    #: Sent by the primary's host to the network that the epochs go over.
    link_bytes: int = 0


def row(outcome: Outcome, before: Snapshot, after: Snapshot, epochs: Epochs | None) -> Row:
    """One workload under one policy, once. epochs: None without protection."""
    seconds = max(after.at - before.at, 1e-3)
    found: Row = {
        "throughput": round(outcome.throughput, 3),
        "unit": outcome.unit,
        "rtt_ms_p50": outcome.rtt_ms_p50,
        "rtt_ms_p99": outcome.rtt_ms_p99,
        "errors": outcome.errors,
        "curve_ms": outcome.curve_ms,
        "seconds": round(seconds, 2),
        "cores": {name: round((value - before.cpu_s[name]) / seconds, 4)
                  for name, value in after.cpu_s.items() if name in before.cpu_s},
        "rss_mib": {name: round(value, 1) for name, value in after.rss_mib.items()},
    }
    if epochs is None:
        return found
    link_mib_s = (after.link_bytes - before.link_bytes) / seconds / (1 << 20)
    return found | {"link_mib_s": round(link_mib_s, 3)} | _checkpoints(epochs)


#: Of several times their sum, or all of them, and of all else the mean.
_SUMS = ("errors", "seconds", "checkpoints", "samples")


def compared(policies: Mapping[str, Sequence[Row]]) -> dict[str, Row]:
    """One workload by policy, each of all its times: and what it is to the unprotected guest."""
    rows = {policy: _joined(times) for policy, times in policies.items()}
    base = rows[UNPROTECTED]
    for found in rows.values():
        found["throughput_ratio"] = _ratio(found["throughput"], base["throughput"])
        if found is not base and found["rtt_ms_p50"] is not None and base["rtt_ms_p50"] is not None:
            found["rtt_added_ms_p50"] = round(found["rtt_ms_p50"] - base["rtt_ms_p50"], 3)
    return rows


def _joined(times: Sequence[Row]) -> Row:
    """What all of them have."""
    names = [name for name in times[0] if all(name in one for one in times)]
    return {name: sum((one[name] for one in times[1:]), start=times[0][name]) if name in _SUMS
            else _mean([one[name] for one in times]) for name in names}


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {name: _mean([one[name] for one in values if name in one]) for name in first}
    if isinstance(first, list):
        return [_mean(points) for points in zip(*values, strict=False)]
    if isinstance(first, str) or len(values) == 1 or None in values:
        return first
    return round(sum(values) / len(values), 4)


def _checkpoints(epochs: Epochs) -> Row:
    count = len(epochs.pages)
    epoch_s = sum(epochs.epoch_ms) / 1000
    return {
        "checkpoints": count,
        "pause_ms_p50": round(quantile(epochs.pause_ms, 0.5), 3),
        "pause_ms_p99": round(quantile(epochs.pause_ms, 0.99), 3),
        "pause_share": _ratio(sum(epochs.pause_ms) / 1000, epoch_s),
        "epoch_ms_p50": round(quantile(epochs.epoch_ms, 0.5), 3),
        "pages_p50": quantile(epochs.pages, 0.5),
        "pages_p99": quantile(epochs.pages, 0.99),
        "wire_bytes_p50": quantile(epochs.wire_bytes, 0.5),
        "wire_ratio": _ratio(sum(epochs.wire_bytes), sum(epochs.pages) * PAGE),
        "stages_ms_p50": {stage: round(quantile(took, 0.5), 3) for stage, took in epochs.stages_ms.items()},
        "samples": thinned(list(zip(epochs.pages, epochs.pause_ms, strict=True)), SAMPLES),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def thinned(values: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most so many of them, evenly."""
    step = max(1, -(-len(values) // most))
    return list(values[::step])


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
    """Offset and slope of the line through the points, by the median of slopes (Theil and Sen): a pause that somebody
    else's work made long must not tilt it. None for fewer than two different places."""
    ordered = thinned_pairs(sorted(points))
    slopes = [(y - b) / (x - a) for place, (a, b) in enumerate(ordered) for x, y in ordered[place + 1:] if x > a]
    if not slopes:
        return None
    slope = quantile(slopes, 0.5)
    return quantile([y - slope * x for x, y in ordered], 0.5), slope


def thinned_pairs(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    return list(points[:: max(1, -(-len(points) // most))])


def pause_fit(rows: Rows) -> Row | None:
    """What a pause costs, over all workloads and policies: without pages, with a hundred, and each page."""
    points = [(float(pages), pause) for policies in rows.values() for found in policies.values()
              for pages, pause in found.get("samples", ())]
    fitted = line(points)
    if fitted is None:
        return None
    offset, slope = fitted
    return {
        "no_pages_ms": round(offset, 3),
        "at_100_pages_ms": round(offset + 100 * slope, 3),
        "per_page_us": round(slope * 1000, 3),
        "checkpoints": len(points),
    }


#: Column of the table -> field of a row, and its form.
COLUMNS = (
    ("ratio", "throughput_ratio", "{:.2f}"),
    ("p50 ms", "rtt_ms_p50", "{:.2f}"),
    ("p99 ms", "rtt_ms_p99", "{:.1f}"),
    ("pause p50", "pause_ms_p50", "{:.2f}"),
    ("p99", "pause_ms_p99", "{:.1f}"),
    ("epoch p50", "epoch_ms_p50", "{:.1f}"),
    ("pages", "pages_p50", "{:.0f}"),
    ("wire", "wire_ratio", "{:.2f}"),
)
CORES = ("guest", "engine", "libvirtd", "backup_engine", "backup_guest")


def table(rows: Rows) -> str:
    """For a person; '-' where there is nothing to say."""
    heads = ["workload", "policy", "throughput", *(title for title, _, _ in COLUMNS), *(f"{name} %" for name in CORES)]
    lines = [heads]
    for name, policies in rows.items():
        for policy, found in policies.items():
            rate = f"{found['throughput']:.1f} {found['unit']}"
            cores = [_said(found["cores"].get(part), "{:.1%}").rstrip("%") for part in CORES]
            lines.append([name, policy, rate, *(_said(found.get(key), form) for _, key, form in COLUMNS), *cores])
    widths = [max(len(cells[place]) for cells in lines) for place in range(len(heads))]
    return "\n".join("  ".join(
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip() for cells in lines)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def drift(measured: Mapping[str, Mapping[str, Sequence[Row]]]) -> dict[str, float | None]:
    """How far the machine itself changed: the unprotected guest's throughput at the end over that at first."""
    times = {name: policies[UNPROTECTED] for name, policies in measured.items() if UNPROTECTED in policies}
    return {name: _ratio(last["throughput"], first["throughput"])
            for name, (first, *_, last) in ((name, rows) for name, rows in times.items() if len(rows) > 1)}


@dataclass(frozen=True, slots=True)
class Goal:
    """Of a protected guest, by the policy `adaptive`."""

    what: str
    limit: float
    #: Is more better? Else it is a most.
    least: bool
    found: float | None

    @property
    def is_met(self) -> bool | None:
        """None: it was not measured."""
        if self.found is None:
            return None
        return self.found >= self.limit if self.least else self.found <= self.limit


#: The workload, the field of its row, what that is; the limit; is it a least?
_GOALS = (
    ("http_64", "throughput_ratio", "of unprotected", 0.85, True),
    ("redis_64", "throughput_ratio", "of unprotected", 0.85, True),
    ("echo_32", "throughput_ratio", "of unprotected", 0.75, True),
    ("echo_8_16k", "throughput_ratio", "of unprotected", 0.6, True),
    ("echo_1", "rtt_added_ms_p50", "ms added to a round trip, median", 5.0, False),
    ("http_64", "wire_ratio", "of the raw pages on the wire", 0.4, False),
    ("processor", "throughput_ratio", "of unprotected", 0.95, True),
)


#: Nothing of these goes over the network.
_WITHOUT_NETWORK = ("processor", "memory", "idle")


def goals(rows: Rows, pause: Row | None) -> list[Goal]:
    """What this benchmark wants to reach, and what it found. pause: bench-pause's."""
    adaptive = {name: policies.get("adaptive", {}) for name, policies in rows.items()}
    found = [Goal(f"{name}: {meaning}", limit, least, adaptive.get(name, {}).get(key))
             for name, key, meaning, limit, least in _GOALS]
    for other in ("fixed", "event"):
        for key, meaning, least in (("throughput", "throughput", True), ("rtt_ms_p50", "median round trip", False)):
            shares = [row[key] / rows[name][other][key] for name, row in adaptive.items()
                      if not name.startswith(_WITHOUT_NETWORK) and row.get(key) and rows[name].get(other, {}).get(key)]
            worst = (min if least else max)(shares, default=None)
            found.append(Goal(f"{meaning} over that of {other}, the worst workload", 1.0, least,
                              None if worst is None else round(worst, 3)))
    return [*found, Goal("pause with 100 pages over QEMU's own", 1.3, False, (pause or {}).get("over_floor")),
            Goal("each further page over its copy", 3.0, False, (pause or {}).get("over_memcpy"))]


def goal_table(reached: Sequence[Goal]) -> str:
    marks = {True: "met", False: "NOT met", None: "not measured"}
    width = max(len(goal.what) for goal in reached)
    return "\n".join(f"{goal.what.ljust(width)}  {_said(goal.found, '{:.2f}'):>6}  {'>=' if goal.least else '<='} "
                     f"{goal.limit:.2f}  {marks[goal.is_met]}" for goal in reached)
