"""Migrations of the store, shipped with the package and run by `stagewright db upgrade`."""
