"""What grows with the length of a run: `python benchmarks/growth.py`, or a part of it, `--only start`.

    start      seconds from the start of distill.py to its first update, and what the imports take of them
    updates    time and memory of an update at the start and after 10,000, of a teacher and of a student
    images     the same for 1, 10 and 100 times as many images, in memory and mapped from a file
    stages     time and memory of an update in runs of 2 and of 12 stages

A toy network, so that it ends within minutes; everything else is as it is typed. Every measurement has a process of its
own. Memory is what the process holds (Linux's VmRSS), in MB of 10^6 bytes. Slopes are those of the line of least
squares. Weights, images and noise are drawn with seed 0. Measure on an otherwise quiet machine. `--json FILE` keeps
the figures of every part, and adds those of the next.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import speed
import torch
from against import alone, program, stamped
from speed import WARM_UP, Case

from pdistill.bars import bar
from pdistill.dataset import ImageSet
from pdistill.errors import UserError
from pdistill.files import read_json, write_json
from pdistill.report.tables import markdown
from pdistill.training.module import Recipe
from pdistill.training.settings import Training
from pdistill.training.teacher import TeacherModule
from pdistill.weighting import truncated_snr

ROOT = Path(__file__).resolve().parent.parent
TOY = ("network.ch=32", "network.emb_ch=32", "network.ch_mult=[1]", "network.attn_resolutions=[]")
BATCH = 8
UPDATES = 10_000
WINDOW = 500  # updates, of which a median is taken
LEFT_OUT = 100  # updates that warm up
IMAGES = 2000  # 3x32x32, once
IMAGE_UPDATES = 100
STAGES = (2, 12)
STAGE_UPDATES = 100
START_RUNS = 5
START_LIMIT = 8.0  # seconds
MB = 1e6
Row = dict[str, Any]


def memory(pid: int | str = "self", kind: str = "VmRSS") -> float:
    """MB that a process holds: VmRSS, RssAnon or RssFile of it, and VmHWM, the most there were; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / MB if found else 0.0


def slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares."""
    return float(np.polyfit(x, y, 1)[0])


def table(rows: list[Row], *columns: tuple[str, Callable[[Row], Any], str]) -> list[str]:
    """Lines of Markdown; a column is its heading, its value and how that is written."""
    lines = [[f"{value(row):{form}}" for _, value, form in columns] for row in rows]
    return markdown([heading for heading, _, _ in columns], lines)


def toy(command: str, work: Path, **keys: object) -> list[str]:
    """The words of a command line that trains the toy network on digits."""
    given = {
        "training.batch_size": BATCH,
        "training.warmup_updates": 0,
        "metrics": "none",
        "output_root": work / "outputs",
        "name": command,
    } | {key.replace("__", "."): value for key, value in keys.items()}
    return [f"{key}={value}" for key, value in given.items()] + list(TOY)


# ---- updates


def updates(work: Path, distills: bool, count: int) -> Row:
    """Medians of windows of updates, and the memory at their ends, of one long stage."""
    held: list[float] = []

    def look(n: int) -> None:
        if n % WINDOW == 0:
            held.append(memory())

    before = 0
    if distills:
        before = 2 * WINDOW  # of the teacher, which are left out
        keys: Row = {
            "training__updates": before,
            "distillation__batch_size": BATCH,
            "steps__plan": "[2,1]",
            "steps__updates": count + 10 * WINDOW,
            "steps__updates_last_two": count + 10 * WINDOW,
        }
        words = toy("distill", work, **keys)
    else:
        words = toy("train", work, training__updates=count + 10 * WINDOW)
    file = ROOT / ("distill.py" if distills else "train.py")
    ends = stamped(lambda: program(file, *words), before + count + WINDOW, look)["ends"][before:]
    taken = np.diff(ends)[LEFT_OUT:]
    windows = [1000 * statistics.median(taken[k : k + WINDOW]) for k in range(0, len(taken) - WINDOW + 1, WINDOW)]
    held = held[before // WINDOW :]
    thousands = [(k + 0.5) * WINDOW / 1000 for k in range(len(windows))]
    return {
        "what": "student" if distills else "teacher",
        "ms": windows,
        "MB": held,
        "ms_slope": slope(thousands, windows),
        "MB_slope": slope([(k + 1) * WINDOW / 1000 for k in range(len(held))], held),
        "updates": count,
    }


def updates_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        ("update of a", lambda row: row["what"], ""),
        ("first, ms", lambda row: row["ms"][0], ".2f"),
        (f"after {UPDATES:,}, ms", lambda row: row["ms"][-1], ".2f"),
        ("ms per 1,000 updates", lambda row: row["ms_slope"], "+.3f"),
        (f"after {WINDOW}, MB", lambda row: row["MB"][0], ".0f"),
        (f"after {UPDATES + WINDOW:,}, MB", lambda row: row["MB"][-1], ".0f"),
        ("MB per 1,000 updates", lambda row: row["MB_slope"], "+.2f"),
    )


# ---- images


def random_images(file: Path, count: int) -> None:
    """`count` images of 3x32x32 bytes."""
    random = np.random.default_rng(0)
    with file.open("wb") as out:
        for start in range(0, count, IMAGES):
            out.write(random.bytes(min(IMAGES, count - start) * 3 * 32 * 32))


def images(work: Path, count: int, mapped: bool) -> Row:
    """A short training on `count` images: what they take of memory, and until when."""
    file = work / "images"
    random_images(file, count)
    before, start = memory(), time.perf_counter()
    pixels = np.memmap(file, np.uint8, "c", shape=(count, 3, 32, 32))
    data = ImageSet("noise", torch.from_numpy(pixels if mapped else np.array(pixels)))
    opened = time.perf_counter() - start
    if not mapped:
        _ = data.fingerprint  # a run asks for it; the cache of mapped images keeps it
    hashed = time.perf_counter() - start - opened
    case = Case("digits", 32, 3, batch=BATCH, steps=IMAGE_UPDATES, rounds=1, evaluations=1, samplings=1, limit=1.0)
    model = speed.new_denoiser(replace(case, overrides=TOY))
    module = TeacherModule(model, Recipe(Training(batch_size=BATCH, warmup_updates=0), truncated_snr))
    begun = time.perf_counter()
    ends = stamped(lambda: speed.fitted(module, data, case), IMAGE_UPDATES)["ends"]
    stream = iter(data.batches(BATCH, 0, 0))
    next(stream)
    fetched = speed.timed(lambda: next(stream), IMAGE_UPDATES)
    return {
        "images": count,
        "where": "mapped" if mapped else "in memory",
        "open": opened,
        "hash": hashed,
        "first": ends[0] - begun,
        "ms": 1000 * statistics.median(np.diff(ends)[WARM_UP:]),
        "batch_ms": 1000 * statistics.median(fetched),
        "MB": memory() - before,
        "anonymous_MB": memory(kind="RssAnon"),
        "data_MB": count * 3 * 32 * 32 / MB,
    }


def images_table(rows: list[Row]) -> list[str]:
    """With a row of slopes for either place."""
    numbers = ("data_MB", "open", "hash", "first", "ms", "batch_ms", "anonymous_MB")
    slopes = []
    for where in ("in memory", "mapped"):
        of = [row for row in rows if row["where"] == where]
        grown = {key: slope([row["images"] / 100_000 for row in of], [row[key] for row in of]) for key in numbers}
        slopes.append({"images": "per 100,000", "where": where} | grown)
    return table(
        [*rows, *slopes],
        ("images", lambda row: row["images"], ""),
        ("where", lambda row: row["where"], ""),
        ("their MB", lambda row: row["data_MB"], ".0f"),
        ("opened, s", lambda row: row["open"], ".3f"),
        ("hashed, s", lambda row: row["hash"], ".3f"),
        ("first update, s", lambda row: row["first"], ".2f"),
        ("update, ms", lambda row: row["ms"], ".2f"),
        ("a batch of it, ms", lambda row: row["batch_ms"], ".3f"),
        ("memory, mapped files left out, MB", lambda row: row["anonymous_MB"], ".0f"),
    )


# ---- stages


def stages(work: Path, count: int) -> Row:
    """A whole run of distill.py, looked at from outside."""
    plan = [2**k for k in range(count, -1, -1)]
    keys: Row = {
        "training__updates": STAGE_UPDATES,
        "distillation__batch_size": BATCH,
        "steps__plan": f"[{','.join(map(str, plan))}]",
        "steps__updates": STAGE_UPDATES,
        "steps__updates_last_two": STAGE_UPDATES,
    }
    run = work / "outputs" / "distill"
    held: dict[int, float] = defaultdict(float)
    start = time.perf_counter()
    with (work / "output").open("w") as output:
        process = started(toy("distill", work, **keys), work, output)
        while process.poll() is None:
            done = len(list(run.glob("*/cost.json")))
            held[done] = max(held[done], memory(process.pid))
            time.sleep(0.02)
    whole = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"distill.py stopped with status {process.returncode}: {(work / 'output').read_text()[-500:]}")
    spent = [read_json(run / f"steps-{n:04}" / "cost.json")["training_seconds"] for n in plan[1:]]
    ms = [1000 * seconds / STAGE_UPDATES for seconds in spent]
    peaks = [held[k] for k in range(1, count + 1)]  # 0 is the teacher's
    numbers = [float(k) for k in range(count)]
    return {
        "stages": count,
        "ms": ms,
        "MB": peaks,
        "ms_slope": slope(numbers, ms),
        "MB_slope": slope(numbers, peaks),
        "seconds": whole,
        "seconds_training": sum(spent),
    }


def stages_table(rows: list[Row]) -> list[str]:
    return table(
        rows,
        ("stages", lambda row: row["stages"], ""),
        ("update of the first, ms", lambda row: row["ms"][0], ".2f"),
        ("of the last, ms", lambda row: row["ms"][-1], ".2f"),
        ("ms per stage", lambda row: row["ms_slope"], "+.3f"),
        ("peak of the first, MB", lambda row: row["MB"][0], ".0f"),
        ("of the last, MB", lambda row: row["MB"][-1], ".0f"),
        ("MB per stage", lambda row: row["MB_slope"], "+.2f"),
        ("whole run, s", lambda row: row["seconds"], ".1f"),
        ("of it updates of students, s", lambda row: row["seconds_training"], ".1f"),
    )


# ---- start


def started(words: list[str], work: Path, output: Any, *options: str) -> "subprocess.Popen[bytes]":
    """distill.py in a process of its own, with a cache of its own."""
    environment = os.environ | {"PDISTILL_CACHE": str(work / "cache")}
    environment.pop("GOMP_SPINCOUNT", None)
    command = [sys.executable, *options, str(ROOT / "distill.py"), *words]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def first_update(work: Path, name: str, *options: str) -> tuple[float, str]:
    """Seconds from the start of `distill.py` (digits) to the checkpoint of its first update; and what it printed."""
    file = work / "outputs" / name / "teacher" / "last.ckpt"
    words = [f"output_root={work / 'outputs'}", f"name={name}", "checkpoint_every_n_updates=1"]
    printed = work / f"{name}.txt"
    with printed.open("w") as output:
        start = time.perf_counter()
        process = started(words, work, output, *options)
        try:
            while not file.exists():
                if process.poll() is not None:
                    raise UserError(f"distill.py ended before its first update: {printed.read_text()[-500:]}")
                time.sleep(0.005)
            return time.perf_counter() - start, printed.read_text()
        finally:
            process.terminate()
            process.wait()


def imported(printed: str) -> dict[str, float]:
    """Seconds that the modules of every package took by themselves, by `-X importtime`, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)", printed):
        seconds[module] += int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def start(work: Path) -> Row:
    first_update(work, "once")  # for compiled files and the disk's cache
    seconds = [first_update(work, f"run-{k}")[0] for k in bar(range(START_RUNS), "start", unit="process")]
    packages = imported(first_update(work, "imports", "-X", "importtime")[1])
    return {"seconds": seconds, "imports": sum(packages.values()), "packages": dict(list(packages.items())[:10])}


