"""Failure limit, selected images and captions, option errors, and division of shards among processes."""

import threading

import pytest

from grounding.batch.config import RunConfig
from grounding.batch.executors import ProcessRank
from grounding.batch.failure_limit import FailureLimit
from grounding.batch.ray import worker_slots
from grounding.batch.requests import sample_of
from grounding.batch.rows import failed_row
from grounding.batch.run import check_statuses
from grounding.core.errors import DataError, FailureLimitError, OptionError
from grounding.core.text import Generate
from grounding.datasets.subset import chosen_ids, picked
from tests.support import batch
from tests.support.batch import Executor

GOOD = {"status": "ok"}
BAD = failed_row("a", 0, "x", "failed_decode", "cut short")


# ---------------------------------------------------------------- failure limit


def fill(limit, pattern):
    """Count rows one by one, failed ones as `x`; return how many until the limit was exceeded, or None."""
    for number, one in enumerate(pattern, 1):
        try:
            limit.add([BAD if one == "x" else GOOD])
        except FailureLimitError:
            return number
    return None


def test_more_than_five_in_a_hundred_after_five_hundred_rows():
    spread = "." * 19 + "x"  # 5 %
    assert fill(FailureLimit(), spread * 50) is None
    assert fill(FailureLimit(), "xx" + spread * 24 + "." * 17) is None  # 26 of 499
    assert fill(FailureLimit(), "xx" + spread * 24 + "." * 20) == 500  # 26 of 500
    assert fill(FailureLimit(), spread * 30 + "x") == 601  # 31 of 601
    assert fill(FailureLimit(share=0.5, after=4), "xxx..") == 4


def test_a_hundred_in_a_row():
    assert fill(FailureLimit(), "x" * 100) == 100
    assert fill(FailureLimit(), "." * 9000 + "x" * 99 + "." + "x" * 99) is None
    assert fill(FailureLimit(), "." * 4000 + "x" * 200) == 4100
    assert fill(RunConfig("data", max_failed=1).failure_limit(), "x" * 600) is None  # whatever fails
    assert fill(RunConfig("data", max_failed=0.5).failure_limit(), ("." * 3 + "x") * 250) is None
    with pytest.raises(OptionError, match="from 0 to 1"):
        RunConfig("data", max_failed=1.5)
    with pytest.raises(
        FailureLimitError, match=r"stopped: 100 rows in a row failed \(100 failed_decode\); the first: cut sh"
    ):
        FailureLimit().add([BAD] * 250)
    assert FailureLimitError("x").exit_code == 4


def test_degenerate_and_truncated_rows_are_no_failures():
    assert FailureLimit().add([{"status": "degenerate"}, {"status": "ok_truncated"}] * 400) is None


def test_a_cluster_counts_whole_shards():
    def shard(good, bad):
        failures = [{"status": "failed_read", "error": "gone"}] * bad + [{"status": "degenerate", "error": "x"}]
        return {"rows": good + bad, "failures": failures}

    limit = FailureLimit()
    for _ in range(25):
        limit.add_shard(shard(19, 1))
    with pytest.raises(FailureLimitError, match=r"stopped: 31 of 530 rows failed, more than 5% .*the first: gone"):
        limit.add_shard(shard(24, 6))
    limit = FailureLimit()
    limit.add_shard(shard(0, 60))
    with pytest.raises(FailureLimitError, match="120 rows in a row"):
        limit.add_shard(shard(0, 60))
    limit = FailureLimit()
    limit.add_shard(shard(0, 60))
    limit.add_shard(shard(1, 3))
    limit.add_shard(shard(0, 60))


def test_a_run_whose_rows_all_failed_is_an_error(tmp_path):
    go = batch.modelless(tmp_path)

    class Failing(Executor):
        def rows(self, run, shard):
            return [failed_row(name, 0, "x", "failed_decode", f"{name} is bad") for name in run.members(shard)]

    for executor in (Failing(), Failing()):  # resumed: the same error
        with pytest.raises(FailureLimitError, match=r"every row failed \(5\); the first: 0.png is bad"):
            go(executor=executor)
    assert executor.done == []
    assert len((tmp_path / "run" / "failures.jsonl").read_text().splitlines()) == 5


# ---------------------------------------------------------------- selected images


def test_images_drawn_are_the_same_for_the_same_seed_and_in_order():
    names = tuple(f"{i:03}" for i in range(100))
    drawn = picked(names, None, 10, 3)
    assert drawn == picked(names, None, 10, 3)
    assert drawn == tuple(sorted(drawn))
    assert len(set(drawn)) == 10
    assert drawn != picked(names, None, 10, 4)
    assert picked(names, None, 1000, 3) == names
    assert picked(names, 7, None, 3) == names[:7]
    assert picked(names, None, None, 3) == names
    with pytest.raises(OptionError, match="choose one"):
        picked(names, 1, 1, 0)
    for wrong in ((0, None), (-1, None), (None, 0)):
        with pytest.raises(OptionError, match=r"(limit|random) must be at least 1 image, got"):
            picked(names, *wrong, 0)


