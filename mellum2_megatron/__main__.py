"""`python -m mellum2_megatron`: the command line."""

from mellum2_megatron.cli import main

if __name__ == "__main__":
    main()
