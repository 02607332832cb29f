"""An inspection as one HTML page that needs nothing else, its plots in it as PNG, or as one PNG of the plots."""

import base64
import io
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import torch

from torchrec_lma.inspection.measure import expected_sharing
from torchrec_lma.inspection.report import (
    InspectedMemory,
    Inspection,
    Pairs,
    about_error,
    neighbours_table,
    pairs_table,
)

SHOWN_LOADS = 0.995  # of the chunks; a few overfull ones would flatten the rest
MEASURED, EXPECTED, QUIET = "#1f5fa8", "#c44e1a", "#9aa5b1"
PARTS = ("#1f5fa8", "#7fb1e0", "#c44e1a", "#f0b48a")
WIDTH, LOAD, PAIRS = 7, 3.4, 4.2  # inches, of all plots and the heights of two
Draw = Callable[[Any], None]  # on axes of matplotlib
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
pre { background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { color: #52606d; font-size: 14px; }
"""


def check_page(path: str | os.PathLike[str]) -> None:
    """Raises what `write_page` would, as far as it can be told before there is anything to write."""
    try:
        import matplotlib.figure  # noqa: F401  an extra: only this needs it
    except ImportError as error:
        raise ValueError(
            "the page's plots need matplotlib; install torchrec_lma[plot], or leave out the page"
        ) from error
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file to write in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write in {path.parent}")


def write_page(inspection: Inspection, title: str, path: str | os.PathLike[str]) -> None:
    """Writes the page, or to a path that ends in .png its plots alone, under a temporary name first.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the page cannot be written.
    """
    check_page(path)
    path = Path(path)
    content = _plots(inspection, title) if path.suffix == ".png" else _page(inspection, title).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _page(inspection: Inspection, title: str) -> str:
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(inspection.about_source())}; {escape(inspection.about_data())}.<br>"
        f"Fingerprint <code>{inspection.fingerprint}</code></p>",
        *(f"<p><strong>Warning: {escape(one)}.</strong></p>" for one in (inspection.warning(),) if one),
        "<h2>Budget by part</h2>",
        _figure(
            _drawn(_budget_height(inspection), partial(_budget, inspection)),
            "Bytes of each memory: weights of rows that are shared and of rows of one id, "
            "and the allocation beside them.",
        ),
        _text(inspection.memory_table()),
        "<h2>Ids by kind</h2>",
        _text(inspection.table_table()),
        "<h2>Load of memory rows</h2>",
    ]
    for memory in inspection.memories:
        body.append(
            _figure(
                _drawn(LOAD, partial(_load, memory)),
                f"{memory.memory}: how many ids share a chunk of a shared row. The line is what hashing every id "
                "evenly would give (Poisson); signatures put similar ids together, which makes both ends heavier.",
            )
        )
    body.append(_text(inspection.load_table()))
    every = [(memory.memory, pairs) for memory in inspection.memories for pairs in memory.pairs]
    body.append("<h2>Shared memory against similarity</h2>")
    if not every:
        body.append("<p>No pairs: they need data, ids with a signature, and a source that takes sets from rows.</p>")
    for name, pairs in every:
        body.append(
            _figure(
                _drawn(PAIRS, partial(_pairs, pairs)),
                f"{name}, {pairs.source['name']}: each dot is a pair of ids with signatures. The line is "
                f"J^power + (1 - J^power) / shared rows. {about_error(pairs)} Over allocations of several seeds the "
                "means are on the line.",
            )
        )
        body.append(_text(pairs_table(name, pairs)))
    if inspection.neighbours:
        body.append("<h2>Similar ids</h2>")
        body += [_text(neighbours_table(one)) for one in inspection.neighbours]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _plots(inspection: Inspection, title: str) -> bytes:
    """All plots below each other, as PNG."""
    plots: list[tuple[float, str, Draw]] = [(_budget_height(inspection), "", partial(_budget, inspection))]
    for memory in inspection.memories:
        plots.append((LOAD, f"{memory.memory}: load of memory rows", partial(_load, memory)))
        plots += [
            (PAIRS, f"{memory.memory}: shared memory against similarity, by {one.source['name']}", partial(_pairs, one))
            for one in memory.pairs
        ]
    return _png(plots, title)


def _drawn(height: float, draw: Draw) -> bytes:
    return _png([(height, "", draw)])


def _png(plots: Sequence[tuple[float, str, Draw]], title: str = "") -> bytes:
    """Plots below each other, each with its height in inches, its title, and what draws it."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    heights = [height for height, _, _ in plots]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (_, name, draw) in zip(figure.subplots(len(plots), height_ratios=heights, squeeze=False).flat, plots):
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.set_title(name, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _budget_height(inspection: Inspection) -> float:
    return 1.3 + 0.5 * len(inspection.memories)


def _budget(inspection: Inspection, axes: Any) -> None:
    memories = inspection.memories
    left = [0.0] * len(memories)
    totals = [sum(memory.bytes_by_part.values()) for memory in memories]
    for part, color in zip(memories[0].bytes_by_part, PARTS):
        share = [100 * memory.bytes_by_part[part] / total for memory, total in zip(memories, totals)]
        axes.barh([memory.memory for memory in memories], share, left=left, color=color, label=part, height=0.6)
        for y, (start, width) in enumerate(zip(left, share)):
            if width >= 4:  # else the number does not fit
                light = color in (PARTS[1], PARTS[3])
                axes.text(
                    start + width / 2,
                    y,
                    f"{width:.0f}%",
                    ha="center",
                    va="center",
                    color="black" if light else "white",
                    fontsize=9,
                )
        left = [start + width for start, width in zip(left, share)]
    axes.set_xlabel("% of the bytes")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)


def _load(memory: InspectedMemory, axes: Any) -> None:
    histogram, mean = memory.load.histogram, memory.load.mean
    total = sum(histogram)
    shown, seen = 0, histogram[0]
    while seen < SHOWN_LOADS * total and shown + 1 < len(histogram):
        shown += 1
        seen += histogram[shown]
    # Bars of several loads each where there are many, so that a bar stays wide enough to see.
    step = max(1, math.ceil((shown + 1) / 60))
    starts = range(0, shown + 1, step)
    shares = [100 * sum(histogram[start : start + step]) / total for start in starts]
    axes.bar([start + (step - 1) / 2 for start in starts], shares, width=0.85 * step, color=MEASURED, label="chunks")
    poisson = [100 * sum(_poisson(mean, k) for k in range(start, start + step)) for start in starts]
    axes.plot([start + (step - 1) / 2 for start in starts], poisson, color=EXPECTED, label="even hashing")
    axes.axvline(mean, color=QUIET, linestyle="--", linewidth=1, label=f"mean {mean:.1f}")
    axes.set_xlabel(f"ids at a chunk (most: {memory.load.max:,})")
    axes.set_ylabel("% of the chunks" if step == 1 else f"% of the chunks, by {step} ids")
    axes.legend(frameon=False)


def _poisson(mean: float, k: int) -> float:
    return math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean else float(k == 0)


def _pairs(pairs: Pairs, axes: Any) -> None:
    axes.plot(pairs.similarity, pairs.shared, ".", color=MEASURED, alpha=0.3, markersize=6, label="a pair")
    line = torch.linspace(0, 1, 101, dtype=torch.float64)
    power = pairs.source["power"]
    theory = "J" if power == 1 else f"J^{power}"
    axes.plot(
        line,
        expected_sharing(line, power, pairs.shared_rows),
        color=EXPECTED,
        label=f"{theory} + (1 - {theory}) / {pairs.shared_rows:,}",
    )
    axes.errorbar(
        [one["similarity"] for one in pairs.bins],
        [one["shared"] for one in pairs.bins],
        yerr=[one["error_at_most"] for one in pairs.bins],
        fmt="o", color="black", markersize=5, capsize=3, label="mean of a tenth, std. error at most",
    )  # fmt: skip
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("Jaccard similarity J of the ids' sets in the data")
    axes.set_ylabel("share of the embedding in common")
    axes.legend(frameon=False, loc="upper left")
