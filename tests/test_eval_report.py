"""The report of an evaluation: its words follow from the figures, and the page needs nothing but itself."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from monobath.evaluation import closeups, tables
from monobath.evaluation.bench import Bench, BenchRow
from monobath.evaluation.closeups import Closeup, affordable, choose, comparison_sheet, place_of_difference
from monobath.evaluation.compare import Kept
from monobath.evaluation.report import bench_page, eval_page
from monobath.evaluation.results import Channel, Estimate, Evaluation, MetricInfo, Speed, SystemResult

METRICS = [
    MetricInfo(
        key="psnr", label="PSNR (dB)", better="higher", kind="picture", details="8-bit RGB, data range 255",
        interval="95 % bootstrap interval",
    ),
    MetricInfo(
        key="fd_efflite", label="FD-EffLite (EfficientNet-Lite2), n = 24", better="lower", kind="set",
        details="1280 features", interval="± 2 standard deviations",
    ),
    MetricInfo(
        key="lpips", label="LPIPS (VGG)", better="lower", kind="picture", details="", interval="",
        absent="needs the package lpips: pip install lpips",
    ),
]  # fmt: skip


def speed(part: str, ms: float, gflop: float | None = 3.2, batch: int = 1) -> Speed:
    return Speed(
        part=part, size=(64, 64), batch=batch, ms=ms, ms_low=0.9 * ms, ms_high=1.2 * ms, repeats=3, gflop=gflop,
        peak_mb=12.3,
    )  # fmt: skip


def system(name: str, kind: str, psnr: float, fd: float, bits: float, ms: float, **more) -> SystemResult:
    networks = kind not in ("JPEG", "bicubic")
    return SystemResult(
        name=name,
        kind=kind,
        weights="somewhere" if networks else "",
        bits_per_pixel=bits,
        figures={
            "psnr": Estimate(value=psnr, low=psnr - 0.5, high=psnr + 0.5),
            "fd_efflite": Estimate(value=fd, low=fd - 3, high=fd + 3),
        },
        differences={}
        if name == "default"
        else {
            "psnr": Estimate(value=psnr - 24, low=psnr - 24.3, high=psnr - 23.7),
            "fd_efflite": Estimate(value=fd - 80, low=fd - 82, high=fd - 78),
        },
        speed=[speed(part, ms, 3.2 if networks else None) for part in ("encode", "decode")],
        encoder_parameters=1_340_000 if networks else None,
        decoder_parameters=3_390_000 if networks else None,
        **more,
    )


def example_evaluation() -> Evaluation:
    return Evaluation(
        command="monobath eval --data 'a <b> folder'",
        data="a <b> folder",
        size=64,
        short_side=64,
        names=["one.png", "two <&>.png", "three.png"],
        metrics=[dataclasses.replace(metric) for metric in METRICS],
        systems=[
            system("default", "monobath", 24, 80, 1.0, 90, family="default", steps=1),
            system("default, 4 steps", "monobath", 24.1, 70, 1.0, 350, family="default", steps=4),
            system("TAEF2 <i>", "TAEF2", 28.8, 20, 8.0, 120),
            system("bicubic ÷8 ×8", "bicubic", 21, 250, 0.375, 0.9),
            system("JPEG at 1.00 bit/pixel", "JPEG", 29, 60, 0.98, 2.6, family="JPEG"),
            system("JPEG at 2.00 bit/pixel", "JPEG", 33, 30, 1.97, 2.9, family="JPEG"),
        ],
        machine={"torch": "2.x", "cpu": "a processor", "cpu_cores": 2},
        seconds=83.0,
        skipped=1,
    )


def example_outputs(evaluation: Evaluation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures 48 × 80; the second one differs most between systems, near its lower right corner."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(60, 200, (3, 3, 48, 80), dtype=torch.uint8, generator=generator)
    outputs = {}
    for number, result in enumerate(evaluation.systems):
        changed = originals.clone()
        changed[:, :, :, :10] += number
        changed[1, :, 30:44, 60:76] = 40 * number
        outputs[result.name] = changed
    return originals, outputs


def kept(evaluation: Evaluation, originals: torch.Tensor, outputs: dict[str, torch.Tensor]) -> Kept:
    return Kept(names=evaluation.names, positions=[0, 1, 2], originals=originals, outputs=outputs)


def example() -> tuple[Evaluation, list[Closeup]]:
    evaluation = example_evaluation()
    originals, outputs = example_outputs(evaluation)
    return evaluation, choose(kept(evaluation, originals, outputs), closeups.shown_systems(evaluation))


def example_bench() -> Bench:
    rows = [("AutoencoderKL", 450.0, 4000.0), ("AutoencoderTiny", 20.0, 120.0), ("S/1", 300.0, 3000.0), ("XS/4", 5, 30)]
    return Bench(
        command="monobath bench --cpu",
        batch=1,
        repeats=3,
        conditions={"device": "cpu", "dtype": "float32", "threads": 2},
        machine={"torch": "2.x", "cpu": "a processor"},
        seconds=10.0,
        results=[
            BenchRow(
                name=name, size=size, parameters=10**6, gflop=gflop, ms=ms, ms_low=0.9 * ms, ms_high=1.1 * ms,
                peak_mb=None, speed_to_kl=4000 / ms, speed_to_tiny=120 / ms,
            )
            for size in (256, 512)
            for name, gflop, ms in rows
        ],
    )  # fmt: skip


class Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


# ---- words ------------------------------------------------------------------------------------------------------


def test_verdict_names_the_best_and_the_best_at_equal_bits():
    overall, frugal, times = tables.verdict(example_evaluation())
    assert overall == (
        "Of 6 systems on 3 pictures, JPEG at 2.00 bit/pixel is best in PSNR (33.00, 32.50 to 33.50); "
        "TAEF2 <i> is best in FD-EffLite (20.0, 17.0 to 23.0)."
    )
    assert frugal == (
        "Of those with no more bits than default (1.00 bits a pixel), JPEG at 1.00 bit/pixel is best in "
        "PSNR (29.00, 28.50 to 29.50) and FD-EffLite (60.0, 57.0 to 63.0)."
    )
    assert (
        times == "Networks by the time to decode a picture: default 90 ms; TAEF2 <i> 120 ms; default, 4 steps 350 ms."
    )


def test_verdict_says_when_the_difference_may_be_none():
    evaluation = example_evaluation()
    evaluation.systems = evaluation.systems[:2]
    said = tables.verdict(evaluation)[0]
    assert "default, 4 steps is best in PSNR (24.10, 23.60 to 24.60, level with default)" in said
    assert "FD-EffLite (70.0, 67.0 to 73.0)." in said
    evaluation.systems[1].figures["psnr"].value = 23.9
    assert (
        "default is best in PSNR (24.00, 23.50 to 24.50, level with default, 4 steps)" in tables.verdict(evaluation)[0]
    )


def test_standing():
    higher, lower = METRICS[0], METRICS[1]
    up, down, none = (Estimate(value=v, low=v - 1, high=v + 1) for v in (2.0, -2.0, 0.5))
    assert [tables.standing(e, higher) for e in (up, down, none, None)] == [1, -1, 0, 0]
    assert [tables.standing(e, lower) for e in (up, down, none)] == [-1, 1, 0]


@pytest.mark.parametrize(
    ("estimate", "places", "expected"),
    [
        (Estimate(value=28.8412, low=28.31, high=29.37), 2, ("28.84", "28.31 to 29.37")),
        (Estimate(value=-0.5, low=-1, high=0.25), 1, ("−0.5", "−1.0 to +0.2")),
        (Estimate(value=math.inf, low=math.inf, high=math.inf), 2, ("∞", "")),
        (Estimate(value=math.nan, low=math.nan, high=math.nan), 2, ("undefined", "")),
        (None, 2, ("–", "")),
    ],
)
def test_cells(estimate, places, expected):
    signed = estimate is not None and estimate.value < 0
    assert tables.estimate_cell(estimate, places, signed=signed) == expected


def test_decimals_show_two_digits_of_the_interval():
    for width, expected in [(0.5, 2), (0.012, 3), (5.0, 1), (40.0, 0)]:
        assert tables.decimals([Estimate(value=1, low=1 - width, high=1 + width)]) == expected
    assert tables.decimals([Estimate(value=31.4159, low=31.4159, high=31.4159)]) == 2


def test_numbers_have_no_exponents():
    assert [tables.number(v) for v in (0.01234, 4.0, 999.6, 12345.6, None)] == ["0.0123", "4", "1,000", "12,346", "–"]


# ---- pictures ---------------------------------------------------------------------------------------------------


def test_place_is_where_versions_differ():
    versions = torch.full((3, 3, 60, 100), 100, dtype=torch.uint8)
    versions[1, :, 40:50, 70:80] = 200
    top, left, score = place_of_difference(versions, side=16)
    assert top <= 40
    assert top + 16 >= 50
    assert left <= 70
    assert left + 16 >= 80
    assert score > 0
    assert place_of_difference(versions[:1].repeat(2, 1, 1, 1), side=16)[2] == 0


def test_noise_counts_less_than_structure():
    rng = np.random.default_rng(0)
    versions = np.full((2, 3, 64, 64), 128, dtype=np.uint8)
    versions[1, :, :, :32] += rng.integers(-20, 21, (3, 64, 32)).astype(np.int8).view(np.uint8)
    versions[1, :, 40:60, 40:60] += 20
    _, left, _ = place_of_difference(torch.from_numpy(versions), side=16)
    assert left > 32


def test_the_pictures_that_differ_most_come_first():
    evaluation, chosen = example()
    assert chosen[0].name == "two <&>.png"
    assert len(chosen) == 3
    assert list(chosen[0].outputs) == [s.name for s in evaluation.systems if "2.00" not in s.name]
    assert chosen[0].side == 48
    assert chosen[0].left + chosen[0].side >= 76


def test_a_lone_system_is_compared_with_the_original():
    evaluation = example_evaluation()
    originals, outputs = example_outputs(evaluation)
    (best, *_) = choose(kept(evaluation, originals, outputs), [evaluation.systems[4]])
    assert best.name == "two <&>.png"
    assert best.score > 0


def test_of_a_codec_the_rate_nearest_to_the_first_system_is_shown():
    evaluation = example_evaluation()
    shown = [s.name for s in closeups.shown_systems(evaluation)]
    assert "JPEG at 1.00 bit/pixel" in shown
    assert "JPEG at 2.00 bit/pixel" not in shown
    assert len(closeups.shown_systems(evaluation, limit=2)) == 2


def test_sheet_shows_the_pixels_and_the_enlarged_square():
    _, chosen = example()
    closeup = chosen[0]
    sheet = np.asarray(comparison_sheet(chosen))
    zoomed = closeup.crop(closeup.original).permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    assert contains(sheet, zoomed)
    inside = closeup.original[:, :, : closeup.left].permute(1, 2, 0).numpy()  # the frame covers a part of the rest
    assert contains(sheet, inside)


def contains(page: np.ndarray, part: np.ndarray) -> bool:
    h, w = part.shape[:2]
    corners = np.argwhere((page[: len(page) - h + 1, : page.shape[1] - w + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + h, x : x + w], part) for y, x in corners)


def test_pictures_stop_at_the_budget():
    _, chosen = example()
    assert [closeup.name for closeup, _ in affordable(chosen)] == [closeup.name for closeup in chosen]
    ((first, cards),) = affordable(chosen, budget=1)
    assert first is chosen[0]
    assert [title for title, *_ in cards] == ["original", *first.outputs]


# ---- the page ---------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_escaped():
    evaluation, chosen = example()
    text = eval_page([evaluation], chosen)
    page = Reader(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert all(attrs["src"].startswith("data:image/webp;base64,") for tag, attrs in page.tags if tag == "img")
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert all(attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    names = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(names) == len(set(names))
    assert "TAEF2 <i>" not in text
    assert "two &lt;&amp;&gt;.png" in text
    assert len(text) < 6_000_000


def test_page_says_what_the_figures_are():
    evaluation, chosen = example()
    words = " ".join(Reader(eval_page([evaluation], chosen)).words)
    for metric in METRICS[:2]:
        assert metric.label in words
        assert metric.details in words
        assert metric.interval in words
    assert "LPIPS (VGG): absent, needs the package lpips: pip install lpips." in words
    assert "1 unusable picture left out." in words
    for said in ("28.80", "28.30 to 29.30", "+4.80", "+4.50 to +5.10", evaluation.command, "a processor"):
        assert said in words, said
    for limit in ("hold for these pictures at this size", "No metric is what people see", "Times depend on"):
        assert limit in words, limit


def test_an_absent_metric_has_neither_column_nor_plot():
    evaluation, _ = example()
    assert not any("LPIPS" in words for words in tables.head(evaluation))
    assert len(tables.head(evaluation)) == len(tables.rows(evaluation)[0])
    page = Reader(eval_page([evaluation], []))
    assert not any("LPIPS" in attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")


def test_plots_appear_only_where_there_is_something_to_plot():
    evaluation, _ = example()
    plots = [attrs["aria-label"] for tag, attrs in Reader(eval_page([evaluation], [])).tags if tag == "svg"]
    for axis in ("decode time", "steps", "bits a pixel"):
        assert sum(f"against {axis}" in label for label in plots) == 2, axis
    evaluation.systems = evaluation.systems[:1]
    assert "<svg" not in eval_page([evaluation], [])
    evaluation.systems[0].speed = []
    assert "Speed was not measured." in eval_page([evaluation], [])


def test_several_sizes_stand_side_by_side():
    small, large = example_evaluation(), dataclasses.replace(example_evaluation(), size=128, short_side=128)
    for result in large.systems:
        result.figures["psnr"].value += 1
    small.short_side = 128
    joined = tables.side_by_side([small, large])
    assert [row[0][0] for row in tables.rows(joined)][:3] == [
        "default at 64²",
        "default at 128²",
        "default, 4 steps at 64²",
    ]
    assert [row[2][0] for row in tables.rows(joined)][:2] == ["24.00", "25.00"]
    assert tables.side_by_side([small]) is small
    assert len(tables.footnotes([small, large])) == len(tables.footnotes([small]))
    large.metrics[0].details = "others"
    assert [note[:10] for note in tables.footnotes([small, large])] == ["At 64²: PS", "At 128²: P", "FD-EffLite"]
    text = eval_page([small, large], [])
    words = " ".join(Reader(text).words)
    for said in ("at 64², 128²", "default at 64²", "Differences to default at 64²", "Differences to default at 128²",
                 "short side resized to 128", "centre 64 × 64 and 128 × 128"):  # fmt: skip
        assert said in words, said
    assert text.count("<td class=best>33.00") == 1, "the best at 64²"
    assert text.count("<td class=best>34.00") == 1, "the best at 128²"


def test_channels_have_a_table_of_their_own():
    evaluation = example_evaluation()
    evaluation.metrics.append(
        MetricInfo(key="mean_error", label="mean error", better="lower", kind="channels", details="", interval="")
    )
    for result in evaluation.systems:
        result.figures["mean_error"] = Estimate(value=0.02, low=0.01, high=0.03)
        result.channels["mean_error"] = {
            name: Channel(
                mean=Estimate(value=sign * 0.02, low=sign * 0.02 - 0.01, high=sign * 0.02 + 0.01), pictures=[]
            )
            for name, sign in (("red", -1), ("green", 1), ("blue", 0))
        }
    words = Reader(eval_page([evaluation], [])).words
    start = words.index("By channel: mean error")
    assert [word for word in words[start + 1 :] if word.strip()][:7] == [
        "system", "red", "green", "blue", "default", "−0.020", "−0.030 to −0.010",
    ]  # fmt: skip


def test_random_weights_are_in_no_plot_of_quality():
    evaluation, _ = example()
    evaluation.systems[2].weights = "random"
    plots = [attrs["aria-label"] for tag, attrs in Reader(eval_page([evaluation], [])).tags if tag == "svg"]
    assert plots
    assert not any("TAEF2" in label for label in plots)


def test_bench_page():
    text = bench_page(example_bench())
    page = Reader(text)
    words = " ".join(page.words)
    for said in ("256 × 256", "512 × 512", "XS/4", "AutoencoderKL", "133×", "monobath bench --cpu", "a processor"):
        assert said in words, said
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert words.count("other networks") == 2, "the key of each size"
    assert "codecs" not in words, "a key names only what is there"
    assert not re.search(r"https?://|url\((?!#)", text)
