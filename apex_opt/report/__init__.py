"""Everything we print: one document, as JSON for programs or as tables for people."""

from apex_opt.report.document import answer_document, listing_document
from apex_opt.report.progress import Progress
from apex_opt.report.tables import print_answer, print_listing

__all__ = ["Progress", "answer_document", "listing_document", "print_answer", "print_listing"]
