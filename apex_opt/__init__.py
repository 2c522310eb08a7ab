"""apex_opt: provably best parallel execution plans for serving large language models."""

__version__ = "0.1.0"