def test_broken_rows_of_a_list_belong_to_the_whole_of_it(tmp_path):
    folder = batch.data(tmp_path, 3)
    with (folder / "captions.txt").open("a") as file:
        file.write(",no name\n")
    dataset = RunConfig(data=str(folder)).dataset()
    assert len(dataset.broken) == 1
    assert chosen_ids(dataset, None, None, 0) == ("0.png", "1.png", "2.png", *dataset.broken)
    assert chosen_ids(dataset, 2, None, 0) == ("0.png", "1.png")
    [name] = dataset.broken
    sample = sample_of(dataset, name, "all", ())
    assert (sample.requests, sample.image) == ((), None)
    assert [failure.error for failure in sample.failures] == ["it names no image"]


def test_captions_first_all_none(tmp_path):
    dataset = RunConfig(data=str(batch.data(tmp_path, 1, ["", "one", "two"]))).dataset()
    every = sample_of(dataset, "0.png", "all", ())
    assert [(request.line, request.caption) for request in every.requests] == [(1, "one"), (2, "two")]
    assert [failure.line for failure in every.failures] == [0]
    first = sample_of(dataset, "0.png", "first", ())
    assert [request.caption for request in first.requests] == ["one"]
    assert first.failures == ()
    none = sample_of(dataset, "0.png", "none", ())
    assert [(request.line, request.text) for request in none.requests] == [(0, Generate())]
    assert none.failures == ()


def test_an_image_without_a_usable_caption_is_one_failure(tmp_path):
    dataset = RunConfig(data=str(batch.data(tmp_path, 1, ["", " "]))).dataset()
    assert [f.line for f in sample_of(dataset, "0.png", "all", ()).failures] == [0, 1]
    assert [f.line for f in sample_of(dataset, "0.png", "first", ()).failures] == [0]


# ---------------------------------------------------------------- option and data errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"protocols": ("mine",)}, r"no protocol 'mine' \(there are: mention-anybox, chain-unionbox\)"),
    ],
)
def test_values_out_of_range_are_errors(settings, message):
    with pytest.raises(OptionError, match=message):
        RunConfig(data="x", **settings)


def test_an_unknown_status_is_an_error_with_the_nearest_match():
    check_statuses(["failed_decode", "degenerate", "ok"])
    with pytest.raises(
        OptionError, match=r"no status 'failed_decod'.*failed_decode.*there are: ok, ok_truncated"
    ) as at:
        check_statuses(["failed_decod"])
    assert at.value.exit_code == 2


def test_no_folder_is_made_for_a_wrong_status(tmp_path):
    with pytest.raises(OptionError, match="no status"):
        batch.modelless(tmp_path)(retry=["fine"])
    assert not (tmp_path / "run").exists()


def test_data_without_images_are_an_error(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n")
    with pytest.raises(DataError, match="lists no images"):
        RunConfig(data=str(tmp_path)).dataset()


def test_shards_are_shared_by_their_number():
    ranks = [ProcessRank(i, 3) for i in range(3)]
    shares = [rank.share([0, 1, 2, 5, 6, 9]) for rank in ranks]
    assert shares == [[0, 6, 9], [1], [2, 5]]
    assert ProcessRank().share([4, 7]) == [4, 7]
    assert ProcessRank.of_launch("cpu") == ProcessRank()
    assert ProcessRank().device("auto") == "auto"


@pytest.mark.parametrize(
    ("machines", "threads", "expected"),
    [
        ([{"CPU": 2.0}], 1, (2, {"num_cpus": 1})),
        # A worker has CPUs of one machine only.
        ([{"CPU": 7.0}, {"CPU": 4.0, "memory": 9.0}, {}], 4, (2, {"num_cpus": 4})),
        ([{"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0, "GPU": 4.0}], 8, (5, {"num_gpus": 1})),
    ],
)
def test_workers_of_a_cluster_fit_on_its_machines(machines, threads, expected):
    assert worker_slots(machines, threads) == expected


@pytest.mark.parametrize(("machines", "most"), [([{"CPU": 2.0}, {"CPU": 3.0}], "3: use --threads 3"), ([], "0: use")])
def test_a_worker_that_fits_on_no_machine_is_an_error(machines, most):
    with pytest.raises(OptionError, match=f"each of 4 threads, but no machine of the Ray cluster has more than {most}"):
        worker_slots(machines, 4)


def test_a_rank_waits_for_shards_that_others_compute_again(tmp_path):
    run = batch.modelless(tmp_path)()
    stamps = {shard: run.stamp(shard) for shard in run.shards}
    waiting = threading.Thread(target=ProcessRank(0, 2).wait_for, args=(run, stamps), daemon=True)
    waiting.start()
    for shard in run.shards:
        assert waiting.is_alive()
        run.commit(shard, Executor().rows(run, shard), 0.0)
    waiting.join(10)
    assert not waiting.is_alive()
    ProcessRank().wait_for(run, {0: run.stamp(0)})  # a single process does not wait
