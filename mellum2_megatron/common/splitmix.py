"""The scattering step of the generator SplitMix64 (Steele, Lea and Flood 2014), a bijection."""

from __future__ import annotations

from typing import Any

type Integers = Any
"""An int below 2**64, or an array of `uint64`: the same arithmetic serves both."""

MASK = 2**64 - 1


def mix(value: Integers) -> Integers:
    """Return a number's 64 bits scattered, or those of each number of an array."""
    value = value ^ (value >> 30)
    # In place from here on: large arrays are bound by memory, not by arithmetic.
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        value *= factor
        if isinstance(value, int):  # the words of an array are cut to 64 bits by themselves
            value &= MASK
        value ^= value >> shift
    return value
