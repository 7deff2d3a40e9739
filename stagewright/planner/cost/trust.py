"""How far a prediction can be trusted: the relative error to expect of a step time, by where its numbers come from.

The figures are errors that were seen, not guessed: on an analytic profile and a device whose efficiencies were fitted, the
mean error on published runs the fit did not see (benchmarks/published.py, cross-validated by `stagewright cost fit`); on
a device nobody fitted, three times as much until someone measures it. Measured profiles carry what `run` sees.
"""

from __future__ import annotations

from collections.abc import Mapping

from stagewright.planner.documents.cluster import Device
from stagewright.planner.documents.profile import Source

MEASURED_ERROR = 0.05
FITTED_ERROR = 0.07
UNFITTED_FACTOR = 3.0
MOCKED_ERROR = 0.5

_BY_SOURCE: Mapping[Source, float] = {
    Source.MEASURED: MEASURED_ERROR,
    Source.FITTED: FITTED_ERROR,
    Source.ANALYTIC: FITTED_ERROR,
    Source.MOCKED: MOCKED_ERROR,
}


def expected_error(source: Source, device: Device) -> float:
    """Return the relative error to expect of a step time whose worst number is of `source`, on `device`."""
    error = _BY_SOURCE[source]
    is_fitted = device.source in (Source.MEASURED, Source.FITTED)
    return error if source is not Source.ANALYTIC or is_fitted else error * UNFITTED_FACTOR
