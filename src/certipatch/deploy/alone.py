"""The command line of ``runner.py``: classify image files with the deployed folder in which it lies."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..data.decode import UNREADABLE, decode, open_image, why_unreadable
from ..errors import CertiPatchError, one_line
from .deployed import Deployed


def main(words: list[str] | None = None) -> int:
    """Print one JSON line an image; the exit code is 2 for bad input and 3 for what the machine lacks."""
    parser = argparse.ArgumentParser(
        prog="runner.py", description="Classify images with the defended model: one JSON line an image."
    )
    parser.add_argument("images", nargs="*", type=Path, help="image files")
    parser.add_argument("--prove", action="store_true", help="also whether any single patch can change it")
    parser.add_argument("--places", action="store_true", help="with --prove: also at which places")
    parser.add_argument("--about", action="store_true", help="print what is known of the model")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if not asked.images and not asked.about:
        parser.error("expected image files, or --about")
    if asked.places and not asked.prove:
        parser.error("--places: expected --prove with it")
    try:
        deployed = Deployed.open(asked.folder)
        if asked.about:
            print(json.dumps(deployed.about()))
        failed = [_answer(deployed, path, asked) for path in asked.images]
    except CertiPatchError as error:
        print(f"runner.py: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    return 2 if any(failed) else 0


def _answer(deployed: Deployed, path: Path, asked: argparse.Namespace) -> bool:
    """Print the answer to one file; whether it could not be read."""
    try:
        pixels = deployed.preprocess(decode(open_image(path)))
    except UNREADABLE as error:
        print(json.dumps({"image": str(path), "error": why_unreadable(error)}))
        return True
    proven = asked.prove and deployed.prove([pixels], places=asked.places)
    (found,) = proven or deployed.answer([pixels])
    print(json.dumps({"image": str(path), **found}), flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
