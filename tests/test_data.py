"""Laws of the data layer: order and crops depend on (seed, sample count) alone; no file stops a run."""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from monobath.data import (
    Crops,
    PhotoDataset,
    SeededSampler,
    StreamDataset,
    find_samples,
    iterate_eval,
    make_dataset,
    make_loader,
)
from monobath.data.resident import ResidentPictures
from monobath.data.sources import remote_urls
from monobath.data.transforms import (
    center_crop,
    crop_resized,
    cut,
    draw_place,
    resized_size,
    sample_generator,
    shrink,
)
from monobath.errors import UserError


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


SIZES = [(40, 30), (30, 50), (33, 33), (64, 20), (20, 61), (45, 44), (37, 29)]


def fill(folder, *, count=7, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        picture(*SIZES[index % len(SIZES)], seed=index).save(folder / f"p{index:02d}.png")
        (folder / f"p{index:02d}.cls").write_text(f"{index % 3}\n")
    return folder


def shard(path, folder):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return path


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "photos")


def batches(dataset, number, **options):
    return list(islice(make_loader(dataset, **options), number))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]


# --- finding --------------------------------------------------------------------------------------


def test_folder_is_searched_recursively_in_order(tmp_path):
    for name in ["b/z.JPG", "b/a.jpeg", "a.webp", ".hidden.png", ".git/x.png", "b/deep/c.Tiff", "notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    names = [sample.name for sample in find_samples(tmp_path)]
    assert names == ["a.webp", "b/a.jpeg", "b/deep/c.Tiff", "b/z.JPG"]


def test_shards_hold_what_the_folder_holds(tmp_path, folder):
    more = fill(tmp_path / "more", count=3, start=7)
    shard(tmp_path / "s-000000.tar", folder)
    shard(tmp_path / "s-000001.tar", more)

    def content(source):
        return [(sample.name, sample.read(), sample.label) for sample in find_samples(source, labels=True)]

    expected = content([folder, str(more)])
    assert len(expected) == 10
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in tmp_path.glob("*.tar"):
        shutil.copy(path, shards)
    for source in (
        tmp_path / "s-{000000..000001}.tar",
        tmp_path / "s-*.tar",
        shards,
        [folder, tmp_path / "s-000001.tar"],
    ):
        assert content(source) == expected, source
    assert content(pickle.loads(pickle.dumps([folder, more]))) == expected


def test_threads_read_one_shard_at_once(tmp_path, folder):
    samples = find_samples(shard(tmp_path / "a.tar", folder))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda sample: sample.read(), samples * 20))
    assert found == [(folder / sample.name).read_bytes() for sample in samples] * 20


def test_one_sample_a_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in [
            "./x/1.seg.png",
            "./x/1.JPG",
            "./x/1.json",
            "2.left.png",
            "._3.jpg",
            "4.txt",
            "v1.2/5.jpg",
        ]:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert [sample.name for sample in find_samples(tmp_path / "a.tar")] == [
        "x/1.JPG",
        "2.left.png",
        "v1.2/5.jpg",
    ]


def test_labels_of_sub_folders(tmp_path):
    for name in ["dog/1.png", "cat/1.png", "cat/sub/2.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 20).save(tmp_path / name)
    dataset = PhotoDataset(tmp_path, Crops(size=16), labels=True)
    assert [(s.name, s.label) for s in dataset.samples] == [
        ("cat/1.png", 0),
        ("cat/sub/2.png", 0),
        ("dog/1.png", 1),
    ]
    picture(20, 20).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"has no label: put an integer into a \.cls file"):
        PhotoDataset(tmp_path, Crops(size=16), labels=True)


def test_a_label_that_is_no_integer_is_named(folder):
    (folder / "p02.cls").write_text("dog")
    with pytest.raises(UserError, match=r"p02\.cls is b'dog'"):
        find_samples(folder, labels=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", r"none does not exist: give an image folder"),
        ("none-*.tar", r"nothing matches .*none-\*\.tar"),
        ("none-{0..1}.tar", r"none-0\.tar does not exist"),
        ("none-{0..1.tar", r"unbalanced braces"),
        ("empty", r"no pictures found in .*empty: expected files ending in"),
        ("empty.tar", r"no pictures found in .*empty\.tar"),
        ("text.tar", r"text\.tar cannot be read as a plain tar shard"),
        ("text.txt", r"text\.txt is neither a folder, a picture nor a \.tar shard"),
    ],
)
def test_what_cannot_be_found_is_named(source, message, tmp_path):
    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "empty.tar", "w").close()
    for name in ("text.tar", "text.txt"):
        (tmp_path / name).write_text("nothing of the kind" * 100)
    with pytest.raises(UserError, match=message):
        PhotoDataset(tmp_path / source, Crops(size=16))


