"""Where parts of a search run: in this process, in several, or on a Ray cluster."""
