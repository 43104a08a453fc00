"""Conversion jobs: a description of the work, carried out unit by unit, resumed when killed."""
