"""Choice of documents: sources, duplicates, sample size and split."""
