"""Random and damaged input for what ssl_jax reads: every answer is a result or one line, in bounded time and memory.

  pip install hypothesis
  python benchmarks/fuzz.py --minutes=10                          all targets, ten minutes in all
  python benchmarks/fuzz.py --target=card --minutes=2
  python benchmarks/fuzz.py --target=card --seed=17 --rounds=1    what a failure of seed 17 was

Each target runs in a process of its own. A failure is a traceback (any exception but UserError, MachineFault and, for pictures,
CorruptImage), an aborted process, more than 60 s for one input, or more than 4 GB of memory. It is printed once per kind, with its
seed; the exit code is 1 if there was one. Hypothesis draws the inputs: a seed draws the same ones in the same versions.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, in the targets
HANG, MEMORY = 60.0, 4 << 30  # seconds of one input, bytes of the process
EXAMPLES = 50  # of a round, which has one seed
WORKDIR = ROOT / "tests" / "data" / "workdir_d65cb39.tar.gz"

# ---------------------------------------------------------------------------------------------------- inputs

WORDS = ["", "x", "\x00", "\x1b[2J", "\ud800", "../../etc/passwd", "-1", "--all", "a\nb", "nan", "8" * 5000, "%s{}", "‮"]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 0.5]
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.integers(), st.floats(), st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)


def places(document, at=()):
    """Every path of keys and indices in a JSON document."""
    yield at
    children = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


@st.composite
def changed_json(draw, document):
    """Text of `document` with one to three entries replaced, removed, renamed, wrapped or added; sometimes cut."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = [None, *draw(st.sampled_from(list(places(document))))]
        if not path:
            document = draw(st.one_of(values, st.just(document)))
            continue
        parent = document
        for key in path[1:]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "rename", "double"]))
        if action == "replace":
            parent[last] = draw(values)
        elif action == "wrap":
            parent[last] = draw(st.sampled_from([[parent[last]], {"a": parent[last]}]))
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, list):
            parent.append(parent[last])
        elif action == "rename":
            parent[draw(st.sampled_from(WORDS))] = parent.pop(last)
        else:
            parent[last] = [parent[last]] * 2
    text = json.dumps(document)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


@st.composite
def changed_bytes(draw, content):
    """`content` with up to eight bytes changed, a part removed, doubled or moved, or cut; rarely all random."""
    if not content or draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=400))
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, max(0, min(len(content) - 1, draw(st.sampled_from([30, 200, 10**9]))))))
        length = draw(st.integers(1, 16))
        action = draw(st.sampled_from(["set", "set", "set", "extreme", "remove", "double", "cut"]))
        if action == "set":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif action == "extreme":
            content[at : at + length] = draw(st.sampled_from([b"\xff", b"\x00", b"\x7f"])) * length
        elif action == "remove":
            del content[at : at + length]
        elif action == "double":
            content[at:at] = content[at : at + length]
        elif draw(st.integers(0, 3)) == 0:
            del content[at:]
    return bytes(content)


# ---------------------------------------------------------------------------------------------------- targets


class Failed(Exception):
    """The program did what no input may make it do."""


def verb(*arguments):
    """Run a verb as the command line does."""
    from launch import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main([str(argument) for argument in arguments])
    if code not in (0, 2, 74):
        raise Failed(f"exit code {code}")


def allowed(call, *others):
    """`call()`, whose UserError or MachineFault is one line."""
    from ssl_jax.errors import MachineFault, UserError

    try:
        return call()
    except (UserError, MachineFault, *others) as error:
        if "\n" in str(error).strip():
            raise Failed(f"a message of several lines: {str(error)[:200]!r}") from error


def unpacked(folder):
    shutil.unpack_archive(WORKDIR, folder, filter="data")
    return folder / "runs_of_d65cb39"