def test_mixed_and_missing_sources():
    with pytest.raises(UserError, match="give either URLs or local paths"):
        make_dataset(["https://a/b.tar", "photos"], Crops(size=16))
    with pytest.raises(UserError, match="no data given"):
        make_dataset([], Crops(size=16))
    assert remote_urls("s3://b/x-{0..1}.tar") == [f"pipe:aws s3 cp s3://b/x-{i}.tar -" for i in (0, 1)]
    assert remote_urls(["file:///a.tar", "file:b.tar"]) == ["/a.tar", "b.tar"]


# --- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (128, 40), (9, 12)])
def test_one_step_crop_equals_resize_then_crop(size):
    image = picture(*size)
    short = 36
    width, height = resized_size(*size, short)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    for left, top in [(0, 0), (width - 24, height - 24), ((width - 24) // 2, (height - 24) // 3)]:
        crop = np.asarray(crop_resized(image, short=short, size=24, left=left, top=top))
        assert np.abs(crop - whole[top : top + 24, left : left + 24]).max() <= 2


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (33, 33), (20, 20), (97, 20)])
def test_evaluation_view_is_torchvisions(size):
    image = picture(*size)
    resize = v2.Resize(24, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(24)(resize(image)))
    result = center_crop(image, size=24)
    assert result.shape == (3, 24, 24)
    assert (result.int() - expected.int()).abs().max() <= 2


def test_random_scale_covers_its_range_and_no_more(monkeypatch):
    seen = []

    def spy(image, *, short, size, left, top):
        seen.append(short)
        return crop_resized(image, short=short, size=size, left=left, top=top)

    monkeypatch.setattr("monobath.data.transforms.crop_resized", spy)
    image = picture(30, 60)
    for index in range(200):
        generator = sample_generator(seed=0, epoch=0, index=index)
        crop = random_crop(image, size=16, scale=(16, 20), flip=True, generator=generator)
        assert crop.shape == (3, 16, 16)
    assert set(seen) == {16, 17, 18, 19, 20}


def random_crop(image, *, size, **drawn):
    return cut(image, draw_place(*image.size, size=size, **drawn), size)


def test_flips_are_mirrored_crops_half_of_the_time():
    image = picture(30, 60)
    flipped = 0
    for index in range(200):
        crops = [
            random_crop(
                image,
                size=16,
                scale=(16, 20),
                flip=flip,
                generator=sample_generator(seed=0, epoch=0, index=index),
            )
            for flip in (False, True)
        ]
        mirrored = torch.equal(crops[0].flip(-1), crops[1])
        assert mirrored or torch.equal(*crops)
        flipped += mirrored
    assert 70 < flipped < 130


@pytest.mark.parametrize("size", [(1, 1), (5_000, 8), (3, 700)])
def test_extreme_pictures_are_cropped(size, tmp_path):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a.png")
    for augment in (True, False):
        item = PhotoDataset(tmp_path, Crops(size=24, augment=augment, min_side=1))[0]
        assert item["image"].shape == (3, 24, 24)
        assert item["image"].float().mean((1, 2)).tolist() == [10, 20, 30]


def test_settings_that_contradict_each_other(folder):
    with pytest.raises(UserError, match=r"scale=\(8, 20\) does not fit size=16"):
        PhotoDataset(folder, Crops(size=16, scale=(8, 20)))
    with pytest.raises(UserError, match="has no effect with augment=False"):
        PhotoDataset(folder, Crops(size=16, scale=(16, 20), augment=False))
    with pytest.raises(UserError, match="augment=False"):
        make_loader(PhotoDataset(folder, Crops(size=16, augment=False)), batch_size=2)
    with pytest.raises(UserError, match="augment=False"):
        next(iterate_eval(PhotoDataset(folder, Crops(size=16)), batch_size=2))
    with pytest.raises(UserError, match="rank=2"):
        SeededSampler(4, batch_size=2, rank=2, world_size=2)


