"""Answers of a study: statistics of its runs, verdicts, the report and the log. No torch."""
