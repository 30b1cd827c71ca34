"""What is not a lesson: parity, faults, the command line, the site. Run everything with `python -m tests`."""
