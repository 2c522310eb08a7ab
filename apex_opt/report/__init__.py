"""Everything we print: one document, as JSON for programs or as tables for people."""

from apex_opt.report.document import (
    answer_document,
    beside,
    checked,
    cluster_row,
    listing_document,
    model_row,
    trace_row,
)
from apex_opt.report.progress import Progress
from apex_opt.report.show import show
from apex_opt.report.validation import validation_document

__all__ = [
    "Progress",
    "answer_document",
    "beside",
    "checked",
    "cluster_row",
    "listing_document",
    "model_row",
    "show",
    "trace_row",
    "validation_document",
]
