"""Faults of a run that trains: non-finite values, loss spikes, hangs, stop signals, crashes."""
