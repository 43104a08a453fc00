"""The needs of a run, and the reasons why it cannot work, before anything starts. No torch.

Import from the modules: several have the name of their main function (`stage_chain`, the three
reports), which a face would hide.
"""
