"""`python -m kernelforge`: the same as the `kernelforge` command."""

from kernelforge.cli.app import console_script

console_script()
