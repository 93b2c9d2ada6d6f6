"""Laws of metrics: names say the project, and labels take few values."""

from __future__ import annotations

import pytest
from prometheus_client import Metric

from services.common.metrics import Metrics

METRICS = {metric.name: metric for metric in Metrics().registry.collect()}
BOUNDED_LABELS = {"method", "code", "stage", "model", "path", "cache", "healthy", "outcome", "reason", "state"}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_named_after_the_project_and_documented(metric: Metric) -> None:
    assert metric.name.startswith("safelight_")
    assert metric.documentation.endswith(".")


def test_labels_are_of_the_few_that_take_few_values() -> None:
    metrics = Metrics()
    labels = {label for each in vars(metrics).values() for label in getattr(each, "_labelnames", ())}
    assert labels <= BOUNDED_LABELS


def test_each_server_counts_for_itself() -> None:
    one, two = Metrics(), Metrics()
    one.file_bytes.inc(7)
    assert two.registry.get_sample_value("safelight_file_bytes_total") == 0


def test_closing_without_serving_is_no_error() -> None:
    Metrics().close()
