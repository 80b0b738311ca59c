"""Write the tables of the documentation from docs/results/*.csv, and the reference pages from the code.

  python docs/render.py           replaces the generated blocks of README.md and docs/**/*.md
  python docs/render.py --check   writes nothing; exit code 1 if a block is out of date

A table is a block of Markdown between two comments. The first comment holds YAML:

  <!-- table
  from: representation                     # docs/results/representation.csv, or a list of such names
  where: {protocol: scenes-probe}          # column: value, or a list of values
  rows: {subject: features}                # group by these columns, shown under these headers ...
  # rows: {method: [[SimCLR, {method: simclr}], ...]}   ... or named rows, each with its own `where`
  columns: [[kNN, {metric: knn/top1}]]     # header and `where`; `{column: note}` shows another field than `value`
  seeds: true                              # adds the value of each seed behind the mean
  spread: interval                         # half of the 95 % t-interval in place of the standard deviation
  -->
  <!-- end -->

A cell with several values (one per seed) shows mean ± standard deviation (n - 1) and n. A cell with an interval shows it in brackets.
A reference block is `<!-- generated: NAME -->` ... `<!-- end -->`, where NAME is a key of GENERATED.
"""

from __future__ import annotations

import ast
import csv
import functools
import inspect
import re
import statistics
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- (?:table\n(?P<table>.*?)|generated: (?P<generated>\w+) ?)-->\n)(?P<body>.*?)(<!-- end -->)", re.S)


