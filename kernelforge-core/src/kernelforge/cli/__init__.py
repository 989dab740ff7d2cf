"""The `kernelforge` command: `app` finds and runs verbs, `output` is what a verb talks to."""
