"""A training run with its certificates as a folder for the hub: run, timm model and certificate at once.

The root is the run as ``train`` wrote it, so that everything here reads it; beside it is timm's config.json,
so that ``timm.create_model("hf-hub:user/name", pretrained=True)`` loads the bare network; certificates lie in
folders of their own, and the card is generated from their records.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

from ..config import ModelSpec
from ..errors import ConfigError, MachineError, RecordsError, brief
from ..models.runs import Opened, open_run
from ..models.small import SMALL_CNN
from ..records.manifest import read_manifest
from ..records.share import share
from .deployed import is_deployed

CERTIFICATES, EXPORTED, WEIGHTS = "certificates", "onnx", "model.safetensors"


def check_name(name: str) -> None:
    """Raises ConfigError for what is no name of a repository on the hub."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) or ".." in name or "--" in name:
        raise ConfigError(f"to {name!r}: expected user/name")


def check_same(run: Path, certified: Sequence[Path]) -> Opened:
    """The model of a run, of which every certification must be. Raises ConfigError or RecordsError."""
    opened = open_run(run)
    for folder in certified:
        manifest = read_manifest(folder)
        if manifest.kind not in ("certify", "detect"):
            raise ConfigError(f"{folder}: expected records of certify or detect, found {manifest.kind}")
        if manifest.certification.weights_sha256 != opened.weights_sha256:
            raise ConfigError(f"{folder}: is of another model than {run}; push it with its own run")
    names = [folder.name for folder in certified]
    if len(set(names)) < len(names):
        raise ConfigError(f"certified: expected folders of different names, found {', '.join(names)}")
    return opened


def write_folder(
    run: Path, certified: Sequence[Path], deployed: Path | None, out: Path, *, opened: Opened, names: bool
) -> None:
    """Everything but the card. Raises RecordsError for a folder that is not empty or not finished."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordsError(f"dry run {out}: expected an empty folder; choose another")
    share(run, out, names=names)
    shutil.copyfile(run / WEIGHTS, out / WEIGHTS)
    for folder in certified:
        share(folder, out / CERTIFICATES / folder.name, names=names)
    if deployed is not None:
        _add_export(deployed, out / EXPORTED, names=names)
    if opened.spec.arch != SMALL_CNN:
        _write_config(opened, out / "config.json")


def _add_export(deployed: Path, out: Path, *, names: bool) -> None:
    if not is_deployed(deployed):
        raise ConfigError(f"{deployed}: expected a folder that export wrote")
    if not names:
        raise ConfigError(f"{deployed}: an export states names of images; leave it out, or drop --no-names")
    shutil.copytree(deployed, out, ignore=shutil.ignore_patterns(".lock*"))


def _write_config(opened: Opened, path: Path) -> None:
    """timm's config.json, with our preprocessing and the names of the labels."""
    spec: ModelSpec = opened.spec
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    data = {"input_size": (3, *spec.image_size), **{key: getattr(spec, key) for key in keys}}
    timm.models._hub.save_config_for_hf(
        opened.network[1], str(path), model_config={"label_names": list(spec.classes)}, data_config=data
    )


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder in one commit; the address with which it is pinned.

    Raises MachineError where the hub cannot be reached or does not take it.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            folder_path=str(folder), repo_id=name, commit_message="Add the model and its certificates"
        )
    except Exception as error:  # no network, no right, no such user: in many words
        raise MachineError(
            f"to {name}: the hub did not take it ({brief(error)}); --dry-run DIR writes the folder, and "
            "huggingface-cli login gives the right to write"
        ) from error
    oid: Any = done.oid
    return f"hf-hub:{name}@{oid}"
