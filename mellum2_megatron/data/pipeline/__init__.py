"""Corpus plans: from sources and phases to the packs that each phase trains on."""
