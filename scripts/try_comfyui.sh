#!/bin/sh
# scripts/try_comfyui.sh CHECKOUT [--taef2 FOLDER]: monobath's nodes in a real ComfyUI, headless, on the CPU.
# PYTHON is one that has ComfyUI's requirements and monobath.
set -eu
here=$(dirname "$0")
"${PYTHON:-python3}" "$here/comfyui_interface.py" "$1"
exec "${PYTHON:-python3}" "$here/try_comfyui.py" "$@"
