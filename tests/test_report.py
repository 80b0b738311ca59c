"""The report of a run: right numbers, self-contained, safe, and complete about what is missing."""

import io
import json
import re
from html.parser import HTMLParser

import ml_collections
import numpy as np
import pytest
from PIL import Image

from launch import main
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context
from ssl_jax.experiment.evaluations import Evaluations
from ssl_jax.experiment.neighbors import OTHER, SAME, UNKNOWN, fetch_images, save_neighbors
from ssl_jax.report.charts import PERCENT, chart, labels, thinned, ticks
from ssl_jax.report.write import write_report

HOSTILE = '<script>alert("x")</script>&<img src="http://example.com/a.png">'
VOID = {"meta", "img", "br"}
FETCHING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises on tags that do not nest."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.stack, self.words = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"
        self.text = " ".join(" ".join(self.words).split())  # no-break spaces too

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack[-1:] == [tag], f"</{tag}> closes nothing"
        self.stack.pop()

    def handle_data(self, data):
        self.words.append(data)


def png(color) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def entry(subject, step, knn, linear, protocol="kNN k=20"):
    metrics = {"knn/top1": knn, "linear/top1": linear, "rank/rankme": 12.5}
    return {"subject": subject, "step": step, "metrics": metrics, "protocols": {"knn": protocol, "linear": "L-BFGS"}}


CONFIG = {
    "method": "simclr", "batch_size": 64, "total": "2 epochs", "best_metric": "knn/top1",
    "data": {"name": "scenes", "num_classes": 10, "examples": 640},
    "views": [[["flip", {"p": 0.5}], ["grayscale", {"p": 0.2}]]] * 2,
    "optim": {"net": {"lr": 0.003}},
    "references": {"published": {"knn/top1": 83.2}},
}  # fmt: skip


def write_run(workdir, steps=20, **config):
    (workdir / "pictures").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (workdir / "provenance.json").write_text(json.dumps({"commit": "abc123", "packages": {"jax": "0.10.2"}}))
    entries = [entry("raw pixels", 0, 18.02, 24.5), entry("untrained", 0, 31.25, 40.0)]
    entries += [entry("trained", 10, 50.5, 60.25), entry("trained", 20, 63.125, 70.75)]
    (workdir / "evaluations.json").write_text(json.dumps(entries))
    lines = [
        {"step": s, "ssl/loss": 6 - s / 10, "ssl/grad_norm/net": 1.0, "lr/net": 1e-3 * s, "time/seconds_per_step": 9.0,
         "time/images_per_second": 321.0, "time/input_wait": 0.02, "time/clock": 1000.0 + 12.0 * s, "knn/top1": 50.0}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "starts.jsonl").write_text('{"time/clock": 1000.0}\n')
    (workdir / "log.txt").write_text(
        "2025-01-01 10:00:00,123 INFO all is well\n" + 3 * "2025-01-01 10:00:00,124 WARNING example 7 is left out\n"
    )
    for name in ("views", "neighbors", "samples_000010", "samples_000020"):
        (workdir / "pictures" / f"{name}.png").write_bytes(png((10, 20, 30)))
    return workdir


def read(workdir) -> tuple[str, Page]:
    path = write_report(workdir)
    assert path == workdir / "report.html"
    assert not list(workdir.glob("*.tmp"))
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def check_self_contained(source, page):
    assert "script" not in page.tags
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in FETCHING or value.startswith("data:image/png;base64,"), (name, value)
        assert "url(" not in (value or "")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_numbered_series_of_pictures_is_a_film_strip(tmp_path):
    """All frames in order where there are few; the first and the last where there are many."""
    run = tmp_path / "run"
    write_run(run)
    page = Page(write_report(run).read_text())
    frames = [value for name, value in page.attributes if name == "alt" and value.startswith("step ")]
    assert frames == ["step 10", "step 20"]
    for step in range(30, 400, 10):
        (run / "pictures" / f"samples_{step:06d}.png").write_bytes(png((step % 256, 20, 30)))
    page = Page(write_report(run).read_text())
    frames = [int(value[5:]) for name, value in page.attributes if name == "alt" and value.startswith("step ")]
    assert len(frames) == 8
    assert frames == sorted(frames)
    assert (frames[0], frames[-1]) == (10, 390)


