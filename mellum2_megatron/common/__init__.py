"""For every package: errors, checks of fields, typed values, atomic files, console, provenance."""
