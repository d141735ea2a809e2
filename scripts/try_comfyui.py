"""monobath's nodes in a real ComfyUI; see try_comfyui.sh. Every picture is compared with what `Tokenizer` gives.

ComfyUI is started from CHECKOUT with a base directory of its own, in which `custom_nodes/monobath` is
`integrations/comfyui/`. It saves pictures by cutting values down to whole ones, so that 1/255 of difference is none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from monobath import Tokenizer, resources
from monobath.autoencoders import as_encoder, read_taesd
from monobath.config import TokenizerConfig
from monobath.decoders.taef2 import Taef2Decoder

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"small": (300, 412), "large": (2048, 2048)}


class ComfyUI:
    """A server, started and stopped here."""

    def __init__(self, checkout: Path, base: Path) -> None:
        for name in ("custom_nodes", "input", "output", "models/vae_approx", "models/monobath"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "monobath").symlink_to(ROOT / "integrations" / "comfyui")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base, self.log = base, base / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(base), "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        self.checkout = checkout

    def __enter__(self) -> ComfyUI:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.checkout, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise SystemExit(f"ComfyUI did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def __exit__(self, *error: object) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.loads(reply.read())

    def run(self, nodes: dict[str, tuple[str, dict[str, Any]]], client: str = "") -> dict[str, Any]:
        """The history of a workflow: names of nodes → (class, inputs), where [name, n] is another node's output."""
        prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
        number = self.get("/prompt", {"prompt": prompt} | ({"client_id": client} if client else {}))["prompt_id"]
        for _ in range(1200):
            found = self.get(f"/history/{number}")
            if number in found:
                return found[number]
            time.sleep(0.5)
        raise SystemExit("ComfyUI did not finish a workflow in ten minutes")

    def picture(self, nodes: dict[str, tuple[str, dict[str, Any]]], last: str) -> np.ndarray:
        """What the image output of a node is, saved."""
        save = ("SaveImage", {"images": [last, 0], "filename_prefix": "got"})
        history = self.run({**nodes, "save": save})
        if history["status"]["status_str"] != "success":
            raise SystemExit(f"a workflow failed: {message_of(history)}")
        file = history["outputs"]["save"]["images"][0]["filename"]
        return np.asarray(Image.open(self.base / "output" / file).convert("RGB"))

    def previews(self, nodes: dict[str, tuple[str, dict[str, Any]]]) -> int:
        """How many preview pictures a client of the page is sent while a workflow runs."""
        import asyncio

        import aiohttp

        async def listen() -> int:
            client, count = uuid.uuid4().hex, 0
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"http://127.0.0.1:{self.port}/ws?clientId={client}") as messages,
            ):
                running = asyncio.get_running_loop().run_in_executor(None, self.run, nodes, client)
                while not running.done():
                    try:
                        message = await messages.receive(timeout=1)
                    except TimeoutError:
                        continue
                    count += message.type == aiohttp.WSMsgType.BINARY
            return count

        return asyncio.run(listen())


def message_of(history: dict[str, Any]) -> str:
    """The error that the page shows."""
    errors = [body for kind, body in history["status"]["messages"] if kind == "execution_error"]
    return f"{errors[0]['exception_type']}: {errors[0]['exception_message']}".strip() if errors else "no error"


def photo(size: tuple[int, int]) -> Image.Image:
    """Several packaged photos as one of that height and width."""
    height, width = size
    whole = Image.new("RGB", (width, height))
    tiles = [Image.open(path).convert("RGB") for path in resources.sample_paths()]
    x = y = number = 0
    while y < height:
        whole.paste(tiles[number % len(tiles)], (x, y))
        x, number = x + 256, number + 1
        if x >= width:
            x, y = 0, y + 256
    return whole


def slim_model(folder: str) -> Tokenizer:
    """TAEF2's own decoder as a model of the recipe `flux2-slim`, before its first step."""
    encoder, own = as_encoder(f"taef2={folder}"), read_taesd("taef2", folder, "decoder")
    shape = {"factor": encoder.config.factor, "latent_channels": encoder.config.latent_channels}
    values = {
        "encoder": {"family": "taef2", **shape},
        "decoder": {"kind": "taef2", **shape},
        "sampler": {"noise": "zero"},
        **encoder.published,
    }
    model = Tokenizer(TokenizerConfig.from_dict(values)).eval()
    decoder = model.decoder
    assert isinstance(decoder, Taef2Decoder)
    assert decoder.trunk is not None
    decoder.trunk.layers.load_state_dict(own[:16].state_dict())
    with torch.no_grad():
        decoder.tail.take(own, decoder.read(torch.randn(1, shape["latent_channels"], 8, 8)))
    decoder.conv_out.load_state_dict(own[-1].state_dict())
    return model


FAULTS: list[str] = []


def report(what: str, got: np.ndarray, expected: np.ndarray, limit: int = 1) -> None:
    same = got.shape == expected.shape
    worst = int(np.abs(got.astype(int) - expected.astype(int)).max()) if same else 255
    sys.stdout.write(f"{what}: {got.shape[0]}×{got.shape[1]}, largest difference {worst}/255\n")
    if worst > limit:
        FAULTS.append(what)


def expect(what: str, true: bool, found: object) -> None:
    sys.stdout.write(f"{what}: {found}\n")
    if not true:
        FAULTS.append(what)


