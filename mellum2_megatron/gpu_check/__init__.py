"""The check of a GPU machine: does the te backend work there, is it exact, and how fast is it?

It is cut into pieces of at most ten minutes. `running.run_pieces` runs those that have not passed
yet, each in processes of its own, and `page` writes one page of all results.
"""
