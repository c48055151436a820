"""The page of ``scaling.py``: exponents, figure, and what follows for a billion weights.

Everything comes from files: ``scaling.csv``, ``memory.csv`` and ``shards.csv``. An exponent is the
slope of a least-squares line through the logarithms of the four largest sizes, a decade and a half;
the least and the most are the slopes between neighbours among these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_bmr.plots.theme import BLUE, GREY, SKY, VERMILION

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, EXPONENTS = HERE / "scaling.csv", HERE / "scaling_exponents.csv"
PAGE = ROOT / "docs" / "how-it-grows.md"
FIGURE = ROOT / "docs" / "images" / "scaling.png"

# So many sizes of half a decade each.
UPPER = 4
QUANTITIES = ("seconds", "MiB")
FLOAT32, FLOAT64, PARAMETERS = 4, 8, 2
WEIGHTS = (10**9, 10**10)
RANKS = (2, 4, 8, 16, 64)
# What the examples take for granted: GB of memory of one rank, and GB a second of one link.
RANK_GB, LINK_GB = 80, 25
# Elements of a dense posterior, which users have asked for.
DENSE = 50_000

CALLS = {
    "fit": "`fit`, a compiled step",
    "reduce": "`reduce(guide)`",
    "presence": "`presence(guide)`",
    "compact": "`compact`",
    "to_arviz": "`to_arviz`, 100 draws",
    "reduce, correlated": "`reduce`, correlated",
    "presence, correlated": "`presence`, correlated, 200 steps",
}
# Those of correlated posteriors are dashed.
STYLES = {
    "fit": (VERMILION, "s", "-"),
    "reduce": (BLUE, "o", "-"),
    "presence": (SKY, "^", "-"),
    "compact": ("black", "D", "-"),
    "to_arviz": (GREY, "v", "-"),
    "reduce, correlated": (BLUE, "o", "--"),
    "presence, correlated": (SKY, "^", "--"),
}


def write_page(results: Path, exponents: Path) -> None:
    """Write the exponents, draw the figure and fill in the tables."""
    table = pd.read_csv(results)
    found = find_exponents(table)
    found.to_csv(exponents, index=False)
    print(found.to_string(index=False))
    figure = draw(table)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
    PAGE.write_text(fill(PAGE.read_text(), read_sources(table)))


def read_sources(table: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Return what the page is made of, by the name of the file."""
    others = {name: pd.read_csv(HERE / f"{name}.csv") for name in ("memory", "shards")}
    return {"scaling": table, **others}


def find_exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Fit a power of the size to time and memory of each verb, at its largest sizes."""
    rows = []
    for verb, of_verb in table.groupby("verb", sort=False):
        upper = of_verb.nlargest(UPPER, "size").sort_values("size")
        size = np.log(upper["size"].to_numpy(float))
        for what in QUANTITIES:
            value = np.log(upper[what].to_numpy())
            local = np.diff(value) / np.diff(size)
            found = {"exponent": np.polyfit(size, value, 1)[0]}
            found |= {"least": local.min(), "most": local.max()}
            sizes = {"from": upper["size"].min(), "to": upper["size"].max()}
            rows.append({"verb": verb, "quantity": what} | sizes | found)
    return pd.DataFrame(rows).round(2)


def draw(table: pd.DataFrame) -> Figure:
    """Draw time and memory against size, both in logarithms."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    labels = ("seconds", "MiB")
    for ax, what, label in zip(axes, QUANTITIES, labels, strict=True):
        for verb, (color, marker, line) in STYLES.items():
            one = table[(table["verb"] == verb) & (table[what] > 0)].sort_values("size")
            name = CALLS[verb].replace("`", "")
            style = {"color": color, "marker": marker, "ls": line, "ms": 4.5, "lw": 1.5}
            ax.plot(one["size"], one[what], label=name, **style)
        ax.set(xscale="log", yscale="log", xlabel="elements", ylabel=label, xlim=(2, 3e8))
        ax.set_xticks(10.0 ** np.arange(1, 9))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0].set_title("time", loc="left")
    axes[1].set_title("memory beyond what was there", loc="left")
    axes[1].set_ylim(0.5, 4e3)
    _draw_slopes(axes[0], (1e6, 1.5e-3, 1), (20, 2.0, 3))
    _draw_slopes(axes[1], (1e6, 0.8, 1), (20, 15, 2))
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_slopes(ax: Axes, *starts: tuple[float, float, int]) -> None:
    for x, y, power in starts:
        end = x * 10 ** (1.2 / power), y * 10**1.2
        ax.plot([x, end[0]], [y, end[1]], color="0.55", lw=1)
        name = f"∝ n{' ²³'[power - 1].strip()}"
        offset = {"xytext": (3, 0), "textcoords": "offset points"}
        ax.annotate(name, end, color="0.4", fontsize=9, **offset)