def test_report_shows_all_numbers_of_the_run(tmp_path):
    source, page = read(write_run(tmp_path / "run"))
    shown = page.text
    assert "simclr on scenes" in shown
    assert re.search(r"kNN 63\.1[23] % against 31\.25 % untrained and 18\.02 % raw pixels", shown)
    for expected in ("70.75 %", "10.00 %", "83.20 %", "quoted: published", "12.5", "kNN k=20", "L-BFGS", "+30.75",
                     "abc123", "20 of 20", "1,280 (2 epochs)", "321 (median)", "3 min",
                     "Goodput 75 %", "the share of the time from the first start to the last logged step that was spent in steps",
                     "WARNING example 7 is left out (x 3)",
                     "flip(p=0.5)", "optim.net.lr", "0.003", "the newest of 2 in pictures/"):  # fmt: skip
        assert expected in shown, expected
    assert "Missing" not in shown
    assert "all is well" not in shown
    assert "Unfinished" not in shown
    assert page.tags.count("img") == 3 + 2
    assert "kNN top1, step 10: 50.50" not in shown  # its value belongs to the line 'trained'
    assert "trained, step 10: 50.50 %" in shown
    titles = re.findall(r"<figcaption><strong>([^<]*)</strong>", source)
    assert titles == ["kNN top1", "linear top1", "rank rankme", "ssl/loss", "gradient norm", "learning rate",
                      "images per second", "where the time of a step goes"]  # fmt: skip
    check_self_contained(source, page)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", source).lower().replace("provenance", "")


def test_goodput_is_listed_and_explained(tmp_path):
    source, _ = read(write_run(tmp_path / "run"))
    facts = source[source.index('<dl class="facts">') : source.index("</dl>")]
    assert f"<dt>Goodput</dt><dd>75{PERCENT}</dd>" in facts and "compiling" not in facts


@pytest.mark.parametrize(
    ("names", "heading"),
    [
        (("views", "neighbors", "reconstruction_00000010", "samples_000010"), "Samples"),
        (("views", "neighbors", "reconstruction_00000010"), "Reconstructions"),
        (("views", "neighbors"), "Augmented views"),
    ],
)
def test_report_opens_with_samples_reconstructions_or_views(tmp_path, names, heading):
    run = write_run(tmp_path / "run")
    for path in (run / "pictures").iterdir():
        path.unlink()
    for name in names:
        (run / "pictures" / f"{name}.png").write_bytes(png("red"))
    source, page = read(run)
    headings = re.findall(r"<h2>([^<]*)</h2>", source)
    assert headings[0] == heading and len(headings) == len(set(headings))
    assert page.tags.count("img") == len(names)


def test_verdict_compares_only_under_the_same_protocol(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "evaluations.json").write_text(json.dumps([entry("untrained", 0, 31.25, 1), entry("trained", 20, 30.0, 2)]))
    _, page = read(run)
    assert "no better than a baseline (31.25 % untrained)" in page.text
    records = [entry("untrained", 0, 31.25, 1, "kNN k=20"), entry("trained", 20, 33.0, 2, "kNN k=200")]
    (run / "evaluations.json").write_text(json.dumps(records))
    _, page = read(run)
    assert "different protocols; these numbers may not compare: trained: kNN k=200 untrained: kNN k=20" in page.text
    assert "31.25 % untrained" not in page.text and "+1.75" not in page.text
    chosen = ["probe l2=0.1 chosen of 8 D=64 seed=0", "probe l2=1e-06 chosen of 8 D=128 seed=0"]  # by the same protocol
    records = [entry("untrained", 0, 31.25, 1, chosen[0]), entry("trained", 20, 33.0, 2, chosen[1])]
    (run / "evaluations.json").write_text(json.dumps(records))
    _, page = read(run)
    assert f"{chosen[1]}; untrained: l2=0.1 D=64" in page.text
    assert "may not compare" not in page.text


def test_hostile_text_is_escaped(tmp_path):
    run = write_run(tmp_path / "run", method=HOSTILE, references={HOSTILE: {"knn/top1": 1.0}}, **{HOSTILE: HOSTILE})
    config = json.loads((run / "config.json").read_text())
    config["data"]["name"], config["views"] = HOSTILE, [[HOSTILE, {HOSTILE: HOSTILE}]]
    (run / "config.json").write_text(json.dumps(config))
    (run / "provenance.json").write_text(json.dumps({HOSTILE: HOSTILE, "devices": HOSTILE}))
    records = {"step": 0, "metrics": {HOSTILE: 1.0, f"{HOSTILE}/top1": 2.0}, "protocols": {HOSTILE: HOSTILE}}
    records = [{"subject": subject, **records} for subject in (HOSTILE, "untrained", "trained")]
    (run / "evaluations.json").write_text(json.dumps(records))
    line = {"step": 5, HOSTILE: 1.0, f"lr/{HOSTILE}": 0.1, f"p/grad_norm/{HOSTILE}": 0.1, f"{HOSTILE}/loss": 3.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "log.txt").write_text(f"2025-01-01 10:00:00,124 WARNING {HOSTILE}\n")
    (run / "pictures" / '<b onclick="x">.png').write_bytes(png("red"))
    source, page = read(run)
    assert "<script" not in source
    assert page.tags.count("img") == 4 + 2
    check_self_contained(source, page)
    assert HOSTILE in page.text
    assert "$body" not in source


