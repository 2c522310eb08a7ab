"""`python -m apex_opt` is the same program as `solve.py`, wherever one stands."""

from apex_opt.process import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    from apex_opt.cli import main

    main()
