"""Experiments that the defaults rest on: rows of a table, each a config, its overrides and a seed."""
