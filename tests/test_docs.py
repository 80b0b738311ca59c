"""The documentation: tables equal the CSV files, pages from the code equal the code, links lead somewhere, marked code blocks run."""

import csv
import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.csv"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.S)


def load_render():
    spec = importlib.util.spec_from_file_location("docs_render", ROOT / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_render()
PAGES = render.pages()


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_tables_and_reference_pages_are_rendered(path):
    text = path.read_text()
    assert render.render(text) == text, f"{name(path)} is out of date: run `make docs`"
    assert text.count("<!-- end -->") == len(render.BLOCK.findall(text)), "a block is not closed, or its first comment is misspelt"


def slugs(path):
    """The anchors of a page, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h.lower())).strip("-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_pictures_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{name(path)}: {link}"
        assert not anchor or anchor in slugs(file), f"{name(path)}: {link}"


def sentences(text):
    """The number of words of each sentence of a page, without tables, code and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.) )", text))
    prose = (block for block in blocks if not block.startswith(("|", "#", "!")))
    return [len(s.split()) for block in prose for s in re.split(r"(?<=[.!?:;])[\s*]+", block) if s]


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in ("CHANGELOG.md", "log.md")], ids=name)
def test_sentences_are_short(path):
    """A part of a sentence up to a full stop, colon or semicolon has 9 words on average over all pages."""
    lengths = sentences(path.read_text()) or [0]
    assert np.mean(lengths) <= 14 and max(lengths) <= 40


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_method_has_a_page():
    methods = {path.stem for path in (ROOT / "ssl_jax" / "methods").glob("*.py")} - {"__init__"}
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == methods


def test_pictures_are_small():
    for path in (ROOT / "docs" / "pictures").glob("*.png"):
        assert path.stat().st_size <= 150_000, name(path)


@pytest.mark.parametrize("path", [p for p in RESULTS if p.stem not in ("protocols", "machines", "published")], ids=name)
def test_results_name_their_protocol_machine_and_commit(path):
    protocols, machines = ({row[key] for row in render.read(f"{key}s")} for key in ("protocol", "machine"))
    seen = set()
    for row in csv.DictReader(path.open(newline="")):
        assert row["protocol"] in protocols and row["machine"] in machines, row
        assert re.fullmatch(r"[0-9a-f]{7}", row["commit"]), row
        measured = tuple(value for key, value in row.items() if key not in ("value", "low", "high", "note"))
        assert measured not in seen, f"measured twice: {row}"
        seen.add(measured)


def test_configs_and_variants_in_pages_and_results_exist():
    named = {match for path in PAGES for match in re.findall(r"configs/(\w+)\.py(?::(\w+))?", path.read_text())}
    rows = [row for path in RESULTS for row in render.read(path.stem) if row.get("config", "").startswith("configs/")]
    named |= {(Path(row["config"]).stem, row["variant"]) for row in rows}
    of_the_tutorial = {match for path in PAGES for match in re.findall(r"<!-- file: configs/(\w+)\.py -->", path.read_text())}
    others = {"NAME", "FILE", "common", *of_the_tutorial}
    for config, variant in sorted(pair for pair in named if pair[0] not in others and pair[1] != "VARIANT"):
        importlib.import_module(f"configs.{config}").get_config(variant)


def test_published_figures_name_their_source():
    assert all(row["source"] for row in render.read("published"))


def run_blocks(path):
    """Run the marked blocks of a page, one after the other; returns their names."""
    names = {"__name__": "tutorial"}
    for block in RUN.findall(path.read_text()):
        exec(compile(block, name(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", [p for p in PAGES if RUN.search(p.read_text())], ids=name)
def test_marked_code_blocks_run(path):
    run_blocks(path)


def test_evaluation_of_the_tutorial_measures_what_it_says():
    evaluate = run_blocks(ROOT / "docs" / "tutorials" / "add_an_evaluation.md")["evaluate"]
    x = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])

    def purity(bank, query, k):
        splits = {"train": bank, "test": query}
        context = SimpleNamespace(features=lambda split, layer: SimpleNamespace(x=x, y=np.array(splits[split])), name=str)
        return evaluate(context, k=k).metrics["purity"]

    assert purity(bank=[0, 0, 1, 1], query=[0, 0, 1, 1], k=2) == 100
    assert purity(bank=[0, 1, 0, 1], query=[0, 0, 1, 1], k=2) == 50
    assert purity(bank=[1, 1, 0, 0], query=[0, 0, 1, 1], k=2) == 0


def test_a_changed_result_is_noticed(monkeypatch):
    path = ROOT / "docs" / "methods" / "simclr.md"
    rows = [{**row, "value": "99.99"} if row["value"] == "62.78" else row for row in render.read("representation")]
    monkeypatch.setattr(render, "read", lambda name: rows if name == "representation" else [])
    monkeypatch.setattr(render, "table", lambda text, table=render.table: table(text) if "representation" in text else "")
    assert "99.99" in render.render(path.read_text())


def test_two_values_of_one_seed_in_a_cell_are_an_error():
    with pytest.raises(ValueError, match="two values of one seed"):
        render.cell([{"seed": "0", "value": "1"}, {"seed": "0", "value": "2"}])


def test_a_cell_shows_the_deviation_or_half_of_the_interval_of_the_mean():
    rows = [{"seed": str(seed), "value": value} for seed, value in enumerate(("1.0", "2.0", "3.0"))]
    assert render.cell(rows) == "2.0 ± 1.0 (n=3)"
    assert render.cell(rows, spread="interval") == "2.0 ± 2.5 (n=3)"  # 4.303 / sqrt(3)
