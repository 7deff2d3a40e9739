"""The exact joint search: space, bounds, programmes, certificate."""