def own_nodes(comfy: ComfyUI) -> None:
    """Encode and decode with a packaged model, through our nodes and ComfyUI's own."""
    tokenizer = Tokenizer.from_pretrained("default")
    load = {"vae": ("MonobathLoad", {"model": "default", "dtype": "float32"})}
    for name, size in SIZES.items():
        picture = photo(size)
        picture.save(comfy.base / "input" / f"{name}.png")
        tile = 512 if name == "large" else 0
        z = tokenizer.encode(picture, tile=tile or None).mode()
        expected = tokenizer.decode(z, size=size, tile=tile or None, output="pil")[0]
        nodes = {
            **load,
            "photo": ("LoadImage", {"image": f"{name}.png"}),
            "z": ("MonobathEncode", {"pixels": ["photo", 0], "vae": ["vae", 0], "tile": tile}),
        }
        ours = ("MonobathDecode", {"samples": ["z", 0], "vae": ["vae", 0], "tile": tile, "steps": 0, "seed": 0})
        report(f"our nodes, {name}", comfy.picture({**nodes, "x": ours}, "x"), np.asarray(expected))
        theirs = ("VAEDecode", {"samples": ["z", 0], "vae": ["vae", 0]})
        if tile:
            options = {"tile_size": tile, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
            theirs = ("VAEDecodeTiled", theirs[1] | options)
        elif name == "small":
            nodes["z"] = ("VAEEncode", {"pixels": ["photo", 0], "vae": ["vae", 0]})
        got = comfy.picture({**nodes, "x": theirs}, "x")[: size[0], : size[1]]
        report(f"ComfyUI's own nodes, {name}", got, np.asarray(expected), limit=1 if not tile else 3)

    stages = Tokenizer.from_pretrained("progressive")
    z = stages.encode(photo(SIZES["small"])).mode()
    expected = stages.decode(z, size=SIZES["small"], output="pil")[0]
    nodes = {
        "vae": ("MonobathLoad", {"model": "progressive", "dtype": "float32"}),
        "photo": ("LoadImage", {"image": "small.png"}),
        "z": ("MonobathEncode", {"pixels": ["photo", 0], "vae": ["vae", 0], "tile": 0}),
        "x": ("MonobathDecodeProgressive", {"samples": ["z", 0], "vae": ["vae", 0], "tile": 0, "steps": 0, "seed": 0}),
    }
    report("coarse to fine", comfy.picture(nodes, "x"), np.asarray(expected))
    nodes["z"][1]["tile"] = 256  # or else nothing would be left to run
    count = comfy.previews({**nodes, "save": ("SaveImage", {"images": ["x", 0], "filename_prefix": "got"})})
    expect("previews on the page", count >= stages.decoder.stages, count)

    empty = ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1})
    for kind in ("MonobathDecode", "VAEDecode"):
        inputs = {"samples": ["z", 0], "vae": ["vae", 0]}
        more = {"tile": 0, "steps": 0, "seed": 0} if kind == "MonobathDecode" else {}
        save = ("SaveImage", {"images": ["x", 0], "filename_prefix": "got"})
        said = message_of(comfy.run({**load, "z": empty, "x": (kind, inputs | more), "save": save}))
        channels = tokenizer.config.encoder.latent_channels
        named = "4 channels" in said and f"{channels} channels" in said and "\n" not in said
        expect(f"other latents in {kind}", named, said)


def exported(comfy: ComfyUI, folder: str) -> None:
    """A model of FLUX.2's latents as a VAE of ours, and exported for ComfyUI's own loader."""
    model = slim_model(folder)
    model.save_pretrained(comfy.base / "models" / "monobath" / "slim")
    command = [sys.executable, "-m", "monobath", "export", str(comfy.base / "models/monobath/slim"), "--for", "comfyui"]
    subprocess.run([*command, "--out", str(comfy.base / "models" / "vae_approx")], check=True)
    shutil.copy(Path(folder) / "taef2_encoder.safetensors", comfy.base / "models" / "vae_approx")
    size = (320, 448)
    photo(size).save(comfy.base / "input" / "flux2.png")
    nodes = {
        "taef2": ("VAELoader", {"vae_name": "taef2"}),
        "photo": ("LoadImage", {"image": "flux2.png"}),
        "z": ("VAEEncode", {"pixels": ["photo", 0], "vae": ["taef2", 0]}),
    }
    comfy.run({**nodes, "save": ("SaveLatent", {"samples": ["z", 0], "filename_prefix": "z"})})
    held = load_file(next((comfy.base / "output").glob("z*.latent")))["latent_tensor"]
    packing = model.config.packing
    assert packing is not None
    expected = np.asarray(model.decode(packing.unpack(held), output="pil")[0])
    theirs = ("VAEDecode", {"samples": ["z", 0], "vae": ["taef2", 0]})
    report("the exported file in Load VAE", comfy.picture({**nodes, "x": theirs}, "x"), expected)
    nodes["vae"] = ("MonobathLoad", {"model": "slim/model.safetensors", "dtype": "float32"})
    ours = ("MonobathDecode", {"samples": ["z", 0], "vae": ["vae", 0], "tile": 0, "steps": 0, "seed": 0})
    report("the model in our loader", comfy.picture({**nodes, "x": ours}, "x"), expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a ComfyUI checkout, whose requirements this Python has")
    parser.add_argument("--taef2", help="folder with taef2_encoder.safetensors and taef2_decoder.safetensors")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as base, ComfyUI(given.checkout.resolve(), Path(base)) as comfy:
        version = comfy.get("/system_stats")["system"]["comfyui_version"]
        sys.stdout.write(f"ComfyUI {version}\n")
        own_nodes(comfy)
        if given.taef2:
            exported(comfy, given.taef2)
    sys.stdout.write("".join(f"FAILED: {what}\n" for what in FAULTS) or "all as expected\n")
    return 1 if FAULTS else 0


if __name__ == "__main__":
    sys.exit(main())
