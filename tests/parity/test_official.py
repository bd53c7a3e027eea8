"""Every number of the official code's 21 cases, repeated by our scripts in float64.

A case is a small agent with fixed parameters, batches and noise. What is known to differ, and why,
is said in cases.py: `NOT_LOGGED`, `DRAWN_TRANSPOSED`, and the comment on DAC and QSM.
"""

import pytest

from tests.parity.cases import CASES
from tests.parity.compare import ACTIONS, DATA, Official, errors, load_script, share_of_invalid

TOLERANCE = 1e-11  # relative to the largest entry of an array
TARGET = "target_"


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def found(case, quick_compile):
    """Relative distances of everything that the case compares."""
    return errors(case)


def check(distances):
    """All are within the tolerance. A number that is NaN is not."""
    wrong = {name: x for name, x in distances.items() if not x <= TOLERANCE}
    assert distances and not wrong, wrong


def test_total_loss(found):
    check(found["loss"])


def test_logged_parts(found):
    check(found["logged"])


def test_gradient_of_every_network(case, found):
    check(found["gradient"])
    assert {path.split("/")[1] for path in found["gradient"]} == set(case.networks)


def test_parameters_after_every_update(case, found):
    check(found["parameters"])
    assert len(found["parameters"]) == case.updates * len(found["gradient"])


def test_targets_after_every_update(case, found):
    check(found["targets"])
    assert {path.split("/")[0] for path in found["targets"]} == {
        f"after{number}" for number in range(1, case.updates + 1)
    }


def test_actions(found):
    check(found["actions"])
    assert len(found["actions"]) == ACTIONS


@pytest.mark.parametrize("name", CASES)
def test_every_official_network_is_compared(name):
    """Each network that the official code trains is one of ours, with as many parameters."""
    paths = Official(name).under("start")
    trained = {path.split("/")[0] for path in paths if not path.startswith(TARGET)}
    assert trained == {theirs for theirs, _ in CASES[name].networks.values()}


@pytest.mark.parametrize("name", CASES)
def test_batches_contain_what_losses_have_to_mask(name):
    """Otherwise a script that forgets `valid` or `masks` would agree, too."""
    official = Official(name)
    assert 0 < share_of_invalid(official) < 1
    masks = official.arrays["batch1/masks"][:, -1]
    assert 0 < masks.mean() < 1


def test_every_script_of_the_official_repository_has_a_case():
    """All offline scripts except ME-AM, whose authors have published no code."""
    offline = "bam cgql dac dsrl fawac fbrac fedit fql ifql qsm rebrac rlpd".split()
    scripts = {"qam", "qam_edit", "qam_fql"} | {f"baselines.{name}" for name in offline}
    assert {case.script for case in CASES.values()} == scripts
    for case in CASES.values():
        load_script(case)


def test_one_file_per_case_within_three_megabytes():
    files = list(DATA.glob("*"))
    assert {file.name for file in files} == {f"{name}.npz" for name in CASES}
    assert sum(file.stat().st_size for file in files) < 3e6