def test_crops_depend_on_seed_epoch_and_index(folder):
    dataset = PhotoDataset(folder, Crops(size=16, scale=(16, 28)))
    again = PhotoDataset(folder, Crops(size=16, scale=(16, 28)))
    assert torch.equal(dataset[3]["image"], again[0, 3]["image"])
    assert not torch.equal(dataset[0, 3]["image"], dataset[1, 3]["image"])
    assert not torch.equal(
        dataset[3]["image"], PhotoDataset(folder, Crops(size=16, scale=(16, 28), seed=1))[3]["image"]
    )
    assert dataset[3]["image"].dtype == torch.uint8


# --- order ----------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch():
    pairs = [pair for batch in islice(SeededSampler(7, batch_size=3, seed=5), 14) for pair in batch]
    assert [epoch for epoch, _ in pairs] == [epoch for epoch in range(6) for _ in range(7)]
    orders = [tuple(index for _, index in pairs[start : start + 7]) for start in range(0, 42, 7)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) > 1


@pytest.mark.parametrize("seen", [0, 4, 10, 1_000_003])
def test_sampler_resumes_at_any_sample(seen):
    flat = [pair for batch in islice(SeededSampler(7, batch_size=1), 40) for pair in batch]
    resumed = [pair for batch in islice(SeededSampler(7, batch_size=4, start_sample=seen), 5) for pair in batch]
    if seen < 20:
        assert resumed == flat[seen : seen + 20]
    assert resumed[0][0] == seen // 7


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_batches_are_the_uninterrupted_ones(folder, workers):
    options = {"batch_size": 4, "num_workers": workers}

    def dataset():
        return PhotoDataset(folder, Crops(size=16, scale=(16, 28), seed=3), labels=True)

    whole = batches(dataset(), 6, batch_size=4)
    assert whole[0]["image"].shape == (4, 3, 16, 16)
    assert whole[0].keys() == {"image", "index", "label"}
    assert_same(batches(dataset(), 6, **options), whole)
    assert_same(batches(dataset(), 3, start_sample=12, **options), whole[3:])


