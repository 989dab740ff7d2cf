"""The `kernelforge` command, also as `python -m kernelforge`."""

import sys


def main() -> None:
    """Run the command. Ctrl-C and SIGTERM while its code is imported end it as they do later."""
    try:
        from kernelforge.interruption import interrupt_on_sigterm

        interrupt_on_sigterm()
        from kernelforge.cli.app import console_script

        console_script()
    except KeyboardInterrupt:
        from kernelforge.interruption import ending

        sys.exit(ending()[1])


if __name__ == "__main__":
    main()
