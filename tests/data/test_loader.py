"""A batch is a function of (seed, step) alone: not of workers, of where a run began, or of processes."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from dalle_cli.data import augment
from dalle_cli.data.loader import READ_AHEAD, Loader, sequential
from dalle_cli.data.skips import BadSample, SkipLog
from dalle_cli.errors import DalleError

SIZE = 8


class ImageSource:
    """Picture i is of color i, with noise that shows the augmentation's draws."""

    def __init__(self, n=23, bad=()):
        self.ids = [f"{i:03d}" for i in range(n)]
        self.skipped = SkipLog()
        self.bad = set(bad)
        self.reads = 0

    def __len__(self):
        return len(self.ids)

    def read(self, i):
        self.reads += 1
        if i in self.bad:
            raise BadSample("unreadable: planted")
        time.sleep(0.001 * (i % 3))  # so that threads finish out of order
        pixels = np.random.default_rng(i).integers(0, 256, (20, 14, 3), dtype=np.uint8)
        pixels[..., 2] = i % 256
        return Image.fromarray(pixels)


def take(loader, n, start=0):
    made = loader.batches(start)
    out = [next(made) for _ in range(n)]
    made.close()
    return out


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.step == y.step
        for name in ("images", "rows", "epochs"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


def loader(pictures=None, workers=0, seed=5, batch_size=6, name="dvae", **options):
    return Loader(pictures or ImageSource(), SIZE, augment.by_name(name), batch_size, seed, workers, **options)


@pytest.mark.parametrize("bad", [(), (0, 7, 8, 22)])
def test_workers_and_resuming_change_nothing(bad):
    expected = take(loader(ImageSource(bad=bad)), 9)
    for workers in (1, 4):
        same(take(loader(ImageSource(bad=bad), workers), 9), expected)
        same(take(loader(ImageSource(bad=bad), workers), 5, start=4), expected[4:])
    same([loader(ImageSource(bad=bad)).batch(7)], expected[7:8])


def test_batches_are_what_they_say():
    for batch in take(loader(workers=2, name="center"), 5):
        assert batch.images.shape == (6, 3, SIZE, SIZE)
        assert batch.images.dtype == np.uint8
        assert batch.images.flags.c_contiguous
        assert batch.rows.dtype == np.int64
        for image, row in zip(batch.images, batch.rows, strict=True):
            np.testing.assert_array_equal(image.transpose(1, 2, 0), augment.center(ImageSource().read(int(row)), SIZE))


def test_each_epoch_has_every_row_once_in_another_order():
    batches = take(loader(batch_size=4), 12)
    rows = np.concatenate([b.rows for b in batches])
    epochs = np.concatenate([b.epochs for b in batches])
    first, second = rows[epochs == 0], rows[epochs == 1]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(23))


def test_seed_epoch_and_row_each_change_the_draws():
    assert (take(loader(seed=1), 1)[0].rows != take(loader(seed=2), 1)[0].rows).any()
    batches = take(loader(ImageSource(1), batch_size=6), 1)[0]
    assert batches.epochs.tolist() == [0, 1, 2, 3, 4, 5]  # a batch larger than the data goes on into later epochs
    assert len({image.tobytes() for image in batches.images}) >= 5
    one = loader(ImageSource(1), batch_size=1, seed=1).batch(0).images
    assert any((one != loader(ImageSource(1), batch_size=1, seed=s).batch(0).images).any() for s in (2, 3, 4))


def test_bad_samples_are_counted_once_and_replaced_by_the_next_row():
    pictures = ImageSource(bad=(3, 11))
    batches = take(loader(pictures, workers=3), 12)  # three epochs
    whole = take(loader(), 12)
    rows = np.concatenate([b.rows for b in batches])
    order = np.concatenate([b.rows for b in whole])
    assert pictures.skipped.entries() == [("003", "unreadable: planted"), ("011", "unreadable: planted")]
    for epoch in range(3):
        there, meant = (x[epoch * 23 : (epoch + 1) * 23].tolist() for x in (rows, order))
        for slot in range(23):
            at = slot
            while meant[at] in (3, 11):
                at = (at + 1) % 23
            assert there[slot] == meant[at]


def test_nothing_readable_ends_in_one_line():
    for workers in (0, 2):
        with pytest.raises(DalleError, match="found none of 5 that can be read"):
            take(loader(ImageSource(5, bad=range(5)), workers), 1)


def test_rows_limit_the_data():
    rows = np.array([2, 3, 5, 7, 11, 13])
    batches = take(loader(workers=2, rows=rows, batch_size=6), 3)
    assert all(sorted(b.rows) == rows.tolist() for b in batches)
    pictures = ImageSource(bad=[5])
    batch = take(loader(pictures, rows=rows, batch_size=6), 1)[0]
    assert set(batch.rows) == {2, 3, 7, 11, 13}


def test_processes_share_what_one_would_read():
    whole = take(loader(batch_size=6), 6)
    parts = [take(loader(batch_size=2, rank=rank, world=3), 6) for rank in range(3)]
    for step in range(6):
        for name in ("images", "rows", "epochs"):
            joined = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole[step], name))


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("dalle-data")]


def test_stops_cleanly_and_reads_only_a_little_ahead():
    pictures = ImageSource(1000)
    made = loader(pictures, workers=4).batches()
    next(made)
    time.sleep(0.1)
    assert pictures.reads <= 6 * (READ_AHEAD + 1)
    assert threads()
    made.close()
    assert not threads()
    made = iter(loader(workers=2))
    next(made)
    with pytest.raises(KeyboardInterrupt):
        made.throw(KeyboardInterrupt)
    assert not threads()


def test_faults_in_threads_come_through():
    pictures = ImageSource()
    pictures.read = lambda i: 1 // 0
    for workers in (0, 3):
        with pytest.raises(ZeroDivisionError):
            take(loader(pictures, workers), 1)
    assert not threads()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_sequential_is_in_order_and_leaves_bad_ones_out(workers):
    pictures = ImageSource(bad=[1, 4, 5, 6, 7])
    rows = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    got = list(sequential(pictures, SIZE, rows, 4, workers))
    assert [kept.tolist() for kept, _ in got] == [[0, 2, 3], [8, 10]]
    for kept, images in got:
        assert images.shape == (len(kept), 3, SIZE, SIZE)
        assert images.flags.c_contiguous
        for row, image in zip(kept, images, strict=True):
            np.testing.assert_array_equal(image.transpose(1, 2, 0), augment.center(ImageSource().read(int(row)), SIZE))
    assert [sample_id for sample_id, _ in pictures.skipped.entries()] == ["001", "004", "005", "006", "007"]
    assert list(sequential(pictures, SIZE, [], 4, workers)) == []
    assert not threads()


def test_sequential_draws_are_a_function_of_seed_row_and_draw():
    def crops(rows=(3, 4, 5), batch_size=2, workers=0, **options):
        crop = augment.by_name("dvae", flip=False)
        parts = list(sequential(ImageSource(), SIZE, list(rows), batch_size, workers, augment=crop, **options))
        return np.concatenate([images for _, images in parts])

    first = crops()
    np.testing.assert_array_equal(crops(batch_size=3, workers=3), first)
    np.testing.assert_array_equal(crops(rows=(5,)), first[2:])
    assert (crops(draw=1) != first).any()
    assert (crops(seed=1) != first).any()
