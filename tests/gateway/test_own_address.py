"""Denoisers are told an address that they can reach, also when the gateway listens on all of them."""

from __future__ import annotations

import pytest

from gateway.own_address import own_address


@pytest.mark.parametrize("address", ["10.0.0.5:7000", "unix:/run/gateway.sock", "gateway.example:7000", "[::1]:7000"])
async def test_an_address_that_names_a_machine_is_taken_as_it_is(address: str) -> None:
    assert await own_address(address, ["10.0.0.6:7002"]) == address


@pytest.mark.parametrize("denoiser", ["127.0.0.1:7002", "dns:///localhost:7002"])
async def test_in_the_place_of_a_wildcard_stands_the_address_on_the_way_to_a_denoiser(denoiser: str) -> None:
    own = await own_address("0.0.0.0:7000", [denoiser])
    assert own in ("127.0.0.1:7000", "[::1]:7000")


@pytest.mark.parametrize("denoiser", ["unix:/run/denoiser.sock", "dns:///nowhere.invalid:7002"])
async def test_without_a_way_it_is_this_machine(denoiser: str) -> None:
    assert await own_address("[::]:7000", [denoiser]) == "127.0.0.1:7000"
