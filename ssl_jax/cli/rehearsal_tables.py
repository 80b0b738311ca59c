"""What a rehearsal found, as tables to read."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table


def show(told: dict, file) -> None:
    """Print what `cli.rehearse` found."""
    console = Console(file=file, width=110, highlight=False)
    mesh = " x ".join(f"{axis} {size}" for axis, size in told["mesh"].items() if size > 1) or "one device"
    console.print(
        f"[bold]{told['config']}[/bold] {' '.join(told['overrides'])} on {told['topology']}: {mesh}, batch {told['batch_size']}, "
        f"{told['dtype']}, {told['steps']:,} steps"
    )
    parameters = {**told["parameters"], "trained together": told["trained"]}
    console.print(_table("parameters", [(name, f"{n:,}") for name, n in parameters.items()]))
    state = {**told["state_bytes"], "together": sum(told["state_bytes"].values())}
    console.print(_table("state, of each device", [(k, size(n)) for k, n in state.items()]))
    if told["compiled_bytes"]:
        console.print(_table("memory of the compiled step, of each device", [(k, size(n)) for k, n in told["compiled_bytes"].items()]))
    flops = told["flops"]
    console.print(
        _table(
            "work",
            [
                ("FLOPs of a step, all devices", f"{flops['step']:.4g}"),
                ("FLOPs of an image", f"{flops['image']:.4g}"),
                *([("loops of unknown length, counted once", f"{flops['endless_loops']}")] if flops["endless_loops"] else []),
                ("lowering", f"{told['seconds']['lowering']:.1f} s"),
                ("compiling", f"{told['seconds']['compiling']:.1f} s"),
            ],
        )
    )


def size(n: int) -> str:
    """'1.50 GiB'"""
    power = min(3, max(0, n.bit_length() - 1) // 10)
    return f"{n / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _table(title: str, rows) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column("", min_width=40)
    table.add_column("", justify="right", min_width=16)
    for row in rows:
        table.add_row(*row)
    return table
