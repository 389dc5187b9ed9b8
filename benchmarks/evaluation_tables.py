"""Tables, a figure and a short form of several evaluations, for the page of findings.

python benchmarks/evaluation_tables.py NAME=DIR [NAME=DIR ...] [--json FOLDER] [--figure FILE]

DIR is the ``--out`` of a finished `gnuq-serve evaluate`. Prints, in Markdown, the AUROC of every method on every
set, which methods differ from ``mean_nll`` by more than chance, and what each costs. ``--json`` writes the
results with four digits and without folders.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.drawing import FAINT, INK, RIGHT, WRONG, png

BESIDE = "mean_nll"
DRAWN = (
    "mean_nll",
    "grad_norm",
    "combined",
    "semgrad",
    "p_true",
    "semantic_entropy",
    "free_logistic",
    "hidden_probe",
)

Results = dict[str, Any]


def methods(results: Results) -> list[str]:
    """In the order of the registry."""
    return list(dict.fromkeys(method["name"] for one in results["sets"] for method in one["methods"]))


def of(one: Results, name: str) -> Results:
    """A method's results on one set; empty where it has none."""
    return next((method for method in one["methods"] if method["name"] == name), {})


def short(value: float | None) -> str:
    """Two digits, without the zero in front."""
    return "-" if value is None else f"{value:.2f}".replace("0.", ".", 1)


def aurocs(results: Results) -> list[str]:
    """Rows of a table: every method, every set, with its interval; the best three of a set in bold."""
    sets = results["sets"]
    best = {one["name"]: sorted(_values(one), reverse=True)[:3] for one in sets}
    lines = ["| AUROC | " + " | ".join(one["name"] for one in sets) + " |", "|---|" + "---|" * len(sets)]
    lines.append("| right answers | " + " | ".join(f"{one['right']} of {one['answers']}" for one in sets) + " |")
    for name in methods(results):
        cells = []
        for one in sets:
            auroc = of(one, name).get("auroc", {"value": None})
            cell = short(auroc["value"])
            if auroc["value"] in best[one["name"]]:
                cell = f"**{cell}**"
            if auroc["value"] is not None:
                cell += f" ({short(auroc['low'])}-{short(auroc['high'])})"
            cells.append(cell)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _values(one: Results) -> list[float]:
    values = (method["auroc"]["value"] for method in one["methods"])
    return [value for value in values if value is not None]


def differences(results: Results) -> list[str]:
    """For each set, methods whose AUROC differs from ``BESIDE``'s by more than chance (paired bootstrap)."""
    lines = []
    for one in results["sets"]:
        better, worse = [], []
        for method in one["methods"]:
            found = method["auroc_minus"].get(BESIDE)
            if not found or found["low"] is None:
                continue
            text = f"`{method['name']}` {found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
            if found["low"] > 0:
                better.append((found["value"], text))
            elif found["high"] < 0:
                worse.append((found["value"], text))
        lines.append(f"- {one['name']}: better {_listed(better)}; worse {_listed(worse, reverse=False)}")
    return lines


def _listed(found: list[tuple[float, str]], *, reverse: bool = True) -> str:
    return ", ".join(text for _, text in sorted(found, reverse=reverse)) or "none"


def costs(results: Results) -> list[str]:
    """Rows of a table: what each method that is not free takes on each set, in seconds beyond the answer."""
    sets = results["sets"]
    lines = ["| seconds | passes | " + " | ".join(one["name"] for one in sets) + " |"]
    lines.append("|---|---|" + "---|" * len(sets))
    for name in methods(results):
        given = [of(one, name).get("cost", {}) for one in sets]
        passes = next((cost["passes"] for cost in given if cost.get("passes")), "")
        if not passes:
            continue
        cells = [short(cost.get("seconds")) if cost.get("passes") else "free" for cost in given]
        lines.append(f"| `{name}` | {passes} | " + " | ".join(cells) + " |")
    return lines


def draw(every: dict[str, Results], figure: Any) -> None:
    """One panel for each model: sets from top to bottom, in each the methods of ``DRAWN``."""
    panels = figure.subplots(1, len(every), sharex=True, sharey=True, squeeze=False)[0]
    colours = (INK, RIGHT, "#67a9cf", "#4d9221", "#b2abd2", "#e08214", "#c51b7d", WRONG)
    names = list(dict.fromkeys(one["name"] for results in every.values() for one in results["sets"]))
    legend = {}
    for axes, (model, results) in zip(panels, every.items(), strict=True):
        for one in results["sets"]:
            row = names.index(one["name"])
            for at, (name, colour) in enumerate(zip(DRAWN, colours, strict=True)):
                auroc = of(one, name).get("auroc", {"value": None})
                if auroc["value"] is None:
                    continue
                height = row + (at - len(DRAWN) / 2) * 0.1
                axes.plot([auroc["low"], auroc["high"]], [height, height], color=colour, linewidth=1.1)
                (legend[name],) = axes.plot([auroc["value"]], [height], "o", color=colour, markersize=3.2)
        axes.axvline(0.5, color=FAINT, linewidth=0.9, linestyle="--")
        axes.set(xlabel="AUROC for wrong answers (95 % interval)", title=model.removeprefix("evaluation-"))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    shown = [name for name in DRAWN if name in legend]
    panels[-1].legend(
        [legend[name] for name in shown],
        shown,
        frameon=False,
        fontsize=7,
        loc="lower left",
        bbox_to_anchor=(1, 0),
    )


def publishable(results: Results) -> Results:
    """Numbers with four digits, files without their folders."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    found: Results = plain(results)
    arguments = {name: _without_folders(value) for name, value in found["arguments"].items() if name != "out"}
    return {**found, "model": _without_folders(found["model"]), "arguments": arguments}


def _without_folders(value: Any) -> Any:
    """Of files, parted by commas."""
    if not isinstance(value, str):
        return value
    return ",".join(part.rpartition("/")[2] for part in value.split(","))


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write NAME.json there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a PNG of some methods on all sets")
    args = parser.parse_args()
    every = {}
    for run in args.runs:
        name, _, folder = run.partition("=")
        every[name] = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    for name, results in every.items():
        print(
            "\n".join(
                [f"\n### {name}\n", *aurocs(results), "", f"Against `{BESIDE}`:", "", *differences(results)]
            )
        )
        print("\n".join(["", *costs(results)]))
        if args.json:
            args.json.mkdir(parents=True, exist_ok=True)
            text = json.dumps(publishable(results), separators=(",", ":"))
            (args.json / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if args.figure:
        rows = max(len(results["sets"]) for results in every.values())
        args.figure.write_bytes(png(partial(draw, every), 1.0 + rows, 2.0 + 4.2 * len(every)))


if __name__ == "__main__":
    main()
