"""Measured and derived times and energies of single operations and collectives."""

from apex_opt.profiles.card import Card, read_card
from apex_opt.profiles.collectives import Collectives, load_collectives
from apex_opt.profiles.operations import SHIPPED, SILICON, Profile, check_profiles, load_profile
from apex_opt.profiles.power import PowerModel
from apex_opt.profiles.schema import SCHEMAS, Column, Schema
from apex_opt.profiles.tables import read_table

__all__ = [
    "SCHEMAS",
    "SHIPPED",
    "SILICON",
    "Card",
    "Collectives",
    "Column",
    "PowerModel",
    "Profile",
    "Schema",
    "check_profiles",
    "load_collectives",
    "load_profile",
    "read_card",
    "read_table",
]
