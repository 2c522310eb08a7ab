"""`python -m apex_opt` is the same program as `solve.py`, which lies beside the package, installed or not."""

import sys

from apex_opt.units import DATA_ROOT

if __name__ == "__main__":
    # The folder that one stands in comes first on the path, and may hold another solve.py.
    sys.path.insert(0, str(DATA_ROOT))
    from solve import main

    main()
