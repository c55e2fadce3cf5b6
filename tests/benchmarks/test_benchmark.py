"""Benchmarks on tiny models: the cases that are documented, not their numbers."""

import json
import sys
import time

import pytest

from tests.support import models
from tests.support.commands import ROOT, script
from tests.support.tolerances import TUTORIAL, within


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmarks.classifier as classes
    import benchmarks.clip as loops
    import benchmarks.flava as fused
    import benchmarks.trocr as lines

    monkeypatch.setattr(classes, "make_adapter", lambda: models.classifier_adapter(dtype=models.torch.float32))
    monkeypatch.setattr(fused, "make_adapter", lambda: models.flava_adapter(dtype=models.torch.float32))
    monkeypatch.setattr(fused, "sentence", lambda count: " ".join(["red"] * count))
    monkeypatch.setattr(lines, "make_adapter", lambda: models.trocr_adapter(dtype=models.torch.float32))
    monkeypatch.setattr(lines, "sentence", lambda count: " ".join(["red"] * (count - 1)))
    monkeypatch.setattr(loops, "make_adapter", lambda: models.clip_adapter(dtype=models.torch.float32, layers=4))
    monkeypatch.setattr(loops, "captions", lambda: ["red car", "two dogs"])
    monkeypatch.setattr(loops, "CAPTIONS", 2)
    yield script(ROOT / "scripts" / "benchmark.py")
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_json_has_the_documented_cases(benchmark, capsys):
    assert benchmark.main(["clip", "--format", "json", "--pictures", "1", "2", "--repeats", "1", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)["clip"]
    keys = ["case", "method", "variant", "pictures", "targets", "ratio_to_forward", "naive_ratio", "speedup", "peak_mb"]
    assert all(list(case) == keys for case in cases)
    assert {case["case"] for case in cases} == {"maps", "end_to_end"}
    gradcam = [c for c in cases if (c["case"], c["method"], c["variant"]) == ("maps", "gradcam", None)]
    assert [c["pictures"] for c in gradcam] == [1, 2]
    assert gradcam[1]["targets"] == 2 * gradcam[0]["targets"]
    for case in gradcam:  # the speed-up and the naive ratio have one decimal place
        ratio = case["ratio_to_forward"]
        assert case["speedup"] == pytest.approx(case["naive_ratio"] / ratio, abs=0.06 + 0.06 / ratio)


def test_json_has_the_documented_cases_of_lines(benchmark, capsys):
    assert benchmark.main(["trocr", "--format", "json", "--tokens", "4", "12", "21", "--repeats", "1", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)["trocr"]
    keys = ["method", "tokens", "ratio_to_forward", "ratio_to_generate", "naive_ratio", "speedup", "peak_mb"]
    assert all(list(case) == [*keys, "difference"] for case in cases)
    by_size = {size: {c["method"]: c for c in cases if c["tokens"] == size} for size in (4, 12, 21)}
    assert by_size[4].keys() == by_size[12].keys() > by_size[21].keys()  # a backward per token: short texts alone
    assert {"generate", "tutorial loop", "explain", "default methods", "rollout"} < by_size[21].keys()
    for found in by_size.values():
        looped = found["gradcam @ last encoder block"]
        assert looped["naive_ratio"] == pytest.approx(found["tutorial loop"]["ratio_to_forward"], abs=0.06)
        assert within(looped["difference"], TUTORIAL)
        assert [c["method"] for c in found.values() if c["speedup"] is not None] == [looped["method"]]
        assert found["generate"]["ratio_to_generate"] == 1


def test_json_has_the_documented_cases_of_a_fusion_encoder(benchmark, capsys):
    assert benchmark.main(["flava", "--format", "json", "--words", "4", "--repeats", "1", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)["flava"]
    keys = ["target", "tap", "method", "layer", "tokens", "ratio_to_forward", "naive_ratio", "speedup", "peak_mb"]
    assert all(list(case) == [*keys, "difference"] for case in cases)
    looped = [case for case in cases if case["speedup"] is not None]
    assert [(case["target"], case["tap"]) for case in looped] == [("logit", "fusion"), ("logit", "vision")]
    assert all(within(case["difference"], TUTORIAL) for case in looped)
    assert {case["target"] for case in cases} == {"logit", "matching", "similarity"}


def test_json_has_the_documented_cases_of_classifiers(benchmark, capsys):
    argv = ["classifier", "--format", "json", "--images", "2", "3", "--repeats", "1", "-q"]
    assert benchmark.main(argv) == 0
    cases = json.loads(capsys.readouterr().out)["classifier"]
    keys = ["case", "method", "pictures", "classes_per_picture", "ratio_to_forward", "peak_mb"]
    assert all(list(case) == keys for case in cases)
    assert [case["pictures"] for case in cases if case["case"] == "end to end"] == [2, 3]
    assert {"maps, last stage", "maps, predicted class", "tutorial loop"} < {case["case"] for case in cases}
    assert all(case["ratio_to_forward"] > 0 for case in cases)


def test_json_has_the_documented_cases_of_batch_runs(benchmark, capsys):
    assert benchmark.main(["batch", "--format", "json", "--dataset", "2", "9", "--repeats", "1", "-q"]) == 0
    cases = json.loads(capsys.readouterr().out)["batch"]
    keys = ["model", "pictures", "ratio_to_tower", "ratio_with_text", "pictures_per_s", "peak_mb", "growth_after_100"]
    assert all(list(case) == [*keys, "stored_mb_per_1000"] for case in cases)
    assert [case["pictures"] for case in cases] == [2, 9]
    assert all(0 < case["ratio_to_tower"] < case["ratio_with_text"] for case in cases)
    assert all(case["stored_mb_per_1000"] > 0 for case in cases)


@pytest.mark.parametrize(
    "argv",
    [
        ["--dataset", "0"],
        ["--images", "0"],
        ["--words", "2"],
        ["--tokens", "2"],
        ["--repeats", "0"],
        ["--pictures", "0"],
        ["--pictures", "1.5"],
    ],
)
def test_invalid_numbers_raise(benchmark, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["clip", *argv])
    assert caught.value.code == 2
    assert "or more" in capsys.readouterr().err


def test_text_is_a_table(benchmark, capsys):
    assert benchmark.main(["clip", "--pictures", "1", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "ratio_to_forward" in out
    assert "bare forward" in err


def test_the_meter_measures_memory_and_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmarks.meter import cost

    def work():
        held = bytearray(b"1") * (64 * 2**20)
        time.sleep(0.2)  # a sum in C holds the GIL, so the watcher could not run
        return sum(held)

    found = cost(work, 1)
    assert found.seconds > 0.05
    if sys.platform == "linux":
        assert 60 < found.peak_mb < 80
