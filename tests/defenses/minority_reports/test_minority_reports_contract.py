"""Minority Reports passes the suite of every certified defense: a wrong answer comes with an alarm."""

from __future__ import annotations

from certipatch import MinorityReports
from defenses.contract import DefenseContract, with_a_mask_less


class TestMinorityReports(DefenseContract):
    method = "minority-reports"

    def build(self, model, masks, fill):
        return MinorityReports(model, masks, threshold=0.4, fill=fill)

    def keeps(self, verdict, label):
        return verdict.alarm or verdict.defended_label == label

    def twins(self, world, fill):
        return with_a_mask_less(self.build, world, fill)
