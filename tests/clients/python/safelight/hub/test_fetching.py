"""Laws of `fetch_model`, with the hubs' real libraries against hubs on the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safelight import DownloadError, InvalidRequestError, fetch_model
from tests.clients.processes import ROOT
from tests.clients.python.safelight.hub.conftest import FILES, MODEL, WEIGHTS
from tests.support.model_hubs import ModelHub


def fetched(source: str, path: str | list[str] | None = None, **arguments: object) -> str | list[str]:
    """What `fetch_model` returns for the model of these tests, relative to the folder of its revision."""
    found = fetch_model(MODEL, path=path, source=source, **arguments)  # type: ignore[arg-type]  # passed on as given
    folder = f"{os.environ['SAFELIGHT_CACHE']}/{source}/{MODEL}/{arguments.get('revision') or '__version'}"
    return found.removeprefix(folder) if isinstance(found, str) else [each.removeprefix(folder) for each in found]


@pytest.mark.parametrize(
    ("path", "expected", "transfers"),
    [
        ("a.safetensors", "/a.safetensors", 1),
        ("vae/config.json", "/vae/config.json", 1),
        ("*.safetensors", ["/a.safetensors", "/b.safetensors"], 2),
        ("a.*", "/a.safetensors", 1),
        ("**/*.safetensors", ["/a.safetensors", "/b.safetensors", "/vae/model.safetensors"], 3),
        ("vae/*", ["/vae/config.json", "/vae/model.safetensors"], 2),
        ("vae", "/vae", 2),
        (["b.safetensors", "a.safetensors"], ["/b.safetensors", "/a.safetensors"], 2),
        (["a.safetensors"], ["/a.safetensors"], 1),
        (None, ["/a.safetensors", "/b.safetensors"], 5),
    ],
)
def test_one_file_is_a_path_and_several_are_a_list(
    hub: ModelHub, source: str, path: str | list[str] | None, expected: str | list[str], transfers: int
) -> None:
    assert fetched(source, path) == expected
    assert len(hub.asked) == transfers


def test_the_bytes_are_the_hubs_and_come_once(hub: ModelHub, source: str, cache: Path) -> None:
    for _ in range(2):
        assert fetched(source, "b.safetensors") == "/b.safetensors"
    assert (cache / source / MODEL / "__version" / "b.safetensors").read_bytes() == WEIGHTS
    assert [asked.path for asked in hub.asked] == ["b.safetensors"]


def test_without_safetensors_asked_for_the_folder_is_returned(hub: ModelHub, source: str, cache: Path) -> None:
    assert fetched(source, fetch_safetensors=False) == ""
    folder = cache / source / MODEL / "__version"
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_a_revision_has_a_folder_of_its_own(hub: ModelHub, source: str, cache: Path) -> None:
    assert fetched(source, "a.safetensors") == "/a.safetensors"
    assert fetched(source, "a.safetensors", revision="v1") == "/a.safetensors"
    assert (cache / source / MODEL / "v1" / "a.safetensors").read_bytes() == b"older"


def test_a_branch_that_moved_is_fetched_again_though_the_size_is_the_same(
    hub: ModelHub, source: str, cache: Path
) -> None:
    fetched(source, "a.safetensors")
    moved = {**FILES, "a.safetensors": b"SMALL WEIGHTS"}
    hub.repositories[MODEL] = {"master": moved, "main": moved}
    fetched(source, "a.safetensors")
    assert (cache / source / MODEL / "__version" / "a.safetensors").read_bytes() == b"SMALL WEIGHTS"


def test_the_token_is_sent(hub: ModelHub, source: str) -> None:
    hub.faults.token = "secret"
    assert fetched(source, "a.safetensors", access_token="secret") == "/a.safetensors"
    assert "secret" in hub.tokens


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"source": "civitai"}, "source"),
        ({"model_uri": "../etc"}, "model_uri"),
        ({"model_uri": "a/b/c"}, "model_uri"),
        ({"revision": "../.."}, "revision"),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_is_asked(arguments: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: is ") as caught:
        fetch_model(**{"model_uri": MODEL, **arguments})  # type: ignore[arg-type]  # texts all
    assert isinstance(caught.value, ValueError)


def test_what_matches_nothing_is_an_error_that_names_what_there_is(hub: ModelHub, source: str, cache: Path) -> None:
    for path in ("c.safetensors", "*.gguf", ["a.safetensors", "c"]):
        with pytest.raises(DownloadError, match=r"matches nothing there; it holds README\.md, a\.safetensors, b\."):
            fetched(source, path)
    assert not hub.asked


def test_of_many_files_the_error_names_a_few(hub: ModelHub, source: str) -> None:
    many = {f"{index:02}.txt": b"" for index in range(20)}
    hub.repositories[MODEL] = {"master": many, "main": many}
    with pytest.raises(DownloadError, match=r"it holds 00\.txt, .* 11\.txt and 8 more$"):
        fetched(source, "c")


def test_a_model_or_revision_that_is_not_there_is_named(hub: ModelHub, source: str, cache: Path) -> None:
    with pytest.raises(DownloadError, match=f"^acme/none at {source}: not found .HTTP 404.: check the name"):
        fetch_model("acme/none", source=source)
    with pytest.raises(DownloadError, match=rf"^acme/tiny \(revision v9\) at {source}: not found"):
        fetch_model(MODEL, revision="v9", source=source)
    assert not cache.exists()


def test_a_refusal_says_what_to_give(hub: ModelHub, source: str, cache: Path) -> None:
    hub.faults.token = "secret"
    with pytest.raises(DownloadError, match=f"^acme/tiny at {source}: refused .HTTP 403.: give an access token"):
        fetched(source, "a.safetensors", access_token="wrong")
    assert not cache.exists()


@pytest.mark.usefixtures("impatient")
def test_a_wrong_digest_leaves_nothing_of_the_file(hub: ModelHub, source: str, cache: Path) -> None:
    hub.faults.corrupt.add("b.safetensors")
    with pytest.raises(DownloadError, match=r"b\.safetensors arrived damaged, its digest is not the hub's"):
        fetched(source, "b.safetensors")
    assert not [path for path in cache.rglob("b.safetensors*") if path.is_file() and path.suffix != ".lock"]


def test_a_broken_transfer_goes_on_where_it_broke(hub: ModelHub, source: str, cache: Path) -> None:
    hub.faults.cut_at, hub.faults.cuts = 22 * 2**20, 1
    assert fetched(source, "b.safetensors") == "/b.safetensors"
    assert [asked.start > 0 for asked in hub.asked] == [False, True]
    assert (cache / source / MODEL / "__version" / "b.safetensors").read_bytes() == WEIGHTS


@pytest.mark.usefixtures("impatient")
def test_half_a_file_never_has_its_name_and_the_next_call_goes_on(hub: ModelHub, source: str, cache: Path) -> None:
    hub.faults.cut_at, hub.faults.cuts = 22 * 2**20, 100
    with pytest.raises(DownloadError, match=r"b\.safetensors did not arrive whole: try again, it goes on"):
        fetched(source, "b.safetensors")
    assert not (cache / source / MODEL / "__version" / "b.safetensors").exists()
    hub.faults.cuts = 0
    hub.asked.clear()
    assert fetched(source, "b.safetensors") == "/b.safetensors"
    assert [asked.start > 10 * 2**20 for asked in hub.asked] == [True]
    assert (cache / source / MODEL / "__version" / "b.safetensors").read_bytes() == WEIGHTS


def test_without_the_library_the_error_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['modelscope_hub'] = sys.modules['huggingface_hub'] = None\n"
        "from safelight import DownloadError, fetch_model\n"
        "for source in ('modelscope', 'huggingface'):\n"
        "    try: fetch_model('a/b', source=source)\n"
        "    except DownloadError as error: print(error)\n"
    )
    environment = {"PYTHONPATH": str(ROOT / "clients" / "python")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "source 'modelscope' needs the package modelscope-hub: pip install 'safelight[hub]'",
        "source 'huggingface' needs the package huggingface-hub: pip install 'safelight[hub]'",
    ]
