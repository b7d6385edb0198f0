"""`python -m sluicegate`: the command line."""

from sluicegate.entry import main

main()
