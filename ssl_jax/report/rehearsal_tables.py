"""What a rehearsal found, as tables to read."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from ssl_jax.rehearsal.gpus import VARIABLES

WORDS = {
    "compute": "compute, at its peak",
    "memory": "memory, an estimate from above",
    "network": "network, all links of a chip at once",
    "slices": "network between slices",
}
NO_NETWORK = "network not included: no one figure of it is known"


def show(told: dict, file) -> None:
    """Print what `cli.rehearse` found."""
    console = Console(file=file, width=118, highlight=False)
    mesh = " x ".join(f"{axis} {size}" for axis, size in told["mesh"].items() if size > 1) or "one device"
    console.print(
        f"[bold]{told['config']}[/bold] {' '.join(told['overrides'])} on {_devices(told)}: {mesh}, batch {told['batch_size']}, "
        f"{told['dtype']}, {told['steps']:,} steps"
    )
    parameters = {**told["parameters"], "trained together": told["trained"]}
    console.print(_rows("parameters", {name: f"{n:,}" for name, n in parameters.items()}))
    state = {**told["state_bytes"], "together": sum(told["state_bytes"].values())}
    console.print(_rows("state, of each device", {name: size(n) for name, n in state.items()}))
    if told.get("compiled_bytes"):
        memory = {name: size(n) for name, n in told["compiled_bytes"].items()}
        if told["chip_bytes"]:
            memory["a device has"] = size(told["chip_bytes"])
            if told["usable_bytes"] < told["chip_bytes"]:
                memory[f"of it JAX takes ({VARIABLES[0]})"] = size(told["usable_bytes"])
        console.print(_rows("memory of the compiled step, of each device", memory))
    if told.get("exhausted"):
        console.print(_exhausted(told["exhausted"]))
    console.print(_rows("work of a step, of all devices", _work(told)))
    if "collectives" in told:
        console.print(_collectives(told["collectives"], told["collectives_in_endless_loops"]))
    if "prediction" in told:
        busy = {WORDS[resource]: f"{1e3 * seconds:.2f} ms" for resource, seconds in told["busy_seconds"].items()}
        console.print(_rows("one device is busy with a step for", busy))
        console.print(_prediction(told["prediction"]))
        console.print(
            "At that bound each of {hosts} hosts reads {images_per_second:,.0f} images/s: {cores:.1f} cores at {rate_of_core:.0f} "
            "images/s and core.".format(**told["hosts"])
        )


def show_fit(told: dict, file) -> None:
    """Print what `experiment.fit` found."""
    console = Console(file=file, width=118, highlight=False)
    fitting = [row for row in told["candidates"] if row["fits"]]
    console.print(
        f"[bold]{told['config']}[/bold] {' '.join(told['overrides'])} on {_devices(told)}: "
        f"{len(fitting)} of {len(told['candidates'])} candidates fit"
    )
    if told["usable_bytes"] < told["chip_bytes"]:
        console.print(f"Of {size(told['chip_bytes'])} of a device JAX takes {size(told['usable_bytes'])} ({VARIABLES[0]}).")
    headings = ("data x fsdp x tensor", "batch", "remat", "memory", "step", "images/s", "expected", "binds")
    if fitting:
        reached = [f"{100 * share:.0f} %" for share in fitting[0]["prediction"]["reached"]]
        band = f"expected: published runs reached {' to '.join(reached)} of it" if reached else NO_NETWORK
        console.print(_candidates(f"prediction, at a bound; {band}", headings, fitting))
    others = [row for row in told["candidates"] if not row["fits"]]
    if others:
        console.print(_candidates("does not fit", (*headings[:4], "largest array", "made by"), others))
    if told["own"] and not told["own"]["fits"]:
        console.print(f"As it stands the config does not fit: it needs {size(told['own']['bytes'])}.")
    if told["flags"]:
        console.print("The fastest: " + " ".join(told["flags"]))


def _candidates(title: str, headings: tuple[str, ...], rows: list[dict]) -> Table:
    table = _table(title)
    for heading in headings:
        right = heading in ("batch", "memory", "step", "images/s", "expected")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        cells = [" x ".join(str(n) for n in row["mesh"].values()), f"{row['batch_size']:,}", row["remat"] or "-", size(row["bytes"])]
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


def _devices(told: dict) -> str:
    return told["topology"] if told["slices"] == 1 else f"{told['slices']} slices {told['topology']}"


def size(n: int) -> str:
    """'1.50 GiB'"""
    power = min(3, max(0, n.bit_length() - 1) // 10)
    return f"{n / 2 ** (10 * power):,.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _work(told: dict) -> dict[str, str]:
    flops, seconds = told["flops"], told["seconds"]
    rows = {"FLOPs of matrix products and convolutions": f"{flops['flops']:.4g}"}
    if flops["repeated"]:
        rows["of them by rematerialization"] = f"{flops['repeated']:.4g}"
    rows["FLOPs of an image"] = f"{flops['image']:.4g}"
    if flops["endless"]:
        rows["loops of unknown length, counted once"] = f"{flops['endless']}"
    return rows | {f"{name} took": f"{s:.1f} s" for name, s in seconds.items()}


def _collectives(found: list[dict], endless: int) -> Table:
    table = _table("collectives of a step, of each device" + (f" ({endless} in loops of unknown length)" if endless else ""))
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
    which = "results in the trace, were they spread evenly" if found.get("traced") else "buffers"
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
