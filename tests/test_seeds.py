"""The tables of benchmarks/seeds.py."""

import importlib.util

import pytest
from absl import app, flags
from tiny import REPOSITORY


@pytest.fixture(scope="module")
def seeds():
    """The script as a module. Its flags are taken back, since pytest's process has no command line for them."""
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location("seeds", REPOSITORY / "benchmarks" / "seeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_tables_have_means_spreads_the_worst_seed_and_paired_differences(seeds):
    run = lambda pq, mae: {"panoptic.pq": pq, "foreground.mae": mae}
    results = {"recipe": {0: run(60.0, 1.0), 1: run(70.0, 3.0)}, "other": {0: run(64.0, 1.0), 1: run(71.0, 2.0)}}
    means, differences = seeds.tables(results, ["panoptic.pq", "foreground.mae"]).split("Difference to recipe")
    assert "| recipe | 65.0 ± 7.1 (60.0) | 2.0 ± 1.4 (3.0) |" in means, "the worst error is the largest"
    assert "| other | 67.5 ± 4.9 (64.0) | 1.5 ± 0.7 (2.0) |" in means
    assert "| other | +2.5 ± 2.1 (2/2) | -0.5 ± 0.7 (0/2) |" in differences
    one_seed = seeds.tables({"recipe": {0: run(60.0, 1.0)}}, ["panoptic.pq"])
    assert "| recipe | 60.0 (60.0) |" in one_seed and "Difference" not in one_seed


def test_parse_arm_reads_a_name_and_field_overrides(seeds):
    assert seeds.parse_arm("recipe") == ("recipe", [])
    arm = seeds.parse_arm("big: data.canvas=(96,96); steps=5")
    assert arm == ("big", ["data.canvas=(96,96)", "steps=5"])
    with pytest.raises(app.UsageError, match="letters, digits"):
        seeds.parse_arm("a/b")
    with pytest.raises(app.UsageError, match="'steps' is not of the form field=value"):
        seeds.parse_arm("big: steps")


def test_the_worst_classes_are_read_from_the_details_of_a_run(seeds, tmp_path):
    classes = '{"ball": {"is_region": false, "pq": 40.0}, "sky": {"is_region": true, "pq": 90.0}'
    details = f'{{"sample/val": {{"panoptic": {{"classes": {classes}, "sand": {{"is_region": true, "pq": 80.0}}}}}}}}}}'
    (tmp_path / "eval_details.json").write_text(details)
    assert seeds.worst_classes(str(tmp_path)) == {"panoptic.worst_thing": 40.0, "panoptic.worst_stuff": 80.0}
