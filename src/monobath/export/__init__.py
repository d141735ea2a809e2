"""The one-step decoder for other runtimes and programs. No tensor library is imported here."""

from typing import Literal

Engine = Literal[
    "torch", "compile", "torch-export", "aotinductor", "onnxruntime", "openvino", "openvino-bf16", "openvino-int8"
]
"""torch: the folded decoder, eager. openvino-int8: int8 weights and activations, calibrated on latents."""

FILES: dict[str, str] = {
    "torch-export": "decoder.pt2",
    "aotinductor": "decoder-aotinductor.pt2",
    "onnxruntime": "decoder.onnx",
    "openvino": "decoder.xml",
    "openvino-bf16": "decoder.xml",
    "openvino-int8": "decoder-int8.xml",
}
"""File of each engine's export. OpenVINO keeps its weights beside it, in a .bin file of the same name."""
