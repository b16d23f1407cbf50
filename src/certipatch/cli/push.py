"""``certipatch push``: a training run with its certificates to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..runtime.console import stdout

if TYPE_CHECKING:
    from ..deploy.card import Certified


def push(
    run: Annotated[Path, typer.Argument(help="folder that train wrote")],
    certified: Annotated[list[Path], typer.Argument(help="folders that certify or detect wrote of it")],
    to: Annotated[str, typer.Option(help="user/name on the hub")],
    license: Annotated[str, typer.Option(help="the hub's id of a license, such as apache-2.0")] = "other",
    deployed: Annotated[Path | None, typer.Option(help="folder that export wrote, to push with it")] = None,
    names: Annotated[
        bool, typer.Option("--names/--no-names", help="withhold names, commands and places of images")
    ] = True,
    private: Annotated[bool, typer.Option("--private", help="for your own eyes first")] = False,
    dry_run_to: Annotated[
        Path | None, typer.Option("--dry-run", help="write the folder here and upload nothing")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before it is public")] = False,
) -> None:
    """Push a run and its certificates to the hub, with a card; what will be public is shown first."""
    from ..deploy import push as work

    work.check_name(to)
    opened = work.check_same(run, certified)
    with tempfile.TemporaryDirectory() as temporary:
        out = dry_run_to or Path(temporary) / "folder"
        work.write_folder(run, certified, deployed, out, opened=opened, names=names)
        text = _card(to, out, license, opened.spec.arch)
        (out / "README.md").write_text(text, encoding="utf-8")
        _show(out, [run, *certified], names=names)
        if dry_run_to is not None:
            _say(f"nothing was uploaded; the folder is {out}, its card {out / 'README.md'}")
            return
        public = "private to you" if private else "public"
        if not yes and not typer.confirm(f"Upload this to {to}, where it is {public}?"):
            raise ConfigError(f"to {to}: nothing was uploaded; --dry-run DIR writes the folder to look at")
        _say(f"uploaded; pin it as {work.upload(out, to, private=private)}")


def _say(text: str) -> None:
    stdout.print(text, markup=False, soft_wrap=True)


def _card(name: str, out: Path, license: str, arch: str) -> str:
    """The card, from what will be public and from nothing else."""
    from ..deploy.card import card
    from ..records.read import read_folder

    folders = sorted((out / "certificates").iterdir())
    found = [_certified(folder) for folder in folders]
    manifest = read_folder(folders[0]).manifest
    data, size = Path(manifest.data).name, manifest.certification.against.image_size
    return card(name, arch, found, data=data, license=license, size=size)


def _certified(folder: Path) -> Certified:
    from ..deploy.card import Certified
    from ..records.read import read_folder
    from ..report.certification import summarize

    read = read_folder(folder)
    if read.manifest.kind != "certify":
        raise ConfigError(f"{folder.name}: expected records of certify, found those of {read.manifest.kind}")
    summary, environment = summarize(read), read.manifest.environment
    margins = [record.margin for record in read.records if record.counts(summary.min_margin)]
    return Certified(
        name=folder.name,
        summary=summary.to_json(),
        device=f"{environment.get('device', '?')} ({environment.get('machine', '?')})",
        precision=read.manifest.certification.precision,
        versions={name: str(version) for name, version in environment.get("versions", {}).items()},
        smallest=min((margin for margin in margins if margin is not None), default=None),
        records=[digest[:12] for digest in read.manifest.line_hashes],
    )


def _show(out: Path, folders: Sequence[Path], *, names: bool) -> None:
    """Say what of the writer will be public."""
    from ..records.share import told

    _say("This will be public:")
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        _say(f"  {path.relative_to(out)} ({path.stat().st_size:,} bytes)")
    if not names:
        _say("Withheld: names of images, command lines, the place of the data. Class names are public.")
        return
    for one in map(told, folders):
        for command in one.commands:
            _say(f"  command of {one.folder.name}: {command}")
        if one.place:
            _say(f"  place of the data of {one.folder.name}: {one.place}")
        if one.names:
            _say(f"  names of {len(one.names)} images in {one.folder.name}: {', '.join(one.names[:3])} ...")
    _say("--no-names withholds names of images, command lines and places.")
