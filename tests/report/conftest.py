"""The planted run as fixtures, made once a session."""

from __future__ import annotations

import pytest

from spectra.report import ReportData, build_report
from tests.report.planted import PlantedRun, planted_run


@pytest.fixture(scope="session")
def run() -> PlantedRun:
    return planted_run()


@pytest.fixture(scope="session")
def data(run: PlantedRun) -> ReportData:
    return build_report(run)


@pytest.fixture(scope="session")
def hostile() -> ReportData:
    return build_report(planted_run(hostile=True))
