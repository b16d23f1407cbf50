"""Kill, fill, damage and disturb real runs.

Nothing that was written may be lost, and nothing wrong may be accepted.

    python scripts/fault_bench.py --out faults.json

Five kinds of faults, on small-cnn and scikit-learn's digits: SIGKILL at random moments, a full disk (a small
tmpfs; needs root), truncated files and flipped bits, images that go or change under way, and two writers on
one folder. Each run must end, after ``--resume``, with what an undisturbed run wrote, byte for byte, or be
refused in one line that names the file. A damaged file may also change nothing that is used: those are
counted apart, as harmless. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fault_work import Outcome, Row, Work, call, complete_lines, end, start, wait_until
from PIL import Image

from certipatch.data.load import load_source
from certipatch.records.manifest import MANIFEST, read_manifest
from certipatch.records.read import read_records
from certipatch.records.schema import EPOCHS, RECORDS, PatchCleanserRecord

PARTS = ("kill-certify", "kill-train", "disks", "damages", "images", "writers")


def kills(name: str, work: Work, n: int, place: Path, rng: random.Random) -> Iterator[Row]:
    """``n`` kills in each of four phases, several in a run, each followed by ``--resume``."""
    rows = {
        phase: Row(f"SIGKILL of {name}, {phase}")
        for phase in ("in start-up", "while writing", "while finishing", "at any moment")
    }
    left = [phase for phase in rows for _ in range(n)]
    rng.shuffle(left)
    lines, total = place / work.lines, complete_lines(work.whole / work.lines).count(b"\n")
    while left:
        shutil.rmtree(place, ignore_errors=True)
        problem, again, killed = None, False, []
        while left and problem is None:
            phase, before = left[-1], complete_lines(lines)
            process = work.start(place, resume=again)
            if phase == "while writing":
                more = rng.randint(before.count(b"\n") + 1, total) if before.count(b"\n") < total else total
                wait_until(
                    process,
                    lambda more=more: (
                        complete_lines(lines).count(b"\n") >= more or (place / ".checkpoint.pt.tmp").exists()
                    ),
                )
                time.sleep(rng.uniform(0, 0.1))
            elif phase == "while finishing":
                wait_until(process, lambda: complete_lines(lines).count(b"\n") == total)
                time.sleep(rng.uniform(0, 0.05))
            else:
                time.sleep(
                    rng.uniform(0, work.seconds_to_manifest if phase == "in start-up" else work.seconds)
                )
            process.kill()
            outcome = end(process)
            if not complete_lines(lines).startswith(before):
                problem = "lines that were there before are gone"
            if outcome.code == 0:  # it was quicker
                break
            if outcome.code != -9:
                problem = f"exit code {outcome.code}: {outcome.err[-500:]}"
            killed.append(left.pop())
            again = True
            if rng.random() < 0.4:
                break
        written = complete_lines(lines)
        problem = problem or work.resumed(place)
        if problem is None and not complete_lines(lines).startswith(written):
            problem = "lines that were there before are gone"
        for phase in killed:
            rows[phase].count(problem)
    yield from rows.values()


def full_disk(name: str, work: Work, sizes: list[int], place: Path) -> Row:
    """Disks of so many KiB: one line, and nothing that was written is lost.

    ``--resume`` on a larger disk ends as if nothing had been.
    """
    row = Row(f"full disk, {name}")
    for size in sizes:
        place.mkdir(exist_ok=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            row.skipped = f"a tmpfs cannot be mounted here ({mounted.stderr.strip()[:100]})"
            return row
        try:
            out = place / "out"
            problem = end(work.start(out)).complaint("No space left on device", code=3)
            written = complete_lines(out / work.lines)
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            problem = problem or work.resumed(out)
            if problem is None and not complete_lines(out / work.lines).startswith(written):
                problem = "lines that were there before are gone"
            row.count(problem and f"{size} KiB: {problem}")
        finally:
            subprocess.run(["umount", place], check=True)
    return row


@dataclass(frozen=True)
class Reader:
    """A command that reads a folder.

    ``right`` says, of an outcome without complaint, what is wrong with it, if anything.
    """

    name: str
    run: Callable[[], Outcome]
    right: Callable[[Outcome], str | None]


def damaged(rng: random.Random, data: bytes, kind: str) -> tuple[bytes, str]:
    """One bit flipped, or an end cut off (of lines every other time at the end of one); and a note of it."""
    if kind == "bit flips":
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        note = f"bit {bit} of byte {at} of {len(data)}, in {data[max(0, at - 12) : at + 12]!r}"
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], note
    ends = [i + 1 for i, byte in enumerate(data[:-1]) if byte == ord("\n")] if data.endswith(b"\n") else []
    at = rng.choice(ends) if ends and rng.random() < 0.5 else rng.randrange(len(data))
    return data[:at], f"cut to {at} of {len(data)} bytes"


def damage(
    what: str, folder: Path, name: str, readers: list[Reader], counts: dict[str, int], rng: random.Random
) -> Row:
    """Damage one file of a folder; each reader refuses it, naming it, or does as if it were whole."""
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def restore() -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for file, data in kept.items():
            (folder / file).write_bytes(data)

    row = Row(f"damaged {name} of {what}")
    for kind in (kind for kind, n in counts.items() for _ in range(n)):
        data, note = damaged(rng, kept[name], kind)
        problems, detected = [], False
        for reader in readers:
            restore()
            (folder / name).write_bytes(data)
            outcome = reader.run()
            if outcome.code == 0:
                problem = reader.right(outcome)
            else:
                findings = outcome.code == 1 and reader.name == "verify" and Path(name).stem in outcome.out
                problem = None if findings else outcome.complaint(Path(name).stem)
                detected = True
            if problem is not None:
                problems.append(f"{reader.name}: {problem}")
        row.count(f"{note}: {'; '.join(problems)}" if problems else None, harmless=not detected)
        if not detected and not problems:
            row.examples.append(note)
    restore()
    return row


def same_output(*arguments: object, name: str = "") -> Reader:
    """A command that must answer what it answers now."""
    expected = call(*arguments)
    assert expected.code == 0, expected.err
    return Reader(
        name or str(arguments[0]),
        lambda: call(*arguments),
        lambda found: None if found.out == expected.out else f"answers {found.out[:500]}",
    )


def ends_the_same(work: Work, folder: Path) -> Reader:
    return Reader(
        f"{work.arguments[0]} --resume",
        lambda: work.resume(folder, quick=True),
        lambda _: work.difference(folder),
    )


def partial_report(folder: Path) -> Reader:
    """Of an unfinished certification: records it reads are the first ones, as they were written."""
    expected = read_records(folder)

    def right(_: Outcome) -> str | None:
        found = read_records(folder)
        return None if found == expected[: len(found)] else "reports other records"

    return Reader("report", lambda: call("report", folder, "--json"), right)


def unfinished(work: Work, folder: Path, lines: int) -> None:
    """What a kill leaves once so many lines are there (and, in training, a checkpoint)."""
    process = work.start(folder)
    train = work.lines == EPOCHS
    wait_until(
        process,
        lambda: (
            complete_lines(folder / work.lines).count(b"\n") >= lines
            and (not train or (folder / "checkpoint.pt").exists())
        ),
    )
    process.kill()
    end(process)
    assert read_manifest(folder).finished is None


def damages(place: Path, run: Path, image: Path, n: dict[str, int], rng: random.Random) -> Iterator[Row]:
    options = "--data digits --strategy vanilla --limit 64 --patch 5 --epochs 8 --batch-size 8"
    training = Work.undisturbed(place / "run", "train", "--model", "small-cnn", *options.split())
    options = "--data digits --patch 5 --masks-per-axis 3 --limit 192"
    certifying = Work.undisturbed(place / "c", "certify", "--model", run, *options.split())
    unfinished(certifying, place / "half-c", 64)
    unfinished(training, place / "half-run", 2)

    answers = same_output("predict", image, "--model", place / "run", "--patch", 5, "--masks-per-axis", 2)
    again = same_output(
        *training.arguments, "--out", place / "run", "--resume", "--json", name="train --resume"
    )
    for name in (MANIFEST, "model.safetensors", EPOCHS, "epochs.sha256"):
        yield damage("a finished training", place / "run", name, [answers, again], n, rng)

    defended = same_output("predict", image, "--model", run, "--certified", place / "c")
    seen = [same_output(command, place / "c", "--json") for command in ("report", "verify")]
    again = same_output(
        *certifying.arguments, "--out", place / "c", "--resume", "--json", name="certify --resume"
    )
    for name in (MANIFEST, RECORDS, "records.sha256"):
        yield damage("a finished certification", place / "c", name, [*seen, again, defended], n, rng)

    for name in (MANIFEST, EPOCHS, "epochs.sha256", "checkpoint.pt"):
        yield damage(
            "an unfinished training",
            place / "half-run",
            name,
            [ends_the_same(training, place / "half-run")],
            n,
            rng,
        )

    readers = [partial_report(place / "half-c"), ends_the_same(certifying, place / "half-c")]
    for name in (MANIFEST, RECORDS, "records.sha256"):
        yield damage("an unfinished certification", place / "half-c", name, readers, n, rng)


def write_digits(folder: Path, each: int) -> Path:
    """Digits as PNG files, ``each`` of every class."""
    source = load_source("digits")
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        chosen = [i for i, found in enumerate(source.labels) if found == label][:each]
        for number, i in enumerate(chosen):
            source.open(i).save(folder / str(label) / f"{number:03}.png")
    return folder


def spoil(path: Path, how: str) -> None:
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        pixels = Image.open(path).convert("L").point(lambda value: 255 - value)
        pixels.save(path)


def _alone(record: PatchCleanserRecord) -> PatchCleanserRecord:
    """What of a record does not depend on the other images of its block.

    With an image less, they share other batches.
    """
    return record.model_copy(
        update={"passes": 0, "margin": None, "failing_pair": None, "failing_label": None}
    )


def images_under_way(place: Path, run: Path, rng: random.Random) -> Iterator[Row]:
    photos = write_digits(place / "photos", 20)  # 200: six blocks of 32 and one of 8
    certifying = Work.undisturbed(
        place / "c", "certify", "--model", run, "--data", photos, "--patch", 5, "--masks-per-axis", 5
    )
    options = "--model small-cnn --strategy greedy-coarse --patch 5 --epochs 6 --batch-size 20"
    training = Work.undisturbed(
        place / "run", "train", "--data", photos, "--val-data", photos, *options.split()
    )
    whole = {record.name: record for record in read_records(place / "c")}
    row, later, trained = (
        Row("image spoiled while certify runs"),
        Row("image spoiled before certify --resume"),
        Row("image spoiled while train runs"),
    )
    for number, how in enumerate(("removed", "truncated", "replaced")):
        late, early = (
            f"9/{rng.randrange(12, 20):03}.png",
            f"0/{rng.randrange(1, 20):03}.png",
        )  # early: not of the eight that are hashed
        kept = {name: (photos / name).read_bytes() for name in (late, early)}

        def restore(kept: dict[str, bytes] = kept) -> None:
            for name, data in kept.items():
                (photos / name).write_bytes(data)

        out = place / f"c{number}"
        process = certifying.start(out)
        wait_until(process, lambda out=out: complete_lines(out / RECORDS).count(b"\n") >= 32)
        spoil(photos / late, how)
        done = end(process)
        problem = None if done.code == 0 else done.err[-500:]
        if problem is None:
            found = {record.name: record for record in read_records(out)}
            record = found.pop(late)
            if any(_alone(other) != _alone(whole[name]) for name, other in found.items()):
                problem = "another image has another record"
            elif how == "replaced" and record.pixels in (None, whole[late].pixels):
                problem = "its record does not have the pixels that were looked at"
            elif how != "replaced" and (record.error is None or record.certified):
                problem = "is not named as unreadable"
        restore()
        checked = end(start("verify", out, "--model", run, "--data", photos, "--all"))
        if problem is None and (checked.code != 1 or late not in checked.out):
            problem = "verify does not find that the image is another one now"
        row.count(problem and f"{how}: {problem}")

        out = place / f"d{number}"
        unfinished(certifying, out, 64)
        spoil(photos / early, how)
        done = certifying.resume(out)
        if how == "removed":
            problem = done.complaint("another experiment (data.")
        elif done.code:
            problem = done.err[-500:]
        else:
            problem = certifying.difference(out)  # of the image as it was when it was looked at
            checked = end(start("verify", out, "--model", run, "--data", photos, "--all"))
            if problem is None and (checked.code != 1 or early not in checked.out):
                problem = "verify does not find that the image is another one now"
        restore()
        if problem is None and how == "removed":
            problem = certifying.resumed(out)
        later.count(problem and f"{how}: {problem}")

        if how == "replaced":  # training has no record of single images
            continue
        out = place / f"r{number}"
        process = training.start(out)
        wait_until(process, lambda out=out: complete_lines(out / EPOCHS) != b"")
        spoil(photos / early, how)
        problem = end(process).complaint(early)
        restore()
        trained.count((problem or training.resumed(out)) and f"{how}: {problem or training.difference(out)}")
    yield from (row, later, trained)


def two_writers(name: str, work: Work, n: int, place: Path, rng: random.Random, *more: object) -> Row:
    """Started within a second of each other: one ends as if it were alone, the other is refused."""
    row = Row(f"two writers, {name}")
    for number in range(n):
        out = place / f"{name.replace(' ', '-')}-{number}"
        first = start(*work.arguments, *more, "--out", out)
        time.sleep(rng.uniform(0, 1))
        done = sorted(
            (end(process) for process in (first, start(*work.arguments, *more, "--out", out))),
            key=lambda one: one.code,
        )
        problem = None if done[0].code == 0 else done[0].err[-500:]
        problem = problem or done[1].complaint(
            "another process is writing there", "continue it with --resume"
        )
        if problem is None and more:  # the other shard, so that all is there
            done = [end(start(*work.arguments, "--shard", "2/2", "--out", out))]
            same = read_records(out) == read_records(work.whole)
            problem = done[0].err[-500:] if done[0].code else None if same else "other records"
        row.count(problem or (None if more else work.difference(out)))
    return row


def faults(place: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    rng, quick = random.Random(arguments.seed), arguments.quick
    parts = [arguments.only] if arguments.only else [part for part in PARTS if part != "images" or not quick]
    options = "--data digits --strategy greedy-coarse --limit 400 --patch 5 --epochs 5 --batch-size 16"
    train = Work.undisturbed(place / "run", "train", "--model", "small-cnn", *options.split())
    options = "--data digits --patch 5 --masks-per-axis 5 --limit 256"
    certify = Work.undisturbed(place / "c", "certify", "--model", place / "run", *options.split())
    works = {"certify": certify, "train": train}
    for name, work in works.items():
        if f"kill-{name}" in parts:
            yield from kills(name, work, 1 if quick else arguments.kills, place / "killed", rng)
    if "disks" in parts:
        sizes = {"certify": [4, 8, 16, 24, 40, 64, 96], "train": [4, 8, 200, 600, 700, 1000, 1100]}
        for name, work in works.items():
            yield full_disk(name, work, rng.sample(sizes[name], 1) if quick else sizes[name], place / "full")
    if "damages" in parts:
        image = place / "digit.png"
        load_source("digits").open(0).save(image)
        (place / "damaged").mkdir()
        counts = (
            {"truncations": 1, "bit flips": 2}
            if quick
            else {"truncations": arguments.damages // 4, "bit flips": arguments.damages * 3 // 4}
        )
        yield from damages(place / "damaged", place / "run", image, counts, rng)
    if "images" in parts:
        (place / "images").mkdir()
        yield from images_under_way(place / "images", place / "run", rng)
    if "writers" in parts:
        for name, work in works.items():
            yield two_writers(name, work, 1 if quick else 5, place, rng)
        if not quick:
            yield two_writers("same shard of certify", certify, 5, place, rng, "--shard", "1/2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kills", type=int, default=7, help="of each command in each of four phases (default: 7, so 56)"
    )
    parser.add_argument(
        "--damages",
        type=int,
        default=80,
        help="of each file, three in four of them flipped bits (default: 80)",
    )
    parser.add_argument("--only", choices=PARTS, help="this kind of fault only")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the small disk is unmounted
    place, began = Path(tempfile.mkdtemp()), time.monotonic()
    rows = []
    try:
        print("| fault | injected | detected or survived | harmless |\n|---|---|---|---|", flush=True)
        for row in faults(place, arguments):
            rows.append(row)
            found = (
                f"{row.injected} | {row.survived} | {row.harmless}"
                if not row.skipped
                else f"skipped: {row.skipped} | |"
            )
            print(f"| {row.fault} | {found} |{' FAILED' if row.failures else ''}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if arguments.out:
            arguments.out.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    failed = sum(len(row.failures) for row in rows)
    injected, survived, harmless = (
        sum(getattr(row, name) for row in rows) for name in ("injected", "survived", "harmless")
    )
    print(
        f"| **all** | {injected} | {survived} | {harmless} |\n\n{failed} failed; seed {arguments.seed}, "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