class Overrides:
    """--config.KEY=VALUE up to the program that would be compiled."""

    RECIPES = ("simclr", "vae", "supervised", "gan", "vqvae", "autoencoder", "maskgit", "bigan")
    TEXTS = ("[9]", "[0]", ".x", "[", "..", "[-1]")

    def __init__(self, folder):
        from ssl_jax.experiment import config as configs

        self.recipes = {name: configs.plain(configs.load(f"{ROOT}/configs/{name}.py:smoke")) for name in self.RECIPES}

    def __call__(self, data):
        from ssl_jax.experiment import training
        from ssl_jax.experiment.build import build_experiment

        recipe = data.draw(st.sampled_from(self.RECIPES))
        config = self.recipes[recipe]
        all_places = [place for place in places(config) if place and not any(isinstance(key, int) for key in place)]
        keys = [".".join(place) for place in all_places]
        settings = [functools.reduce(lambda at, key: at[key], place, config) for place in all_places]
        known = sorted({str(value) for value in settings if not isinstance(value, dict | list)})
        overrides = []
        for _ in range(data.draw(st.integers(1, 2))):
            key = data.draw(st.sampled_from(keys))
            suffix = data.draw(st.sampled_from(["", "", "", "", "", *self.TEXTS]))
            value = data.draw(st.one_of(values.map(repr), values.map(str), st.sampled_from(known), st.sampled_from(WORDS)))
            overrides.append(f"--config.{key}{suffix}={value}")
        hypothesis.note(f"{recipe} {overrides}")
        small = ["--config.data.train_split=train[:64]", "--config.data.test_split=test[:32]"]

        def run():
            build_experiment(training.load_config(f"{ROOT}/configs/{recipe}.py:smoke", [*small, *overrides]))

        allowed(run)