def fill(page: str, sources: Mapping[str, pd.DataFrame]) -> str:
    """Put the tables into the page, between the lines that name them."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} of benchmarks/scaling.csv -->\n).*?(<!-- end -->)"
        text = make(sources)
        page, count = re.subn(pattern, lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S)
        if count != 1:
            msg = f"got {count} places for the table {name!r} in the page. Expected 1"
            raise ValueError(msg)
    return page


def exponents_table(sources: Mapping[str, pd.DataFrame]) -> str:
    """Make the table of exponents, and of what the largest size took."""
    table = sources["scaling"]
    exponents = find_exponents(table).set_index(["verb", "quantity"])
    rows = []
    for verb, call in CALLS.items():
        largest = table[table["verb"] == verb].sort_values("size").iloc[-1]
        found = [exponents.loc[verb, what] for what in QUANTITIES]
        cells = [f"{x['exponent']:.2f} ({x['least']:.2f} to {x['most']:.2f})" for x in found]
        sizes = [f"{found[0]['from']:,.0f} to {found[0]['to']:,.0f}"]
        rows.append([call, *sizes, *cells, f"{largest['seconds']:.2f}", f"{largest['MiB']:,.0f}"])
    head = ["", "elements", "time", "memory", "seconds of the most", "MiB of the most"]
    return _markdown(head, rows)


def weights_table(sources: Mapping[str, pd.DataFrame]) -> str:
    """Make the table of what so many weights take in one process, or in each of many."""
    memory, shards = sources["memory"], sources["shards"]
    fit, reduce = (_largest(memory, verb, "weights") for verb in ("fit", "reduce"))
    step = _largest(sources["scaling"], "fit", "size")
    guide = PARAMETERS * FLOAT32
    gb = {
        "the guide": guide,
        "`fit`, between steps": fit["resident"],
        "`fit`, at most": fit["peak"],
        "`reduce(guide)`, the guide among it": guide + reduce["peak"],
    }
    rows = [
        [name, f"{each:.1f} bytes", *(f"{each * n / 1e9:,.0f} GB" for n in WEIGHTS)]
        for name, each in gb.items()
    ]
    slowest, most = shards["seconds"].max() / shards["weights"].max(), shards["peak (MiB)"].max()
    rows.append(
        ["`reduce_files`", "no more for more", *[f"{most * 2**20 / 1e9:.1f} GB" for _ in WEIGHTS]]
    )
    for name, each in (
        ("a compiled step of `fit`, on one thread", step["seconds"] / step["size"]),
        ("`reduce_files`, time", slowest),
    ):
        times = [f"{each * n / 60:,.1f} min" for n in WEIGHTS]
        rows.append([name, f"{1e9 * each:.0f} ns", *times])
    return _markdown(["", "of a weight", *(_name(n) for n in WEIGHTS)], rows)


def traffic_table(_sources: Mapping[str, pd.DataFrame]) -> str:
    """Make the table of what each rank sends in a step, and how long a link takes for it."""
    rows = []
    for ranks in RANKS:
        gb = [ring_bytes(n, ranks) / 1e9 for n in WEIGHTS]
        cells = [f"{one:,.1f} GB, {one / LINK_GB:.2f} s" for one in gb]
        rows.append([str(ranks), f"{2 * (ranks - 1) / ranks:.2f}", *cells])
    return _markdown(["ranks", "times the message", *(_name(n) for n in WEIGHTS)], rows)


def breaks_table(sources: Mapping[str, pd.DataFrame]) -> str:
    """Make the table of how much fits into the memory of one rank."""
    scaling, memory = sources["scaling"], sources["memory"]
    room = RANK_GB * 1e9
    rows = []
    fit, reduce = (_largest(memory, verb, "weights") for verb in ("fit", "reduce"))
    for name, each in (
        ("`fit`", fit["peak"]),
        ("`reduce(guide)`", PARAMETERS * FLOAT32 + reduce["peak"]),
        ("`compact`", _bytes_each(scaling, "compact")),
        ("`to_arviz`, 100 draws", _bytes_each(scaling, "to_arviz")),
    ):
        rows.append([name, f"{each:,.0f} n", f"{_round(room / each):,}"])
    for verb in ("reduce, correlated", "presence, correlated"):
        one = _largest(scaling, verb, "size")
        each = one["MiB"] * 2**20 / one["size"] ** 2
        rows.append([CALLS[verb], f"{each:,.0f} n²", f"{_round((room / each) ** 0.5):,}"])
    return _markdown(["", "bytes", f"elements in {RANK_GB} GB"], rows)


def dense_sentence(sources: Mapping[str, pd.DataFrame]) -> str:
    """Say what a dense posterior of many elements would take."""
    one = _largest(sources["scaling"], "reduce, correlated", "size")
    exponents = find_exponents(sources["scaling"]).set_index(["verb", "quantity"])
    most = exponents.loc[("reduce, correlated", "seconds"), "most"]
    matrix, factor = DENSE**2 * FLOAT64 / 1e9, DENSE / one["size"]
    peak = one["MiB"] * 2**20 / 1e9 * factor**2
    hours = one["seconds"] * factor**most / 3600
    return (
        f"A dense posterior of {DENSE:,} elements is {matrix:.0f} GB for one matrix; the search "
        f"among them would hold {peak:.0f} GB, and take {hours:,.0f} hours of this thread, at the "
        f"steepest slope that was measured, {most:.2f}."
    )


def ring_bytes(weights: int, ranks: int) -> float:
    """Return what a rank sends in a ring all-reduce of gradients and the loss, in bytes."""
    message = (PARAMETERS * weights + 1) * FLOAT32
    return 2 * (ranks - 1) / ranks * message


TABLES = {
    "exponents": exponents_table,
    "weights": weights_table,
    "traffic": traffic_table,
    "breaks": breaks_table,
    "dense": dense_sentence,
}


def _largest(table: pd.DataFrame, verb: str, size: str) -> pd.Series:
    return table[table["verb"] == verb].sort_values(size).iloc[-1]


def _bytes_each(table: pd.DataFrame, verb: str) -> float:
    one = _largest(table, verb, "size")
    return one["MiB"] * 2**20 / one["size"]


def _round(value: float) -> int:
    """Round down to two digits."""
    unit = 10 ** (len(str(int(value))) - 2)
    return int(value // unit * unit)


def _name(weights: int) -> str:
    return f"{weights // 10**9} billion"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
