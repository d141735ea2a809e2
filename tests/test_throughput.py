"""Times, operations and memory: known work gives known figures. No test asserts a duration."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_decoder, tiny_tokenizer
from torch import nn

from monobath.errors import UserError
from monobath.evaluation import bench as benchmark
from monobath.evaluation.peers import FileCodec
from monobath.evaluation.speed import (
    Timing,
    conditions,
    count_flops,
    measure,
    peak_memory,
    profile,
    system_speeds,
)
from monobath.evaluation.system import TokenizerSystem
from monobath.models.attention import windowed_attention

CPU = torch.device("cpu")


# ---- rounds -----------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_rotated():
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    timings = measure(works, repeats=4, warmup=0, device=CPU)
    assert "".join(calls) == "ABCBCACABABC"
    assert {name: len(timing.times) for name, timing in timings.items()} == {"A": 4, "B": 4, "C": 4}


def test_warm_up_rounds_run_and_do_not_count():
    calls: list[str] = []
    timings = measure({name: (lambda name=name: calls.append(name)) for name in "AB"}, repeats=1, warmup=3)
    assert sorted(calls) == ["A"] * 4 + ["B"] * 4
    assert [len(timing.times) for timing in timings.values()] == [1, 1]


def test_work_runs_without_gradients():
    seen = []
    measure({"a": lambda: seen.append(torch.is_grad_enabled())}, repeats=1, warmup=1)
    assert seen == [False, False]


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 30.0))
    assert timing.median == 4
    assert timing.quartiles == (2, 5)
    assert Timing((7.0,)).quartiles == (7, 7)


def test_no_rounds_are_refused():
    with pytest.raises(UserError, match="repeats is 0"):
        measure({}, repeats=0)


# ---- operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 14), 2 * 2 * 10 * 14 * 8 * 3 * 9),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (1, 4, 10, 14), 2 * 5 * 7 * 4 * 9),
        (nn.Linear(6, 5), (7, 6), 2 * 7 * 6 * 5),
        (nn.GroupNorm(2, 4), (1, 4, 8, 8), 0),
    ],
)
def test_known_layers_have_known_operations(layer, shape, expected):
    assert count_flops(lambda: layer(torch.zeros(shape))) == expected


def test_attention_counts_on_this_device():
    q = torch.zeros(1, 2, 60, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 4 * 2 * 60 * 60 * 8


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_with_and_without_a_mask(masked):
    q, mask = torch.zeros(3, 2, 20, 8), torch.zeros(20, 20) if masked else None
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask)) == 3 * 4 * 2 * 20 * 20 * 8


def test_windowed_attention_counts_what_it_computes():
    """Dense: all pairs. Blocked, reach 2: blocks of 8² queries, 12² keys, one channel more, padded to 16."""
    grid, heads, d = (16, 24), 2, 8
    q, bias = torch.zeros(1, heads, math.prod(grid), d), torch.zeros(5, 5, heads)
    counted = {
        backend: count_flops(lambda backend=backend: windowed_attention(q, q, q, bias, grid, backend=backend))
        for backend in ("dense", "blocked")
    }
    assert counted["dense"] == 4 * heads * math.prod(grid) ** 2 * d
    assert counted["blocked"] == 4 * heads * 6 * 64 * 144 * 16


def test_operations_of_a_decoder_grow_with_the_batch_and_the_picture():
    decoder = tiny_decoder()

    def count(batch, height, width):
        z = torch.zeros(batch, 4, height // 8, width // 8)
        return count_flops(lambda: decoder(torch.zeros(batch, 3, height, width), torch.ones(batch), z))

    one = count(1, 16, 24)
    assert one > 1e5
    assert count(2, 16, 24) == 2 * one
    assert 3 * one < count(1, 32, 48)


# ---- memory -----------------------------------------------------------------------------------------------------


def measurable():
    if peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not tell the peak of resident memory")


def test_peak_memory_sees_an_allocation_of_known_size():
    measurable()
    held = []
    peak = peak_memory(lambda: held.append(torch.ones(30_000_000)), CPU)
    assert 110 < peak < 135  # 120 MB


PASSING = """
import torch
from monobath.evaluation.speed import peak_memory

def passing():
    for _ in range(3):
        torch.ones(25_000_000)  # 100 MB, never two at once

