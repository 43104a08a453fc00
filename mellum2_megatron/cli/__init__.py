"""`mellum2`: a file per command, and the only package here that imports conversion and launchers.

Every `mellum2` command loads every file of this package. A file therefore imports the library of
its command inside the function that runs it: torch alone takes seconds.
"""


def main() -> None:
    """Run the command line (entry point of the `mellum2` script)."""
    from mellum2_megatron.cli.app import main as run

    run()
