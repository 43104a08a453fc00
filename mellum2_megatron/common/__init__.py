"""Shared by all packages: errors, field checks, typed values, atomic files, console, provenance."""
