"""The command line of apex_opt in a checkout; `apex_opt.cli` is all there is to it."""

from apex_opt.process import end_on_signals

if __name__ == "__main__":
    end_on_signals()  # before all else, so that an interruption while the rest is loaded ends in a line too

from apex_opt.cli import main

if __name__ == "__main__":
    main()
