"""The process behind `kernelforge plugins check NAME`: import one plugin, end stdout with its status."""

from __future__ import annotations

import json
import sys

from kernelforge.cli.plugins_verbs import as_data
from kernelforge.plugins import probe

if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(as_data(probe(sys.argv[1]))))
