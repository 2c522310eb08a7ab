"""Importers of profile tables that other simulators have measured."""

from apex_opt.profiles.importers.command import KINDS, Imported, import_profile

__all__ = ["KINDS", "Imported", "import_profile"]