@functools.cache
def read(name: str) -> tuple[dict[str, str], ...]:
    """The rows of docs/results/NAME.csv, as {column: text}."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return tuple(csv.DictReader(file))


def select(rows, where: dict) -> list[dict[str, str]]:
    """The rows whose columns have the given values. Raises KeyError for a column that does not exist."""
    allowed = {column: [str(v) for v in (value if isinstance(value, list) else [value])] for column, value in where.items()}
    return [row for row in rows if all(row[column] in values for column, values in allowed.items())]


def shown(value: str) -> str:
    """A number with commas between thousands; other text as it is."""
    return f"{int(value):,}" if re.fullmatch(r"-?[1-9]\d{3,}", value) else value


def interval(row: dict[str, str]) -> str:
    text = shown(row["value"])
    if row.get("low") and " to " not in row["value"]:
        text += f" [{shown(row['low'])}, {shown(row['high'])}]"
    return text


def spread_of(values: list[float], name: str) -> float:
    """'deviation' (n - 1), or 'interval': half of the 95 % t-interval of the mean."""
    from ssl_jax.engine.intervals import t_half_width

    return {"deviation": statistics.stdev, "interval": t_half_width}[name](values)


def cell(rows: list[dict[str, str]], column: str = "value", seeds: bool = False, spread: str = "deviation") -> str:
    """One value, or mean ± `spread` over seeds. Raises ValueError if one seed occurs twice."""
    if not rows:
        return ""
    if column != "value":
        return ", ".join(dict.fromkeys(shown(row[column]) for row in rows))
    if len(rows) == 1:
        return interval(rows[0])
    if len({row["seed"] for row in rows}) != len(rows):
        raise ValueError(f"a cell with two values of one seed: {rows}")
    values = [float(row["value"]) for row in rows]
    digits = max(len(row["value"].partition(".")[2]) for row in rows)
    text = f"{statistics.mean(values):.{digits}f} ± {spread_of(values, spread):.{digits}f} (n={len(values)})"
    return text + (": " + ", ".join(row["value"] for row in rows) if seeds else "")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def table(text: str) -> str:
    """The Markdown of one table, from the YAML in its comment."""
    spec = yaml.safe_load(text)
    names = spec["from"] if isinstance(spec["from"], list) else [spec["from"]]
    rows = select([row for name in names for row in read(name)], spec.get("where", {}))
    named = isinstance(next(iter(spec["rows"].values())), list)
    if named:
        ((header, choices),) = spec["rows"].items()
        heads, groups = [header], [([label], where) for label, where in choices]
    else:
        keys = list(spec["rows"])
        heads = list(spec["rows"].values())
        label = lambda key, v: spec.get("labels", {}).get(v, "default" if key == "variant" and not v else shown(v))  # noqa: E731
        found = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
        groups = [([label(k, v) for k, v in zip(keys, values, strict=True)], dict(zip(keys, values, strict=True))) for values in found]
    columns = spec["columns"]
    if isinstance(columns, dict):  # {metric: header}
        columns = [[head, {"metric": metric}] for metric, head in columns.items()]
    lines = []
    for labels, where in groups:
        cells = []
        for _, extra in columns:
            extra = dict(extra)
            field = extra.pop("column", "value")
            cells.append(cell(select(rows, where | extra), field, spec.get("seeds", False), spec.get("spread", "deviation")))
        if named and not any(cells):
            raise ValueError(f"no value for the row {labels}")
        if any(cells):
            lines.append(labels + cells)
    return markdown(heads + [head for head, _ in columns], lines)


def config_keys() -> str:
    """Every key of `configs.common.base` with its value, and the comment behind it."""
    from configs import common

    source = inspect.getsource(common.base)
    lines = source.splitlines()
    comments = {number: line.partition("  # ")[2] for number, line in enumerate(lines, 1)}
    above = {number + 1: line.strip(" #") for number, line in enumerate(lines, 1) if line.strip().startswith("# ")}
    notes = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = node.targets[0].attr
            notes[name] = comments[node.lineno] or above.get(node.lineno, "")
            if isinstance(node.value, ast.Call):
                notes |= {f"{name}.{kw.arg}": comments[kw.lineno] for kw in node.value.keywords if kw.lineno != node.lineno}
    table = []

    def walk(config, prefix):
        for key in config:
            value = config[key]
            if hasattr(value, "items") and value:
                note = notes.get(prefix + key, "")
                table.append([f"`{prefix}{key}`", "", note]) if note else None
                walk(value, f"{prefix}{key}.")
            else:
                value = {} if hasattr(value, "items") else value
                table.append([f"`{prefix}{key}`", f"`{value!r}`", notes.get(prefix + key, "")])

    walk(common.base("METHOD"), "")
    return markdown(["key", "default", "meaning"], table)


def first_paragraph(thing) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def arguments(function, skip: int) -> str:
    shown = []
    for p in list(inspect.signature(function).parameters.values())[skip:]:
        shown.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
    return f"`{', '.join(shown)}`" if shown else ""


def augmentations() -> str:
    """The operations of a recipe of views, with their arguments."""
    from ssl_jax.augment import views

    return markdown(
        ["operation", "arguments", "what it does"],
        [[f"`{name}`", arguments(function, 2), first_paragraph(function)] for name, function in views.OPERATIONS.items()],
    )


def pretext_functions() -> str:
    """What methods call on whole batches: functions of `ssl_jax.augment` beside the operations of recipes."""
    from ssl_jax.augment import hue, lab, masks, motions, permutations, pixels, rotation, tiles, views

    rows = []
    for module in (rotation, tiles, permutations, lab, hue, masks, motions, views, pixels):
        for name, function in vars(module).items():
            own = inspect.isroutine(function) and function.__module__ == module.__name__ and not name.startswith("_")
            if own and (module is not views or name == "make_patch_views"):
                module_name = module.__name__.removeprefix("ssl_jax.augment.")
                rows.append([f"`{module_name}.{name}`", arguments(function, 0), first_paragraph(function)])
    return markdown(["function", "arguments", "what it does"], rows)


def evaluations() -> str:
    """Every kind of evaluation: what it needs, its options with their defaults, and its metrics."""
    from ssl_jax.evals import reference

    return reference.markdown()


def contract() -> str:
    """The records of the contract, as they stand in the code."""
    from ssl_jax.engine import method

    records = [x for x in vars(method).values() if isinstance(x, type) and x.__module__ == method.__name__]
    return "\n".join(f"## {record.__name__}\n\n```python\n{inspect.getsource(record)}```\n" for record in records)


def protocols() -> str:
    """What each protocol name in docs/results stands for."""
    rows = [[f"`{row['protocol']}`", row["text"], f"`{row['command']}`"] for row in read("protocols")]
    return markdown(["protocol", "meaning", "command"], rows)


def machines() -> str:
    return markdown(["machine", "meaning"], [[f"`{row['machine']}`", row["text"]] for row in read("machines")])


GENERATED = {f.__name__: f for f in (config_keys, augmentations, pretext_functions, evaluations, contract, protocols, machines)}


def render(text: str) -> str:
    """`text` with the contents of all blocks made anew."""

    def block(match):
        body = table(match["table"]) if match["table"] else GENERATED[match["generated"]]()
        return f"{match[1]}\n{body}\n{match[5]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(check: bool) -> int:
    sys.path.insert(0, str(ROOT))
    stale = []
    for path in pages():
        old = path.read_text()
        try:
            new = render(old)
        except Exception as error:  # of any kind: it goes on, with the page that it happened in
            error.add_note(f"in {path.relative_to(ROOT)}")
            raise
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'out of date; run `make docs`' if check else 'rendered'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
