"""Tests for somebody who has just copied or changed a file: `python -m pytest -m quick` runs them
within a minute on two cores. The promises of all scripts, the style, flags and their defaults; of
each family the exact losses of one method, and a tiny run."""

FLAGS = "tests/common/test_flags.py::"
QUICK = {  # files, tests with all their parameters, and single ones
    "tests/methods/test_contract.py",
    "tests/tools/test_packaging.py",
    "tests/tools/test_style.py",
    f"{FLAGS}test_the_precedence_of_defaults",
    f"{FLAGS}test_a_flag_that_equals_the_class_default_counts",
    f"{FLAGS}test_both_ways_to_name_the_environment",
    f"{FLAGS}test_all_scripts_defaults_are_possible",
    f"{FLAGS}test_tasks_that_are_none_or_twice",
    f"{FLAGS}test_what_is_no_flag",
    "tests/methods/test_qam.py::test_loss_and_gradients[critic-plain]",
    "tests/methods/test_qam.py::test_loss_and_gradients[behavior-plain]",
    "tests/methods/test_qam.py::test_loss_and_gradients[policy-plain]",
    "tests/methods/test_fmer.py::test_critic_loss",
    "tests/methods/test_fmer.py::test_policy_loss[exact-tanh]",
    "tests/runs/test_script_runs.py::test_files[qam]",
    "tests/runs/test_online_runs.py::test_files[fmer]",
}


def is_quick(nodeid: str) -> bool:
    """Whether QUICK has a test, or its file."""
    file, _, name = nodeid.partition("::")
    test, _, _ = name.partition("[")
    return bool(QUICK & {file, f"{file}::{test}", nodeid})
