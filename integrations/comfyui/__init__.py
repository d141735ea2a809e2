"""The folder for ComfyUI's `custom_nodes`: the nodes are in the package, `monobath.integrations.comfyui`."""

from monobath.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
