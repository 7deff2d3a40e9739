"""Named planners of the literature on the common problem."""
