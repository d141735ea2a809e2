#!/bin/sh
# Train a recipe for a release, in one command, on a machine that may have a GPU and no network:
#     scripts/train_release.sh RECIPE PHOTOS OUT [arguments of scripts/release.py train …]
# Needs a python3 (or $PYTHON) with PyTorch, torchvision and accelerate. If $LUGGAGE/wheels exists (what
# `scripts/release.py luggage --out luggage` gathered; default: luggage), packages are taken from there, into OUT/.packages.
set -eu
[ $# -ge 3 ] || { echo "usage: scripts/train_release.sh RECIPE PHOTOS OUT [--minutes 9 …]" >&2; exit 2; }
recipe=$1 photos=$2 out=$3
shift 3
python=${PYTHON:-python3}
wheels=${LUGGAGE:-luggage}/wheels
mkdir -p "$out"
if [ -d "$wheels" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
        --find-links "$wheels" --target "$out/.packages" "$wheels"/*
fi
PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)/src:$(cd "$out" && pwd)/.packages${PYTHONPATH:+:$PYTHONPATH}" \
    exec "$python" "$(dirname "$0")/release.py" train "$recipe" --data "$photos" --out "$out" "$@"
