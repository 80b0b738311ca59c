"""Prints the facts of `experiment.rehearse` and `experiment.fit` as tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ssl_jax.rehearsal.gpus import VARIABLES

RESOURCES = {
    "compute": "compute, at its peak",
    "memory": "memory, an upper estimate",
    "network": "network, all links of a chip at once",
    "slices": "network between slices",
}
NO_NETWORK = "network not included: its bandwidth is not known"


def show(facts: dict, file) -> None:
    """Print the facts of `experiment.rehearse`."""
    console = Console(file=file, width=118, highlight=False)
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items() if size > 1) or "one device"
    console.print(
        f"[bold]{facts['config']}[/bold] {' '.join(facts['overrides'])} on {_devices(facts)}: {mesh}, batch {facts['batch_size']}, "
        f"{facts['dtype']}, {facts['steps']:,} steps"
    )
    parameters = {**facts["parameters"], "trained together": facts["trained"]}
    console.print(_rows("parameters", {name: f"{n:,}" for name, n in parameters.items()}))
    state = {**facts["state_bytes"], "together": sum(facts["state_bytes"].values())}
    console.print(_rows("state, per device", {name: size(n) for name, n in state.items()}))
    if facts.get("compiled_bytes"):
        memory = {name: size(n) for name, n in facts["compiled_bytes"].items()}
        if facts["chip_bytes"]:
            memory["a device has"] = size(facts["chip_bytes"])
            if facts["usable_bytes"] < facts["chip_bytes"]:
                memory[f"JAX takes of it ({VARIABLES[0]})"] = size(facts["usable_bytes"])
        console.print(_rows("memory of the compiled step, per device", memory))
    if facts.get("exhausted"):
        console.print(_exhausted(facts["exhausted"]))
    console.print(_rows("work of a step, of all devices", _work(facts)))
    if "collectives" in facts:
        console.print(_collectives(facts["collectives"], facts["collectives_in_endless_loops"]))
    if "prediction" in facts:
        busy = {RESOURCES[resource]: f"{1e3 * seconds:.2f} ms" for resource, seconds in facts["busy_seconds"].items()}
        console.print(_rows("one device is busy with a step for", busy))
        console.print(_prediction(facts["prediction"]))
        console.print(
            "At that bound each of {hosts} hosts reads {images_per_second:,.0f} images/s: {cores:.1f} cores at {rate_of_core:.0f} "
            "images/s per core.".format(**facts["hosts"])
        )


def show_fit(facts: dict, file) -> None:
    """Print the facts of `experiment.fit`."""
    console = Console(file=file, width=118, highlight=False)
    fitting = [row for row in facts["candidates"] if row["fits"]]
    console.print(
        f"[bold]{facts['config']}[/bold] {' '.join(facts['overrides'])} on {_devices(facts)}: "
        f"{len(fitting)} of {len(facts['candidates'])} candidates fit"
    )
    if facts["usable_bytes"] < facts["chip_bytes"]:
        console.print(f"Of {size(facts['chip_bytes'])} of a device JAX takes {size(facts['usable_bytes'])} ({VARIABLES[0]}).")
    headings = ("data x fsdp x tensor", "batch", "remat", "memory", "step", "images/s", "expected", "binds")
    if fitting:
        reached = [f"{100 * share:.0f} %" for share in fitting[0]["prediction"]["reached"]]
        band = f"expected: published runs reached {' to '.join(reached)} of it" if reached else NO_NETWORK
        console.print(_candidates(f"prediction, at a bound; {band}", headings, fitting))
    others = [row for row in facts["candidates"] if not row["fits"]]
    if others:
        console.print(_candidates("does not fit", (*headings[:4], "largest array", "made by"), others))
    if facts["own"] and not facts["own"]["fits"]:
        console.print(f"As it stands the config does not fit: it needs {size(facts['own']['bytes'])}.")
    if facts["flags"]:
        console.print("The fastest: " + " ".join(facts["flags"]))


def _candidates(title: str, headings: tuple[str, ...], rows: list[dict]) -> Table:
    table = _table(title)
    for heading in headings:
        right = heading in ("batch", "memory", "step", "images/s", "expected")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        mesh = " x ".join(str(n) for n in row["mesh"].values())
        cells = [mesh, f"{row['batch_size']:,}", row["remat"] or "-", size(row["bytes"])]
        if row["fits"]:
            prediction = row["prediction"]
            bound, band = prediction["bound"], [f"{x['images_per_second']:,.0f}" for x in reversed(prediction["expected"])]
            cells += [f"{1e3 * bound['step_seconds']:,.1f} ms", f"{bound['images_per_second']:,.0f}", " to ".join(band) or "-"]
            cells += [prediction["binding"]]
        else:
            largest = (row["exhausted"]["largest"] or [{"shape": "not named", "bytes": 0, "of": ""}])[0]
            cells += [f"{largest['shape']} {size(largest['bytes'])}", largest["of"]]
        table.add_row(*cells)
    return table


def _devices(facts: dict) -> str:
    return facts["topology"] if facts["slices"] == 1 else f"{facts['slices']} slices {facts['topology']}"


def size(n: int) -> str:
    """'1.50 GiB'"""
    power = min(3, max(0, n.bit_length() - 1) // 10)
    return f"{n / 2 ** (10 * power):,.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _work(facts: dict) -> dict[str, str]:
    flops, seconds = facts["flops"], facts["seconds"]
    rows = {"FLOPs of matrix products and convolutions": f"{flops['flops']:.4g}"}
    if flops["repeated"]:
        rows["by rematerialization"] = f"{flops['repeated']:.4g}"
    rows["FLOPs per image"] = f"{flops['image']:.4g}"
    if flops["endless"]:
        rows["loops of unknown length, counted once"] = f"{flops['endless']}"
    return rows | {f"{name} took": f"{s:.1f} s" for name, s in seconds.items()}


def _collectives(found: list[dict], endless: int) -> Table:
    table = _table("collectives of a step, per device" + (f" ({endless} in loops of unknown length)" if endless else ""))
    for heading in ("kind", "mesh axes", "devices", "count", "bytes", "sent"):
        table.add_column(heading, justify="left" if heading in ("kind", "mesh axes") else "right")
    for x in found:
        table.add_row(x["kind"], x["axes"], str(x["group"]), f"{x['count']:,}", size(x["bytes"]), size(round(x["wire_bytes"])))
    if not found:
        table.add_row("none", *[""] * 5)
    return table


def _prediction(prediction: dict) -> Table:
    reached = [f"{100 * share:.0f} %" for share in prediction["reached"]]
    band = f"published runs reached {' to '.join(reached)} of a bound" if reached else NO_NETWORK
    table = _table(f"prediction, {prediction['chips']} chips, {prediction['binding']} binds; {band}")
    for heading in ("", "bound", *(f"at {share}" for share in reversed(reached))):
        table.add_column(heading, justify="right" if heading else "left")
    columns = [prediction["bound"], *prediction["expected"]]
    for name, key, shown in (
        ("step", "step_seconds", lambda x: f"{1e3 * x:,.1f} ms"),
        ("images/s", "images_per_second", lambda x: f"{x:,.0f}"),
        ("model FLOPs utilization", "mfu", lambda x: f"{100 * x:.1f} %"),
        ("hours", "hours", lambda x: f"{x:,.1f}"),
        ("chip hours", "chip_hours", lambda x: f"{x:,.0f}"),
    ):
        table.add_row(name, *(shown(column[key]) for column in columns))
    return table


def _exhausted(found: dict) -> Table:
    used = f"{size(found['used'])} of {size(found['limit'])}" if found["used"] else found["message"]
    which = "arrays in the trace, if sharded evenly" if found.get("traced") else "buffers"
    table = _table(f"it does not fit: {used}; the largest {which}")
    for heading, width in (("size", 10), ("shape", 30), ("made by", 50)):
        table.add_column(heading, min_width=width, overflow="fold")
    for buffer in found["largest"] or [{"bytes": found["used"] or 0, "shape": "not named", "of": ""}]:
        table.add_row(size(buffer["bytes"]), buffer["shape"], buffer["of"])
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, min_width=100)


def _rows(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column("", min_width=44)
    table.add_column("", justify="right", min_width=16)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
