"""Everything we print: one document, as JSON for programs or as tables for people."""