class Pictures:
    """Bytes of pictures in every format."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.pictures = []
        for form, mode, options in [("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("JPEG", "RGB", {}),
                                    ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {}), ("GIF", "P", {}),
                                    ("BMP", "RGB", {}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("TIFF", "RGB", {}),
                                    ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}), ("PPM", "RGB", {})]:  # fmt: skip
            pixels = rng.integers(0, 255, (19, 23, 3), np.uint8)
            image = Image.fromarray(pixels).convert("L" if mode in ("I;16", "F") else mode)
            image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
            file = io.BytesIO()
            image.save(file, form, **options)
            self.pictures.append(file.getvalue())

    def __call__(self, data):
        from ssl_jax.data.decode import CorruptImage, Picture, mask_pixels

        content = data.draw(changed_bytes(data.draw(st.sampled_from(self.pictures))))
        pixels = allowed(lambda: Picture(content).pixels(), CorruptImage)
        if pixels is not None and (pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3):
            raise Failed(f"pixels {pixels.dtype} {pixels.shape}")
        allowed(lambda: mask_pixels(content), CorruptImage)


class Job:
    """job.json in status, logs and cancel. No process may get a signal, and no program of an engine is here."""

    def __init__(self, folder):
        self.folder = folder
        common = {"number": 1, "submitted": "2026-01-01T00:00:00+0000", "command": ["launch.py"], "sent": "x"}
        self.jobs = [
            {"engine": "slurm", "id": "7", **common},
            {"engine": "gke", "id": "a-1", "namespace": "default", **common},
            {"engine": "tpu-vm", "id": "pod", "zone": "us-west4-a", **common},
            {"engine": "local", "id": os.getpid(), "host": os.uname().nodename, "born": "1", **common},
        ]
        os.environ["PATH"] = str(folder)

        def killed(*arguments):
            raise Failed(f"a signal was sent: {arguments}")

        os.kill = os.killpg = killed

    def __call__(self, data):
        job = dict(data.draw(st.sampled_from(self.jobs)))
        if job["engine"] == "local":
            job["id"] = data.draw(st.sampled_from([1, 2, os.getpid(), os.getppid()]))
            with contextlib.suppress(OSError):
                job["born"] = pathlib.Path(f"/proc/{job['id']}/stat").read_text().rpartition(")")[2].split()[19]
        text = data.draw(changed_json(job)) if data.draw(st.booleans()) else json.dumps(job)
        (self.folder / "job.json").write_text(text, errors="surrogatepass")
        for name in ("status", "logs", "cancel"):
            verb(name, f"--workdir={self.folder}")


class Evaluations:
    """evaluations.json in the report, in an export and in the table of a run."""

    def __init__(self, folder):
        self.run = unpacked(folder) / "simclr"
        self.entries = json.loads((self.run / "evaluations.json").read_text())

    def __call__(self, data):
        from ssl_jax.experiment.evaluations import Evaluations
        from ssl_jax.experiment.export_run import scores
        from ssl_jax.experiment.workdir import read_config

        (self.run / "evaluations.json").write_text(data.draw(changed_json(self.entries)), errors="surrogatepass")
        verb("report", f"--workdir={self.run}")
        allowed(lambda: scores(self.run, 4))
        with contextlib.redirect_stdout(io.StringIO()):
            allowed(lambda: Evaluations(self.run, {}).show(read_config(self.run)))


class Card:
    """card.json of each form of an export, loaded and called."""

    def __init__(self, folder):
        runs = unpacked(folder)
        self.folders = [runs / "simclr" / "export" / "safetensors", runs / "tokens" / "export" / "orbax", folder / "stablehlo"]
        self._stablehlo(runs)
        self.cards = [json.loads((folder / "card.json").read_text()) for folder in self.folders]

    def _stablehlo(self, runs):
        import ml_collections

        from ssl_jax.experiment.export_run import read_checkpoint
        from ssl_jax.experiment.workdir import read_config
        from ssl_jax.export.card import seal
        from ssl_jax.export.formats import write_stablehlo
        from ssl_jax.export.source import make_source

        config = read_config(runs / "simclr")
        saved = read_checkpoint(runs / "simclr", 8, 4)[1]
        source = make_source(ml_collections.ConfigDict(config), saved["params"], saved["mutable"])
        self.folders[2].mkdir()
        fields = write_stablehlo(self.folders[2], source)
        card = json.loads((self.folders[0] / "card.json").read_text())
        features = {name: ["b", *value.shape[1:]] for name, value in source.expected.items()}
        del card["files"]
        seal(self.folders[2], {**card, "format": "stablehlo", "features": features, **fields})

    def __call__(self, data):
        import ssl_jax

        which = data.draw(st.integers(0, 2))
        (self.folders[which] / "card.json").write_text(data.draw(changed_json(self.cards[which])), errors="surrogatepass")

        def run():
            encoder = ssl_jax.load(self.folders[which])
            size = encoder.card["input"]
            if size["height"] * size["width"] < 10_000:
                encoder(np.zeros((1, size["height"], size["width"], 3), np.uint8))

        allowed(run)


class Checkpoint:
    """The files that describe a checkpoint, before it is exported."""

    def __init__(self, folder):
        self.run = unpacked(folder) / "simclr"
        self.step = self.run / "checkpoints" / "4"
        self.files = {}
        for path in sorted(self.step.rglob("*")):
            if path.is_file() and path.stat().st_size < 100_000:
                self.files[path] = path.read_bytes()

    def __call__(self, data):
        from ssl_jax.experiment.export_run import read_checkpoint

        path = data.draw(st.sampled_from(list(self.files)))
        try:
            content = data.draw(changed_json(json.loads(self.files[path]))).encode(errors="surrogatepass")
        except ValueError:  # not a JSON file
            content = data.draw(changed_bytes(self.files[path]))
        path.write_bytes(content)
        try:
            allowed(lambda: read_checkpoint(self.run, 8, 4))
        finally:
            path.write_bytes(self.files[path])


TARGETS = {"overrides": Overrides, "pictures": Pictures, "job": Job, "evaluations": Evaluations, "card": Card, "checkpoint": Checkpoint}

# ---------------------------------------------------------------------------------------------------- processes


def work(name, seed, rounds, folder, say):
    """Run rounds from `seed` on in this process. `say` gets ('input', seed), ('failure', seed, kind, text), ('done',)."""
    target, seen = TARGETS[name](folder), set()
    for number in range(seed, seed + rounds):

        @hypothesis.seed(number)
        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, database=None, phases=[hypothesis.Phase.generate], print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck), report_multiple_bugs=False,
        )  # fmt: skip
        @hypothesis.given(st.data())
        def one_round(data):
            say("input", number)  # noqa: B023  it runs in this round
            target(data)

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                one_round()
        except Exception as error:  # noqa: BLE001  whatever it is, it is what we look for
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/ssl_jax/" in frame.filename]
            where = f"{pathlib.Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
            kind = f"{type(error).__name__} at {where}"
            if kind not in seen:
                seen.add(kind)
                notes = " | ".join(getattr(error, "__notes__", ()))
                say("failure", number, kind, f"{str(error)[:300]} | {notes[:600]}")
    say("done")


class Child:
    """A process that works on one target, watched for hangs and memory."""

    def __init__(self, name, seed, rounds):
        command = [sys.executable, __file__, f"--target={name}", f"--seed={seed}", f"--rounds={rounds}", "--child"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.lines, self.seed, self.largest = queue.Queue(), seed, 0
        threading.Thread(target=lambda: [*map(self.lines.put, self.process.stdout), self.lines.put(None)], daemon=True).start()

    def memory(self):
        try:
            status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        rows = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        self.largest = max(self.largest, int(rows.get("VmRSS", "0 kB").split()[0]) << 10)
        return self.largest

    def end(self):
        self.process.kill()
        self.process.wait()


def watch(name, seed, rounds, until, failures):
    """Run a target until the time `until` or for `rounds` rounds; returns (number of inputs, largest memory)."""
    count, largest = 0, 0
    while time.monotonic() < until:
        child, last, started, problem = Child(name, seed, rounds), time.monotonic(), False, ""
        while time.monotonic() < until and not problem:
            with contextlib.suppress(queue.Empty):
                line = child.lines.get(timeout=0.2)
                if line is None:
                    problem = f"aborted with code {child.process.wait()}"
                    break
                what, *rest = json.loads(line)
                last, started = time.monotonic(), True
                if what == "done":
                    child.end()
                    return count, max(largest, child.largest)
                child.seed = rest[0]
                count += what == "input"
                if what == "failure":
                    failures[name].setdefault(rest[1], (rest[0], rest[2]))
            if child.memory() > MEMORY:
                problem = f"more than {MEMORY >> 30} GB of memory"
            if time.monotonic() - last > HANG * (1 if started else 3):  # the first import takes its time
                problem = f"no answer after {HANG:.0f} s"
        child.end()
        largest = max(largest, child.largest)
        if problem:
            failures[name].setdefault(problem, (child.seed, "run this seed to see it"))
            rounds -= child.seed + 1 - seed
            seed = child.seed + 1
            if rounds < 1:
                break
    return count, largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (default: 10)")
    parser.add_argument("--target", choices=TARGETS, help="default: all, with equal times")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: 0)")
    parser.add_argument("--rounds", type=int, default=10**9, help=f"of {EXAMPLES} inputs each (default: until the time is over)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        out = os.fdopen(os.dup(1), "w", buffering=1)
        # Inputs that are understood as relative paths write there, too.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            work(args.target, args.seed, args.rounds, pathlib.Path(folder), lambda *what: print(json.dumps(what), file=out))
        return 0
    names, failures = [args.target] if args.target else list(TARGETS), collections.defaultdict(dict)
    rows = []
    for name in names:
        began = time.monotonic()
        count, largest = watch(name, args.seed, args.rounds, began + 60 * args.minutes / len(names), failures)
        seconds = time.monotonic() - began
        rows += [(name, "inputs", count), (name, "failures", len(failures[name])), (name, "memory_gb", f"{largest / 2**30:.1f}")]
        print(f"{name}: {count:,} inputs in {seconds:.0f} s, at most {largest / 2**30:.2f} GB, {len(failures[name])} kinds of failures")
        for kind, (seed, text) in failures[name].items():
            print(f"    {kind}: --target={name} --seed={seed} --rounds=1\n        {text}", flush=True)
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    print("\nrows of docs/results/robustness.csv, without the machine and a note:")
    for name, metric, value in rows:
        print(f"all,benchmarks/fuzz.py,,{name},,,{metric},{value},,,fuzz,{commit},,")
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
