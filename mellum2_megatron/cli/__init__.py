"""`mellum2`: one file a command, and the only package here that may import conversion and
launchers."""


def main() -> None:
    """Run the command line (entry point of the `mellum2` script)."""
    from mellum2_megatron.cli.app import main as run

    run()
