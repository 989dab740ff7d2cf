"""Conformance: what a plugin must do to be right, as generated cases.

`kernelforge conformance run NAME` and `pytest --kernelforge-plugin NAME` run the same ones; see docs/conformance.md.

- `case`: what a case is, and how it ends
- `kernel_cases`, `edges`, `property`, `stress`: cases of kernel variants, made from the `families` of an op's problems
- `kernels`: one kernel on poisoned, guarded memory (`memory`) against the float64 oracle
- `dialect_cases`, `pass_cases`, `tuner_cases`, `backend_cases`, `descriptor_cases`: of everything else
- `collect`, `expectations`, `runner`, `worker`, `report`: all cases of a plugin, run in processes of their own
"""