def test_report_of_an_empty_workdir_names_what_is_missing(tmp_path):
    source, page = read(tmp_path)
    for name in ("config.json", "provenance.json", "evaluations.json", "pictures/views.png", "pictures/neighbors.png"):
        assert f"{name} does not exist" in page.text
    assert "metrics.jsonl has no line" in page.text
    assert "No step has been logged yet" in page.text
    check_self_contained(source, page)


def test_report_of_an_unfinished_run_with_damaged_files(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    with open(run / "metrics.jsonl", "a") as out:
        out.write('{"step": 2, "ssl/loss": NaN}\n7\n{"step": 3, "ssl/lo')  # no value, no object, a torn line
    (run / "evaluations.json").write_text(json.dumps([entry("untrained", 0, 31.25, 40.0), 5, {"step": "x"}]))
    (run / "provenance.json").write_text("{")
    (run / "starts.jsonl").write_text('7\n{"time/clo')
    (run / "pictures" / "views.png").write_bytes(png("red")[:-5])
    source, page = read(run)
    assert "Unfinished: step 2 of 20." in page.text
    assert "is not measured after training yet (31.25" in page.text
    assert "2 of 3 entries are not understood" in page.text
    assert "provenance.json is damaged (no JSON" in page.text
    assert "pictures/views.png is not a complete PNG" in page.text
    assert "<circle" in source  # the only logged loss
    assert "nan" not in re.sub(r"base64,[^\"]*", "", source).lower().replace("provenance", "")
    (run / "config.json").write_text(json.dumps({"data": 3, "total": "x", "batch_size": [], "references": 1}))
    (run / "metrics.jsonl").unlink()
    read(run)


def test_report_verb_prints_the_path(tmp_path, capsys):
    assert main(["report", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert main(["report", f"--workdir={tmp_path}", "--config.a=1"]) == 2
    assert "--config.a=1" in capsys.readouterr().err
    with pytest.raises(UserError, match="no directory"):
        write_report(tmp_path / "absent")


def test_chart_geometry():
    svg = chart("t", {"a": [(0, 1.0), (50, 2.0), (100, 3.0)]}, {"untrained": 2.0}, until=100)
    coordinates = re.search(r'<polyline[^>]*points="([^"]*)"', svg)[1]
    points = [tuple(map(float, pair.split(","))) for pair in coordinates.split()]
    assert np.allclose(np.diff(points, axis=0)[0], np.diff(points, axis=0)[1])  # equal distances up and across
    assert points[0][1] > points[2][1]  # more is higher
    level = float(re.search(r'class="level l0"[^>]*y1="([0-9.]+)"', svg)[1])
    assert level == pytest.approx(points[1][1])
    for points in ([(5, 0.0)], [(0, 1e-12)], [(0, 7.0), (1, 7.0)], [(0, -3e9), (10**7, 4e9)]):
        assert "nan" not in chart("t", {"a": points})
    flat = {"a": [(0, 5.0), (1, 5.0)]}
    charts = [chart("t", flat, from_zero=from_zero) for from_zero in (False, True)]
    low, high = (float(re.search(r'<polyline[^>]*,([0-9.]+)"/>', svg)[1]) for svg in charts)
    assert low > high  # in the middle, and near the top of an axis from 0


def test_chart_ticks_labels_and_thinning():
    assert np.allclose(ticks(0, 1, 5), [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.allclose(ticks(-1.3, 2.6, 4), [-1, 0, 1, 2])
    assert labels([0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert labels([0, 25000, 50000]) == ["0", "25k", "50k"]
    assert labels([0, 2.5e6, 5e6]) == ["0.0", "2.5M", "5.0M"]
    assert labels([0, 2e-6, 4e-6]) == ["0", "2e-06", "4e-06"]
    for n in (1, 2, 299, 300, 301, 5000, 5001):
        points = [(i, float(i)) for i in range(n)]
        few = thinned(points)
        assert len(few) <= 300
        assert few[-1] == points[-1]
        assert all(x == y for x, y in few)  # a mean of both coordinates stays on the line
        assert sorted(few) == few


class Batches:
    """Indexable like the evaluation batches of the pipeline; counts what is read."""

    def __init__(self, images, labels, mask, batch_size):
        self.images, self.labels, self.mask = images, labels, mask
        self.batch_size, self.num_examples, self.read = batch_size, len(images), []

    def __getitem__(self, number):
        self.read.append(number)
        part = slice(number * self.batch_size, (number + 1) * self.batch_size)
        missing = self.batch_size - len(self.images[part])
        values = {"image": self.images[part], "label": self.labels[part], "_valid": self.mask[part]}
        return {k: np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)]) for k, v in values.items()}

    def __iter__(self):
        return (self[number] for number in range(-(-self.num_examples // self.batch_size)))


def batches(count, unreadable=(), label=lambda i: i % 2):
    """Image i is filled with i; labels alternate."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3))
    mask = ~np.isin(np.arange(count), unreadable)
    return Batches(images, np.array([label(i) for i in range(count)], np.int32), mask, 4)


def test_fetch_images_reads_only_needed_batches():
    split = batches(22)
    found = fetch_images(split, np.array([[21, 1], [9, 1]]), 22)
    assert {row: int(image[0, 0, 0]) for row, image in found.items()} == {1: 1, 9: 9, 21: 21}
    assert split.read == [0, 2, 5]
    split = batches(22, unreadable=(2, 5))  # rows of features shift behind each
    found = fetch_images(split, np.array([1, 2, 9]), 20)
    assert {row: int(image[0, 0, 0]) for row, image in found.items()} == {1: 1, 2: 3, 9: 11}
    assert split.read == [0, 1, 2]
    with pytest.raises(ValueError, match="row 30"):
        fetch_images(batches(22), np.array([30]), 99)


@pytest.mark.parametrize("labeled", [True, False])
def test_neighbors_picture_shows_nearest_images_and_labels(tmp_path, labeled):
    def encode(images):  # angle by brightness: the nearest image is the one of the nearest brightness
        angle = images[:, 0, 0, 0].astype("float32") / 40
        return {"pooled": np.stack([np.cos(angle), np.sin(angle)], 1)}

    splits = {"train": (21, (0, 7)), "test": (10, ())}

    def open_batches(split):
        count, unreadable = splits[split]
        return batches(count, unreadable, label=(lambda i: i % 2) if labeled else (lambda i: 0))

    path = tmp_path / "pictures" / "neighbors.png"
    save_neighbors(Context(encode, open_batches), open_batches, path, queries=3, k=3)
    picture = np.asarray(Image.open(path))
    tile, gap, frame = (112 + 8 + 18, 112 + 8), 3, 4
    assert picture.shape == (3 * (tile[0] + gap) + gap, 4 * (tile[1] + gap) + gap, 3)
    corners = [[(gap + r * (tile[0] + gap), gap + c * (tile[1] + gap)) for c in range(4)] for r in range(3)]
    shown = [[int(picture[y + frame + 50, x + frame + 50, 0]) for y, x in row] for row in corners]
    assert [row[0] for row in shown] == [0, 4, 9]  # evenly over the test split
    # 0 and 7 cannot be read; equal distances come in the order of the bank
    assert shown[0][1:] == [1, 2, 3]
    assert shown[1][1] == 4
    assert set(shown[1][2:]) == {3, 5}
    assert shown[2][1] == 9
    frames = [[tuple(picture[y, x].tolist()) for y, x in row[1:]] for row in corners]
    if labeled:
        assert frames[0] == [OTHER, SAME, OTHER]
        assert frames[1] == [SAME, OTHER, OTHER]
    else:
        assert {color for row in frames for color in row} == {UNKNOWN}


def test_terminal_table_never_mixes_protocols(tmp_path, capsys):
    def measured(subject, step, value, k):
        protocols = {"knn": f"kNN k={k} T=0.1", "linear": f"linear lbfgs l2={value} chosen of 3"}
        return {"subject": subject, "step": step, "metrics": {"knn/top1": value, "linear/top1": value + 1}, "protocols": protocols}

    config = ml_collections.ConfigDict({"method": "simclr", "data": {"name": "scenes"}, "references": {}})
    evaluations = Evaluations(tmp_path, {})
    evaluations.entries = [measured("untrained", 0, 11.0, 20), measured("trained", 9, 55.0, 20), measured("trained", 9, 77.0, 200)]
    evaluations.show(config)
    table = capsys.readouterr().out
    assert "77.00" in table and "55.00" not in table
    assert "11.00" not in table  # k=20
    assert "12.00" in table  # the same linear probe, with another penalty chosen
    evaluations.entries.reverse()  # baselines are measured after the first evaluation, and shown before it
    evaluations.show(config)
    header = capsys.readouterr().out.split("metric")[1].splitlines()[0]
    assert 0 < header.index("untrained") < header.index("trained, step 9")