def test_two_ranks_are_one_with_twice_the_batch(folder):
    dataset = PhotoDataset(folder, Crops(size=16, scale=(16, 28)))
    whole = batches(dataset, 5, batch_size=4, start_sample=3)
    ranks = [batches(dataset, 5, batch_size=2, start_sample=3, rank=r, world_size=2) for r in (0, 1)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
    assert_same(joined, whole)


def test_loader_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(PhotoDataset(folder, Crops(size=16)), 2, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_changes_nothing_without_downscaling(folder, workers):
    plain = batches(PhotoDataset(folder, Crops(size=16, scale=(16, 64))), 5, batch_size=4)
    dataset = PhotoDataset(folder, Crops(size=16, scale=(16, 64)), cache=True)
    assert_same(batches(dataset, 5, batch_size=4, num_workers=workers), plain)
    shutil.rmtree(folder)  # everything is in memory now
    assert_same(batches(dataset, 5, batch_size=4), plain)


def test_cache_holds_pictures_no_larger_than_needed(folder):
    dataset = PhotoDataset(folder, Crops(size=16, scale=(16, 24)), cache=True)
    dataset.preload(threads=2)
    assert [min(pixels.shape[:2]) for pixels in dataset._pictures] == [24, 24, 24, 20, 20, 24, 24]
    plain = PhotoDataset(folder, Crops(size=16, scale=(16, 24)))
    for index, sample in enumerate(plain.samples):
        expected = random_crop(
            shrink(Image.open(sample.path), short=24),
            size=16,
            scale=(16, 24),
            flip=True,
            generator=sample_generator(seed=0, epoch=0, index=index),
        )
        assert torch.equal(dataset[index]["image"], expected)
    for index in (3, 4):  # short side 20: nothing to shrink
        assert torch.equal(dataset[index]["image"], plain[index]["image"])
    with pytest.raises(UserError, match="needs cache=True"):
        plain.preload()


def test_cached_evaluation_view_is_the_same(folder):
    plain, cached = (PhotoDataset(folder, Crops(size=16, augment=False), cache=cache) for cache in (False, True))
    for _ in range(2):
        for a, b in zip(plain, cached, strict=True):
            assert (a["image"].int() - b["image"].int()).abs().max() <= 2


# --- faults ---------------------------------------------------------------------------------------


def spoil(folder):
    """One file of each fault; the good ones are p03…p06."""
    for name in ("p00", "p01", "p02"):
        (folder / f"{name}.png").unlink()
    (folder / "p00.jpg").write_bytes(b"not a picture")
    (folder / "p01.jpg").touch()
    Image.new("RGB", (15, 200)).save(folder / "p02.png")
    data = io.BytesIO()
    picture(80, 60).save(data, "JPEG")
    (folder / "p07.jpg").write_bytes(data.getvalue()[:900])
    Image.new("RGB", (100, 101)).save(folder / "p08.png")
    return {"p00.jpg": "unreadable", "p01.jpg": "unreadable", "p02.png": "tiny", "p07.jpg": "unreadable"} | {
        "p08.png": "too large"
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_bad_files_are_named_counted_and_replaced(folder, workers, cache, caplog):
    reasons = spoil(folder)
    dataset = PhotoDataset(folder, Crops(size=16, max_pixels=10_000), cache=cache)
    result = batches(dataset, 6, batch_size=6, num_workers=workers)
    assert all(len(batch["image"]) == 6 for batch in result)
    assert {int(index) for batch in result for index in batch["index"]} == {3, 4, 5, 6}
    assert dataset.skipped == {str(folder / name): reason for name, reason in reasons.items()}
    assert dataset.skipped_count == 5
    assert dataset[0]["index"] == 3
    assert dataset[8]["index"] == 3
    if workers == 0 or cache:
        for name in reasons:
            assert sum(name in record.getMessage() for record in caplog.records) == 1
    again = PhotoDataset(folder, Crops(size=16, max_pixels=10_000), cache=cache)
    assert_same(batches(again, 6, batch_size=6), result)


@pytest.mark.parametrize("workers", [0, 2])
def test_only_bad_files_is_an_error(tmp_path, workers):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_text("text")
    dataset = PhotoDataset(tmp_path, Crops(size=16))
    with pytest.raises(UserError, match="none of the 3 pictures of"):
        next(iter(make_loader(dataset, batch_size=2, num_workers=workers)))
    evaluation = PhotoDataset(tmp_path, Crops(size=16, augment=False))
    with pytest.raises(UserError, match="none of the 3 pictures of"):
        next(iterate_eval(evaluation, batch_size=2, num_workers=workers))
    with pytest.raises(UserError, match="none of the 3 pictures of"):
        PhotoDataset(tmp_path, Crops(size=16), cache=True).preload()


def test_a_shard_cut_short_after_indexing_skips_the_picture(tmp_path, folder):
    path = shard(tmp_path / "a.tar", folder)
    dataset = PhotoDataset(path, Crops(size=16))
    path.write_bytes(path.read_bytes()[: dataset.samples[-1].offset + 10])
    assert dataset[6]["index"] == 0
    assert dataset.skipped == {f"{path}:p06.png": "unreadable"}


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_drops_bad_files_and_keeps_the_order(folder, workers):
    spoil(folder)
    dataset = PhotoDataset(folder, Crops(size=16, augment=False, max_pixels=10_000))
    result = list(iterate_eval(dataset, batch_size=3, num_workers=workers))
    assert [batch["name"] for batch in result] == [["p03.png", "p04.png", "p05.png"], ["p06.png"]]
    assert torch.cat([batch["index"] for batch in result]).tolist() == [3, 4, 5, 6]
    assert result[0]["image"].shape == (3, 3, 16, 16)
    assert dataset.skipped_count == 5
    limited = list(iterate_eval(dataset, batch_size=3, num_workers=workers, limit=2))
    assert [batch["name"] for batch in limited] == [["p03.png", "p04.png"]]


# --- streams --------------------------------------------------------------------------------------


@pytest.fixture
def urls(tmp_path, folder):
    shard(tmp_path / "s-0.tar", folder)
    shard(tmp_path / "s-1.tar", fill(tmp_path / "more", count=5, start=7))
    return f"pipe:cat {tmp_path}/s-{{0..1}}.tar"


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # small machines
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_stream_sees_every_sample_once_an_epoch(urls, workers):
    dataset = make_dataset(urls, Crops(size=16, scale=(16, 28)), labels=True)
    assert isinstance(dataset, StreamDataset)
    loader = make_loader(dataset, batch_size=1, num_workers=workers)
    seen = list(islice(loader, 24 if workers == 0 else 60))
    assert seen[0]["image"].shape == (1, 3, 16, 16)
    indices = [int(batch["index"]) for batch in seen]
    assert len(set(indices)) == 12
    assert {int(batch["label"]) for batch in seen} == {0, 1, 2}
    if workers == 0:
        assert sorted(indices[:12]) == sorted(indices[12:])
        assert indices[:12] != indices[12:]


def test_stream_evaluates_as_the_shards_do(urls, tmp_path):
    local = PhotoDataset(tmp_path / "s-{0..1}.tar", Crops(size=16, augment=False), labels=True)
    expected = list(iterate_eval(local, batch_size=5))
    for source in (urls, f"file://{tmp_path}/s-{{0..1}}.tar"):
        remote = make_dataset(source, Crops(size=16, augment=False), labels=True)
        result = list(iterate_eval(remote, batch_size=5))
        for batch in (*result, *expected):
            batch.pop("index", None)
        assert_same(result, expected)


def test_stream_is_seeded_and_split_by_rank(urls):
    def indices(seed=0, **place):
        dataset = StreamDataset(urls, Crops(size=16, seed=seed))
        return torch.cat([batch["index"] for batch in batches(dataset, 6, batch_size=2, **place)]).tolist()

    assert indices() == indices()
    assert indices() != indices(seed=1)
    assert indices() != indices(start_sample=12)
    one, two = (indices(rank=rank, world_size=2) for rank in (0, 1))
    assert len({*one, *two}) == 12
    assert not {*one[:5]} & {*two[:5]}  # the first epoch: a shard (of 7, of 5) each


def test_stream_skips_bad_samples_and_shards(tmp_path, folder, caplog):
    caplog.set_level(logging.WARNING)
    spoil(folder)
    path = shard(tmp_path / "s.tar", folder)
    source = [f"pipe:cat {path}", f"pipe:cat {tmp_path}/none.tar 2>/dev/null"]
    dataset = StreamDataset(source, Crops(size=16, max_pixels=10_000))
    indices = torch.cat([batch["index"] for batch in batches(dataset, 4, batch_size=3)])
    assert len(indices.unique()) == 4
    assert dataset.skipped_count == len(dataset.skipped) == 6
    assert sorted(dataset.skipped.values()) == ["tiny", "too large"] + ["unreadable"] * 4
    assert sum("p00" in record.getMessage() for record in caplog.records) == 1
    assert any("none.tar" in record.getMessage() for record in caplog.records)


def test_stream_without_pictures_is_an_error(tmp_path):
    source = f"pipe:cat {tmp_path}/none.tar 2>/dev/null"
    with pytest.raises(UserError, match="no usable picture found in pipe:cat"):
        batches(StreamDataset(source, Crops(size=16)), 1, batch_size=1)
    with pytest.raises(UserError, match="no usable picture found in pipe:cat"):
        next(iterate_eval(StreamDataset(source, Crops(size=16, augment=False)), batch_size=1))
    with pytest.raises(UserError, match="cache=True cannot be used"):
        make_dataset(source, Crops(size=16), cache=True)


@pytest.mark.parametrize("scale", [(16, 16), (16, 40), (48, 70)])
def test_crops_on_the_device_are_those_of_the_dataset(folder, scale):
    dataset = PhotoDataset(folder, Crops(size=16, scale=scale, seed=3), cache=True)
    dataset.preload()
    keys = [(epoch, index) for epoch in range(12) for index in range(len(dataset))]
    expected = torch.stack([dataset[key]["image"] for key in keys]).float()
    resident = ResidentPictures(dataset, "cpu")
    items = [dataset[key] for key in keys]
    assert all("image" not in item for item in items)
    found = resident.crops(torch.stack([item["place"] for item in items]))
    assert found.dtype == torch.uint8
    # Pillow rounds between both directions, and holds boxes in float32.
    assert (found.float() - expected).abs().max() <= 3
    assert (found.float() - expected).abs().mean() < 0.3
