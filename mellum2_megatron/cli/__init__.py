"""`mellum2`: a file per command, and the only package here that imports conversion and launchers.

`mellum2 recipes` loads every file of this package. The files therefore import a command's library
inside the function that runs it: torch alone takes seconds.
"""


def main() -> None:
    """Run the command line (entry point of the `mellum2` script)."""
    from mellum2_megatron.cli.app import main as run

    run()
