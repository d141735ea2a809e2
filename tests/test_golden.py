"""The packaged weights decode to the pictures that they decoded to when the code had another shape (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monobath import Tokenizer, resources

GOLDEN = Path(__file__).parent / "golden" / "decoded"


def same_machine() -> bool:
    made = json.loads((GOLDEN / "made-on.json").read_text(encoding="utf-8"))
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and made["processor"] in cpu.read_text() and made["torch"] == torch.__version__


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.png")))
def test_pictures_are_those_of_before(name):
    photo = Image.open(resources.sample_paths()[0]).convert("RGB").crop((40, 60, 136, 124))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = Tokenizer.from_pretrained(name)
        z = tokenizer.encode(photo).mode()
        found = np.asarray(tokenizer.decode(z, output="pil")[0]).astype(int)
        # The stages of `progressive` are the last picture of its previews, too.
        *_, last = tokenizer.decode_progressive(z, output="pil")
    finally:
        torch.set_num_threads(threads)
    expected = np.asarray(Image.open(GOLDEN / f"{name}.png")).astype(int)
    assert np.abs(found - expected).max() <= (0 if same_machine() else 1)
    if "progressive" in name:
        assert np.array_equal(np.asarray(last[0]), found)
