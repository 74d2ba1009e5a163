"""Which ops run in CUDA C++ rather than in Triton: `python -m benchmarks.prefer benchmarks/results/DEVICE`.

Reads the op results of one device and enters its architecture in mvar_kernels/measured.json: a pass of an op in which
the CUDA kernel was faster in every case that both ran. To be committed together with the results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mvar.files import replacing
from mvar_kernels.dispatch import MEASURED
from mvar_kernels.testing.registry import SPECS


def faster_in_cuda(rows: list[dict[str, Any]]) -> list[str]:
    """The passes of an op in which its CUDA kernel won every case that Triton's ran, too."""
    pairs = [(row["pass"], row["median_ms"].get("mvar cuda"), row["median_ms"].get("mvar triton")) for row in rows]
    timed = [(one_pass, cuda < triton) for one_pass, cuda, triton in pairs if cuda is not None and triton is not None]
    return [p for p in ("forward", "backward") if p in dict(timed) and all(won for q, won in timed if q == p)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of one GPU's results")
    options = parser.parse_args()
    files = {op: json.loads(path.read_text()) for op in SPECS if (path := options.results / f"{op}.json").exists()}
    architectures = {str(stored["machine"].get("architecture")) for stored in files.values()}
    architecture = architectures.pop() if len(architectures) == 1 else ""
    if not architecture.startswith("sm_"):
        parser.error(f"{options.results}: expected the op results of one GPU")
    found = {op: faster_in_cuda(stored["rows"]) for op, stored in files.items()}
    table = json.loads(MEASURED.read_text()) | {architecture: {op: passes for op, passes in found.items() if passes}}
    with replacing(MEASURED) as aside:
        aside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{architecture}: {table[architecture] or 'Triton throughout'}")


if __name__ == "__main__":
    main()
