"""The benchmark's pictures: latencies, throughput by policy, pauses against dirty pages. For bench.py."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.figure import Figure

from ftvm_lab.bench_figures import POLICIES, UNPROTECTED, Row, Rows

#: One colour a policy, in all pictures; told apart by those who see no red or green.
COLOURS = dict(zip((UNPROTECTED, *POLICIES), ("#555555", "#D55E00", "#0072B2", "#009E73"), strict=True))
_SIZE = (11.0, 4.5)


def draw(rows: Rows, fit: Row | None, folder: Path, stem: str) -> list[Path]:
    """Writes the pictures that there is something for; returns their files."""
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"latency": _latency(rows), "throughput": _throughput(rows), "pause": _pause(rows, fit)}
    files = []
    for name, picture in drawn.items():
        if picture is not None:
            files.append(folder / f"{stem}-{name}.png")
            picture.tight_layout()
            picture.savefig(files[-1], dpi=120)
            pyplot.close(picture)
    return files


def _latency(rows: Rows) -> Figure | None:
    """One field a workload whose whole distribution is known."""
    known = [name for name, policies in rows.items() if any(found["curve_ms"] for found in policies.values())]
    if not known:
        return None
    width = max(_SIZE[0], 3.2 * len(known))
    picture, grid = pyplot.subplots(1, len(known), figsize=(width, _SIZE[1]), sharey=True, squeeze=False)
    for name, field in zip(known, grid[0], strict=True):
        for policy, found in rows[name].items():
            curve = found["curve_ms"]
            shares = [100 * place / max(1, len(curve) - 1) for place in range(len(curve))]
            field.plot(curve, shares, color=COLOURS[policy], label=policy)
        field.set(title=name, xscale="log", xlabel="round trip, ms", ylim=(0, 100))
        field.grid(alpha=0.3)
    grid[0][0].set_ylabel("% of the replies within")
    grid[0][0].legend()
    return picture


def _throughput(rows: Rows) -> Figure | None:
    names = [name for name in rows if name != "idle"]
    if not names:
        return None
    picture, field = pyplot.subplots(figsize=(max(_SIZE[0], 0.8 * len(names)), _SIZE[1]))
    width = 0.8 / len(POLICIES)
    for place, policy in enumerate(POLICIES):
        shown = [(number, rows[name][policy]["throughput_ratio"]) for number, name in enumerate(names)
                 if policy in rows[name]]
        field.bar([number + (place - 1) * width for number, _ in shown], [ratio or 0.0 for _, ratio in shown], width,
                  color=COLOURS[policy], label=policy)
    field.axhline(1.0, color=COLOURS[UNPROTECTED], linewidth=1)
    field.set_xticks(range(len(names)), names, rotation=35, ha="right")
    field.set_ylabel("throughput over unprotected")
    field.legend()
    return picture


def _pause(rows: Rows, fit: Row | None) -> Figure | None:
    samples = {policy: list(_samples(rows, policy)) for policy in POLICIES}
    if not any(samples.values()):
        return None
    picture, field = pyplot.subplots(figsize=_SIZE)
    for policy, points in samples.items():
        field.scatter([pages for pages, _ in points], [pause for _, pause in points], s=4, alpha=0.4,
                      color=COLOURS[policy], label=policy)
    if fit is not None:
        ends = (1.0, float(max(pages for points in samples.values() for pages, _ in points)))
        field.plot(ends, [fit["no_pages_ms"] + fit["per_page_us"] * pages / 1000 for pages in ends], color="black",
                   label=f"{fit['no_pages_ms']:.2f} ms + {fit['per_page_us']:.2f} us a page")
    field.set_xscale("symlog", linthresh=10)
    field.set(yscale="log", xlabel="dirty pages", ylabel="pause, ms")
    field.grid(alpha=0.3)
    field.legend()
    return picture


def _samples(rows: Rows, policy: str) -> Iterable[tuple[int, float]]:
    for policies in rows.values():
        yield from policies.get(policy, {}).get("samples", ())
