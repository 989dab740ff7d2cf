"""`pytest --kernelforge-plugin NAME`: the conformance cases of a plugin as test items.

Nothing of kernelforge but this module is imported until the option is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kernelforge.testing.bench import Bench
    from kernelforge.testing.case import Case, Outcome
    from kernelforge.testing.expectations import Expectations
    from kernelforge.testing.worker import Worker


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernelforge", "conformance of KernelForge plugins")
    group.addoption("--kernelforge-plugin", metavar="NAME", help="also run the conformance cases of this plugin")
    group.addoption("--kernelforge-level", metavar="N", type=int, help="cases up to this level (default: all)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the cases, so that -k and the like choose among them."""
    name = config.getoption("--kernelforge-plugin")
    if not name:
        return
    from kernelforge.errors import KernelForgeError

    try:
        suite = Suite.from_parent(session, name=f"kernelforge:{name}", plugin=name)
        items += suite.collect()
    except KernelForgeError as error:
        raise pytest.UsageError(f"{error}" + (f" ({error.hint})" if error.hint else "")) from None
    if not any(isinstance(item, CaseItem) and not item.case.not_claimed for item in items):
        raise pytest.UsageError(f"nothing of the plugin '{name}' can be tested")


class Suite(pytest.Collector):
    """The cases of a plugin, and the process that runs them."""

    def __init__(self, *, plugin: str, **more: Any) -> None:
        super().__init__(**more)
        from kernelforge.registry import default_registry
        from kernelforge.testing.bench import Bench
        from kernelforge.testing.case import DEFAULT_LEVEL, LEVELS
        from kernelforge.testing.collect import Scope, expectations
        from kernelforge.testing.runner import TIMEOUT_S
        from kernelforge.testing.worker import Setup, Worker

        level = self.config.getoption("--kernelforge-level")
        level = DEFAULT_LEVEL if level is None else level
        if level not in LEVELS:
            raise pytest.UsageError(f"--kernelforge-level takes {min(LEVELS)} to {max(LEVELS)}, not {level}")
        self.scope = Scope(plugin, level)
        self.bench: Bench = Bench(default_registry())
        self.announced: Expectations = expectations(plugin)
        self.timeout_s = TIMEOUT_S
        self.worker: Worker = Worker(Setup(self.scope))

    def collect(self) -> list[pytest.Item]:
        from kernelforge.testing.collect import collect

        with self.bench:
            cases = collect(self.bench, self.scope)
        return [CaseItem.from_parent(self, name=case.id, case=case) for case in cases]

    def run(self, case: Case) -> Outcome:
        return self.announced.judge(self.worker.run(case.id, self.timeout_s))

    def teardown(self) -> None:
        self.worker.close()


class CaseItem(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, **more: Any) -> None:
        super().__init__(**more)
        self.case = case

    def runtest(self) -> None:
        from kernelforge.testing.case import reproduce

        assert isinstance(self.parent, Suite)
        if self.case.not_claimed:
            pytest.skip(f"not claimed: {self.case.not_claimed}")
        outcome = self.parent.run(self.case)
        if outcome.status == "not-claimed":
            pytest.skip(f"not claimed: {outcome.message}")
        if outcome.status == "expected-failure":
            pytest.xfail(f"{outcome.kind}: {outcome.message}")
        if outcome.status == "failed":
            command = reproduce(self.parent.scope.plugin, self.case.id)
            pytest.fail(f"{outcome.kind}: {outcome.message}\n{command}", pytrace=False)

    def reportinfo(self) -> tuple[str, None, str]:
        return f"kernelforge/{self.case.subject}", None, self.case.id


def pytest_report_header(config: pytest.Config) -> list[str]:
    name = config.getoption("--kernelforge-plugin")
    return [f"kernelforge: conformance of {name}"] if name else []
