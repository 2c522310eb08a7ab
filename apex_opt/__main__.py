"""`python -m apex_opt` is the same program as `solve.py`, which lies beside the package, installed or not."""

from apex_opt.process import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    import sys

    from apex_opt.units import DATA_ROOT

    # The folder that one stands in comes first on the path, and may hold another solve.py.
    sys.path.insert(0, str(DATA_ROOT))
    from solve import main

    main()
