"""The `kernelforge` command, also as `python -m kernelforge`."""

import sys


def main() -> None:
    """Run the command. Ctrl-C while its code is imported ends it as Ctrl-C later does."""
    try:
        from kernelforge.cli.app import console_script

        console_script()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
