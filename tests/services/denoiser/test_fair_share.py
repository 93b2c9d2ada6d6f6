"""Laws of fair shares: who has had least is next, weights count, and neither a pause nor an exit earns anything."""

from __future__ import annotations

import pytest

from services.denoiser.fair_share import FairShare


def joined(*tenants: str, **weights: float) -> FairShare:
    shares = FairShare(weights)
    for tenant in tenants:
        shares.join(tenant)
    return shares


def test_seconds_count_by_weight() -> None:
    shares = joined("a", "b", a=2.0)
    shares.charge("a", 4.0)
    shares.charge("b", 2.0)
    assert shares.virtual_times() == {"a": 2.0, "b": 2.0}


def test_the_lead_is_told_in_the_tenants_own_seconds() -> None:
    shares = joined("a", "b", a=2.0)
    shares.charge("a", 4.0)
    assert (shares.lead_seconds("a"), shares.lead_seconds("b")) == (4.0, 0.0)


def test_a_newcomer_starts_level_with_the_one_that_has_had_least() -> None:
    shares = joined("a", "b")
    shares.charge("a", 5.0)
    shares.charge("b", 3.0)
    shares.join("c")
    assert shares.virtual_times()["c"] == 3.0


def test_a_pause_earns_nothing() -> None:
    shares = joined("a", "b")
    shares.leave("a")
    shares.charge("b", 10.0)
    shares.join("a")
    assert shares.lead_seconds("b") == 0.0


def test_leaving_does_not_wipe_out_a_lead() -> None:
    shares = joined("a", "b")
    shares.charge("a", 10.0)
    shares.leave("a")
    shares.join("a")
    assert shares.lead_seconds("a") == 10.0


def test_a_tenant_stays_while_it_has_another_request() -> None:
    shares = joined("a", "a", "b")
    shares.leave("a")
    assert set(shares.virtual_times()) == {"a", "b"}


def test_one_that_has_left_is_charged_for_its_last_pass() -> None:
    shares = joined("a", "b")
    shares.charge("a", 1.0)
    shares.leave("a")
    shares.charge("a", 1.0)
    shares.join("a")
    assert shares.lead_seconds("a") == pytest.approx(2.0)


def test_nothing_is_kept_of_tenants_that_nobody_is_behind() -> None:
    shares = joined("watcher")
    for number in range(100):
        shares.join(f"tenant {number}")
        shares.charge(f"tenant {number}", 1.0)
        shares.charge("watcher", 2.0)
        shares.leave(f"tenant {number}")
    shares.leave("watcher")
    shares.join("late")
    assert shares.lead_seconds("late") == 0.0
    assert len(vars(shares)["_virtual"]) == 1
