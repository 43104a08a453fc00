"""Needs of a run, and reasons why it cannot work, found before anything starts. No torch.

Import from the modules. Several have the name of their main function (`stage_chain`, the three
reports), which a re-export here would hide.
"""
