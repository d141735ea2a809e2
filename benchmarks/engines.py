"""What each engine costs in quality: the same model, pictures and protocol as `monobath eval`, decoded by each engine.

    python benchmarks/engines.py --data HELD-OUT.tar [--model default] [--engines torch openvino openvino-int8 …]

int8 takes its ranges from the latents of the packaged sample photos. Speed: `monobath bench --cpu --model default
--engine …`. With --size unequal to a multiple of 64 the exported graphs meet sizes that they were not traced with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from command import exit_code

from monobath.evaluation import tables
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.system import TokenizerSystem
from monobath.export.engines import Engine
from monobath.export.running import on_engine
from monobath.files import write_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of held-out photos")
    parser.add_argument("--model", default="default", help="packaged name or folder")
    parser.add_argument("--engines", nargs="+", choices=get_args(Engine), default=["openvino-bf16", "openvino-int8"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()

    systems = [TokenizerSystem(args.model)]
    for engine in args.engines:
        system = TokenizerSystem(args.model)
        system.tokenizer = on_engine(system.tokenizer, args.model, engine)
        system.name = f"{args.model}, {engine}"
        systems.append(system)
    found, _ = evaluate(systems, args.data, Settings(size=args.size, limit=args.limit, keep=1))
    lines = [tables.head(found)[:-2]]
    lines += [[" ".join(filter(None, cell)) for cell in row[:-2]] for row in tables.rows(found)]
    lines += [["difference to the first", "", *tables.head(found)[2:-2]]]
    lines += [[row[0][0], "", *(f"{a} ({b})" for a, b, _ in row[1:])] for row in tables.difference_rows(found)]
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    if args.json:
        write_text(args.json, json.dumps(found.as_dict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