cpu = torch.device("cpu")
print(peak_memory(passing, cpu), peak_memory(lambda: torch.ones(1000), cpu))
"""


def test_peak_memory_sees_what_was_freed_again_and_forgets_earlier_peaks():
    """In a process of its own: the allocator may keep what is freed in a heap that earlier tests left full of holes."""
    measurable()
    found = subprocess.run([sys.executable, "-c", PASSING], capture_output=True, text=True, check=True)
    freed, later = map(float, found.stdout.split())
    assert 90 < freed < 115
    assert later < 10


def test_peak_memory_is_unknown_where_linux_files_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("monobath.evaluation.speed._CLEAR", tmp_path / "none" / "clear_refs")
    calls = []
    assert peak_memory(lambda: calls.append(1), CPU) is None
    assert calls == [1]


def test_profile_counts_and_weighs_one_call():
    measurable()
    calls, a = [], torch.ones(1, 64, 512, 512)
    layer = nn.Conv2d(64, 64, 1)

    def work():
        calls.append(1)
        return layer(a)

    gflop, peak = profile(work, CPU)
    assert calls == [1]
    assert gflop == pytest.approx(2 * 64 * 64 * 512 * 512 / 1e9)
    assert peak > 60  # the output is 67 MB


# ---- systems ----------------------------------------------------------------------------------------------------


def test_speeds_of_systems(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "mine")
    systems = [TokenizerSystem(str(tmp_path / "mine")), FileCodec("jpeg", 2.0)]
    said: list[str] = []
    found = system_speeds(systems, (24, 40), batches=(1, 2), repeats=3, progress=said.append)
    assert list(found) == [s.name for s in systems]
    for speeds in found.values():
        assert [(s.batch, s.part) for s in speeds] == [(1, "encode"), (1, "decode"), (2, "encode"), (2, "decode")]
        assert all(0 < s.ms_low <= s.ms <= s.ms_high and s.repeats == 3 and s.size == (24, 40) for s in speeds)
        assert speeds[3].images_per_second == pytest.approx(2000 / speeds[3].ms)
    ours, jpeg = found.values()
    assert [s.gflop for s in jpeg] == [None] * 4
    assert ours[2].gflop == pytest.approx(2 * ours[0].gflop)
    assert ours[3].gflop == pytest.approx(2 * ours[1].gflop)
    assert len(said) == 12, "each system, then the rounds, of each batch and part"
    assert "decode 2 × 24 × 40" in said[-1]


def test_conditions_say_what_times_hold_for():
    found = conditions(CPU, torch.bfloat16)
    assert (found["device"], found["dtype"], found["compiled"]) == ("cpu", "bfloat16", False)
    assert found["threads"] == torch.get_num_threads()


# ---- the benchmark ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench") / "mine"
    tiny_tokenizer().save_pretrained(folder)
    plan = benchmark.Plan(sizes=[16, 24], decoders=["XS/4"], models=[str(folder)], repeats=2)
    return benchmark.run_bench(plan, command="monobath bench --sizes 16 24"), str(folder)


def test_bench_measures_peers_decoders_and_models(result):
    found, model = result
    names = ["AutoencoderKL", "AutoencoderTiny", "XS/4", model]
    assert [(row.size, row.name) for row in found.results] == [(size, name) for size in (16, 24) for name in names]
    by_name = {row.name: row for row in found.results if row.size == 16}
    assert by_name["AutoencoderKL"].parameters == 49_490_199  # decoders only
    assert by_name["AutoencoderTiny"].parameters == 1_222_531
    for row in found.results:
        kl = next(r for r in found.results if r.size == row.size and r.name == "AutoencoderKL")
        tiny = next(r for r in found.results if r.size == row.size and r.name == "AutoencoderTiny")
        assert row.speed_to_kl == pytest.approx(kl.ms / row.ms)
        assert row.speed_to_tiny == pytest.approx(tiny.ms / row.ms)
        assert row.ms_low <= row.ms <= row.ms_high
        assert row.gflop_per_second == pytest.approx(row.gflop / (row.ms / 1000))
    assert by_name["AutoencoderKL"].gflop > by_name["XS/4"].gflop > by_name[model].gflop > 0


def test_bench_reports_itself(result):
    found, _ = result
    values = json.loads(json.dumps(found.as_dict()))
    assert values["command"] == "monobath bench --sizes 16 24"
    assert values["conditions"]["dtype"] == "float32"
    assert values["conditions"]["compiled"] is False
    assert len(values["results"]) == 8
    assert {"gflop", "gflop_per_second", "peak_mb", "speed_to_kl"} <= values["results"][0].keys()
    tables = found.rows()
    assert list(tables) == [16, 24]
    assert all(len(row) == len(benchmark.HEAD) for rows in tables.values() for row in rows)
    text = found.markdown()
    assert "monobath bench --sizes 16 24" in text
    assert text.count("| XS/4 |") == 2
    assert "none: eager PyTorch" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [20]}, "size 20"),
        ({"sizes": [0]}, "size 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"decoders": ["Q/1"]}, "Q/1"),
        ({"decoders": [], "models": ["no/such/model"]}, "no/such/model"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(options, message):
    with pytest.raises(UserError, match=message):
        benchmark.run_bench(benchmark.Plan(**({"sizes": [16], "repeats": 1} | options)))


def test_default_decoders_cover_the_grid():
    assert len(benchmark.DECODERS) == 15
    assert {"XS/1", "S/2", "M/4", "CM/4"} <= set(benchmark.DECODERS)
