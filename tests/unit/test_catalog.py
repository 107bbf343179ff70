import subprocess
import sys

import pytest

from autobatch.errors import DeviceNotFoundError, InvalidArgumentError
from autobatch.units import GIB, MIB
from autobatch.virtual.catalog import cards, estimate_outside_bytes, find_card


def test_every_card_is_found_by_its_own_name():
    assert len(cards()) > 40
    for card in cards():
        assert find_card(card.name) is card


def test_every_figure_has_a_source_and_is_plausible():
    for card in cards():
        assert card.sources.keys() == {"total_bytes", "outside_bytes", "capability", "multiprocessors"}
        assert all(card.sources.values())
        assert 7 * GIB < card.total_bytes < 200 * GIB
        assert card.total_bytes % (64 * 1024) == 0
        assert 100 * MIB < card.outside_bytes < 1 * GIB
        assert 6 <= card.capability[0] <= 12


@pytest.mark.parametrize(
    "name",
    ["a100-40gb", "A100 40GB", "a10040gb", "A100-40GB", "nvidia a100_40gb", "NVIDIA A100-SXM4-40GB", " a100 40gb "],
)
def test_case_dashes_spaces_and_vendor_do_not_matter(name):
    assert find_card(name).name == "a100-40gb"


def test_series_is_dropped():
    assert find_card("Tesla T4").name == "t4"
    assert find_card("GeForce RTX 4090").name == "rtx-4090"


def test_figures_of_a_known_card():
    card = find_card("a100-40gb")
    assert card.title == "NVIDIA A100-SXM4-40GB"
    assert card.total_bytes == int(39.39 * GIB) // 65536 * 65536
    assert (card.capability, card.multiprocessors, card.outside_bytes) == ((8, 0), 108, 501 * MIB)


def test_lowest_figure_under_linux_is_taken():
    assert find_card("rtx-2080-ti").total_bytes == 10825 * MIB
    assert find_card("a10").total_bytes == 23609475072


def test_a_title_of_two_cards_names_neither():
    with pytest.raises(DeviceNotFoundError, match=r"rtx-3080-10gb.*rtx-3080-12gb|rtx-3080-12gb.*rtx-3080-10gb"):
        find_card("NVIDIA GeForce RTX 3080")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("a100", "a100-40gb"), ("a100-40g", "a100-40gb"), ("rtx-4900", "rtx-4090"), ("h100", "h100-pcie")],
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(DeviceNotFoundError) as caught:
        find_card(name)
    assert repr(name) in str(caught.value)
    assert nearest in str(caught.value)


def test_cards_without_a_known_linux_figure_are_not_there():
    for name in ("rtx-4080", "rtx-5070-ti", "a16", "b300"):
        with pytest.raises(DeviceNotFoundError):
            find_card(name)


def test_a_card_of_ones_own():
    card = find_card("memory=24GiB,capability=8.6")
    assert card.total_bytes == 24 * GIB
    assert card.capability == (8, 6)
    assert card.multiprocessors == find_card("rtx-3090").multiprocessors
    assert card.outside_bytes == estimate_outside_bytes(card.multiprocessors)
    full = find_card("memory=8GB, capability=9.0, sms=10, outside=1MiB, name=Mine")
    assert (full.total_bytes, full.multiprocessors, full.outside_bytes, full.name) == (8 * 10**9, 10, MIB, "Mine")
    assert find_card("memory=8GiB,capability=8.0,outside=0").outside_bytes == 0


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("", "gpu"),
        ("   ", "gpu"),
        (None, "gpu"),
        (24, "gpu"),
        ("memory=24GiB", "gpu"),
        ("capability=8.6", "gpu"),
        ("memory=24GiB,capability=8.6,cores=3", "gpu"),
        ("memory=24GiB,memory=8GiB,capability=8.6", "gpu"),
        ("memory=24GiB,capability=8.6,", "gpu"),
        ("memory=,capability=8.6", "gpu"),
        ("memory=much,capability=8.6", "memory"),
        ("memory=-1GiB,capability=8.6", "memory"),
        ("memory=0,capability=8.6", "memory"),
        ("memory=24GiB,capability=86", "capability"),
        ("memory=24GiB,capability=8.6,sms=0", "sms"),
        ("memory=24GiB,capability=8.6,sms=many", "sms"),
        ("memory=24GiB,capability=8.6,outside=x", "outside"),
        ("memory=1GiB,capability=8.6,outside=1GiB", "outside"),
        ("memory=24,capability=8.6", "memory"),
        ("memory=900TiB,capability=8.6", "memory"),
        ("memory=24GiB,capability=8.6,name=a\nb", "name"),
        ("memory=100MiB,capability=8.6", "memory"),
    ],
)
def test_a_wrong_description_names_what_is_wrong(spec, argument):
    with pytest.raises(InvalidArgumentError) as caught:
        find_card(spec)
    assert caught.value.argument == argument


def test_the_catalog_does_not_import_torch():
    code = "import sys, autobatch.virtual.catalog as c; c.cards(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
