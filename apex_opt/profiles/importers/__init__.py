"""Importers of profile tables that other simulators have measured."""

from apex_opt.profiles.importers.command import KINDS, import_profile

__all__ = ["KINDS", "import_profile"]
