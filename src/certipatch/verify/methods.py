"""The defenses that ``verify`` has a restatement of, by the command that wrote the folder and by name.

A further defense is one more file like ``patchcleanser`` and one more row here. Of a defense without a row,
``verify`` checks whatever does not depend on the method; its images cannot be looked at again.
"""

from __future__ import annotations

from .findings import Experiment
from .minority_reports import MINORITY_REPORTS
from .patchcleanser import PATCHCLEANSER
from .record import check_answer
from .restatement import ENTRIES, FIELDS, Restatement
from .windows import BY_WINDOWS

RESTATEMENTS = {
    ("certify", "patchcleanser"): PATCHCLEANSER,
    ("detect", "minority-reports"): MINORITY_REPORTS,
    **{("certify", one.defense): one for one in BY_WINDOWS},
}

# The commands whose folders can be verified.
KINDS = ("certify", "detect", "attack")

# Folders whose experiment does not name its defense are of these.
UNNAMED = {"certify": PATCHCLEANSER, "detect": MINORITY_REPORTS}


def restatement_of(kind: str, experiment: Experiment) -> Restatement:
    """What ``verify`` knows of the defense of an experiment.

    ``certify`` may name any defense; what ``detect`` names must be in the table.
    """
    name = experiment.get("defense")
    if not isinstance(name, str):
        return UNNAMED[kind]
    unknown = _not_restated(name) if kind == "certify" else UNNAMED[kind]
    return RESTATEMENTS.get((kind, name), unknown)


def _not_restated(name: str) -> Restatement:
    """What holds for every defense of ``certify``, which may have entries and fields of its own besides."""
    return Restatement(
        defense=name,
        entries=ENTRIES | {"defense"},
        optional=frozenset(),
        fields=FIELDS,
        further=True,
        check_line=check_answer,
        compare=None,
    )
