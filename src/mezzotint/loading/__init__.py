"""Load a checkpoint into a model: plan first, then read, then report what was done."""

from mezzotint.loading.load import load, replace_linears
from mezzotint.loading.placement import Placement
from mezzotint.loading.plan import LoadPlan, plan
from mezzotint.loading.report import LoadReport, report

__all__ = ["LoadPlan", "LoadReport", "Placement", "load", "plan", "replace_linears", "report"]
