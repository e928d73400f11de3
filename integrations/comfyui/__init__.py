"""ComfyUI nodes for learned solvers: put this folder into ComfyUI's custom_nodes (docs/comfyui.md)."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