def start_table(rows: list[Row]) -> list[str]:
    (row,) = rows
    median = statistics.median(row["seconds"])
    verdict = f"{'within' if median <= START_LIMIT else 'ABOVE'} {START_LIMIT:g}"
    lines = [["distill.py until its first update", f"{median:.2f}"], ["the limit", verdict]]
    lines += [["all imports, timed (which slows them)", f"{row['imports']:.2f}"]]
    lines += [[f"of them {package}", f"{seconds:.2f}"] for package, seconds in row["packages"].items()]
    return markdown(["", "seconds"], lines)


# ---- all of it


def measure(part: str, work: Path, file: Path) -> Iterator[Row]:
    """The rows of one part, as they are measured."""
    names = {
        "updates": ["teacher", "student"],
        "images": [f"{IMAGES * times}-{where}" for where in ("memory", "mapped") for times in (1, 10, 100)],
        "stages": [str(count) for count in STAGES],
    }
    if part == "start":
        yield start(work)
    for name in bar(names.get(part, []), part, unit="row"):
        with tempfile.TemporaryDirectory(dir=work) as directory:
            yield alone(file, f"{part}-{name}", Path(directory))


def work_as(name: str, work: Path) -> Row:
    """What a worker's process measures: `updates-teacher`, `images-2000-mapped`, `stages-12`."""
    part, value, *more = name.split("-")
    if part == "updates":
        return updates(work, value == "student", UPDATES)
    return images(work, int(value), more == ["mapped"]) if part == "images" else stages(work, int(value))


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "start": start_table,
    "updates": updates_table,
    "images": images_table,
    "stages": stages_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="these parts; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("error: memory is read from /proc, which this system does not have: use Linux")
    try:
        if options.worker:
            return write_json(options.work / f"{options.worker}.json", work_as(options.worker, options.work))
        kept = read_json(options.json, {}) if options.json else {}
        for part in options.only:
            rows = kept[part] = []
            with tempfile.TemporaryDirectory() as directory:
                for row in measure(part, Path(directory), Path(__file__).resolve()):
                    rows.append(row)
                    if options.json:
                        write_json(options.json, kept)
            print("\n".join([f"{part}:", *TABLES[part](rows), ""]), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
