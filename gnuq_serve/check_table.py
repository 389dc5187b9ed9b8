"""A check's report for people."""

from __future__ import annotations

from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gnuq_serve.check import Report

MIB = 2**20
SHOWN_SLOW = 10


def show(report: Report, console: Console | None = None) -> None:
    """Print the report."""
    say = partial((console or Console()).print, soft_wrap=True)
    say(f"[bold]{escape(report.model)}[/]: {report.architecture}, {report.dtype}")
    if report.blocks is not None:
        weights = "one weight" if report.tied else "two weights"
        blocks = f"{report.blocks} blocks" if report.blocks else "no blocks found (no hidden-state gradients)"
        say(f"{report.parameters:,} parameters, {blocks}; embedding and head: {weights}")
        say(_rules(report))
        for name, reason in list(report.slow.items())[:SHOWN_SLOW]:
            say(f"slow exact path: {escape(name)} ({escape(reason)})")
        if len(report.slow) > SHOWN_SLOW:
            say(f"... and {len(report.slow) - SHOWN_SLOW} more")
    if report.memory is not None:
        say(_memory(report.memory))
    if report.comparisons:
        say(f"\nOne sample ({escape(report.sample or '')}), mode {report.mode}; differences are relative")
        say(_comparisons(report))
    if report.problem is None:
        equal = f", and equal to plain autograd within {report.tolerance:g}" if report.comparisons else ""
        say(f"[green]Every parameter is counted{equal}.[/]")
    else:
        say(f"[red]{escape(report.problem)}[/]")


def _rules(report: Report) -> Table:
    table = Table("rule")
    table.add_column("layers", justify="right")
    table.add_column("parameters", justify="right")
    for share in report.rules:
        table.add_row(share.rule, f"{share.layers:,}", f"{share.parameters:,}")
    if report.inactive:
        table.add_row("none: adapters not in use", "", f"{report.inactive:,}")
    return table


def _comparisons(report: Report) -> Table:
    table = Table()
    table.add_column(no_wrap=True)
    for column in ("the pass", "plain autograd", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.comparisons:
        table.add_row(row.quantity, f"{row.by_pass:.8g}", f"{row.by_autograd:.8g}", f"{row.difference:.1e}")
    return table


def _memory(memory: dict[str, float]) -> str:
    pairs = memory["bytes_per_pair"] * 1000**2 / MIB
    square = f" + {pairs:,.0f} MiB x (tokens/1,000)^2, for attention forms its matrix" if pairs else ""
    return (
        f"memory of a pass beyond the weights: {memory['bytes_per_token'] * 1000 / MIB:,.0f} MiB per 1,000 tokens"
        f"{square}, {memory['bytes_per_answer_token'] / MIB:,.2f} MiB per answer token"
    )
