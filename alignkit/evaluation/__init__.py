"""Is it better? A model against another one: on held-out pairs, on answers, and before people."""

from __future__ import annotations

from alignkit.evaluation.call import evaluate
from alignkit.evaluation.page import Evaluation
from alignkit.evaluation.sheet import fill_sheet
from alignkit.evaluation.sheet_results import SheetResult, read_sheets

__all__ = ["Evaluation", "SheetResult", "evaluate", "fill_sheet", "read_sheets"]
