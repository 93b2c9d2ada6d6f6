"""Fair shares of step-seconds: weighted fair queueing of tenants by virtual time. Pure."""

from __future__ import annotations

from collections.abc import Mapping


class FairShare:
    """How much of the device each tenant has had, as virtual time: seconds divided by the tenant's weight.

    The tenant with the least virtual time is the next to be served. A tenant that comes back after a pause starts no
    lower than those that are there, so a pause earns nothing; nor does leaving wipe out what it had ahead of them.

    Args:
        weights: shares of tenants under load; others weigh 1.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._requests: dict[str, int] = {}
        self._virtual: dict[str, float] = {}

    def join(self, tenant: str) -> None:
        """The tenant has one request more."""
        if tenant not in self._requests:
            self._virtual[tenant] = max(self._virtual.get(tenant, 0.0), self._least())
        self._requests[tenant] = self._requests.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """The tenant has one request less."""
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]
            self._forget_the_absent()

    def charge(self, tenant: str, seconds: float) -> None:
        """The tenant has used the device for so many seconds; one that has left meanwhile is charged as well."""
        if tenant in self._virtual:
            self._virtual[tenant] += self.cost(tenant, seconds)

    def cost(self, tenant: str, seconds: float) -> float:
        """Virtual time of so many seconds."""
        return seconds / self._weights.get(tenant, 1.0)

    def virtual_times(self) -> dict[str, float]:
        """Of the tenants that have requests."""
        return {tenant: self._virtual[tenant] for tenant in self._requests}

    def lead_seconds(self, tenant: str) -> float:
        """Seconds by which the tenant is ahead of the one that has had least."""
        return (self._virtual[tenant] - self._least()) * self._weights.get(tenant, 1.0)

    def _least(self) -> float:
        return min((self._virtual[tenant] for tenant in self._requests), default=0.0)

    def _forget_the_absent(self) -> None:
        """Whoever is not ahead of those present has nothing that needs remembering; nor has anybody when all left."""
        least = self._least() if self._requests else float("inf")
        self._virtual = {
            tenant: time for tenant, time in self._virtual.items() if tenant in self._requests or time > least
        }
