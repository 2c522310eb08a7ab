"""Speed of apex_opt: `python -m benchmarks` prints one line per figure."""
