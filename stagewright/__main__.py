"""`python -m stagewright` is the command line."""

from stagewright.cli.main import main

main()
