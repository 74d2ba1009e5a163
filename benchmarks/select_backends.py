"""Select the ops that run in CUDA C++ rather than Triton, from the results of one GPU.

`python -m benchmarks.select_backends benchmarks/results/DEVICE` enters the GPU's architecture in
mvar_kernels/measured.json: each pass of an op in which the CUDA kernel was faster in every case that both ran. To be
committed together with the results.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.environment import argument_parser
from mvar.utils.files import atomic_write
from mvar_kernels.dispatch import MEASURED
from mvar_kernels.testing.registry import SPECS


def faster_in_cuda(rows: list[dict[str, Any]]) -> list[str]:
    """The passes of an op in which its CUDA kernel won every case that Triton's ran as well."""
    pairs = [(row["pass"], row["median_ms"].get("mvar cuda"), row["median_ms"].get("mvar triton")) for row in rows]
    timed = [(one_pass, cuda < triton) for one_pass, cuda, triton in pairs if cuda is not None and triton is not None]
    return [p for p in ("forward", "backward") if p in dict(timed) and all(won for q, won in timed if q == p)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("results", type=Path, help="folder of one GPU's results")
    options = parser.parse_args()
    files = {op: json.loads(path.read_text()) for op in SPECS if (path := options.results / f"{op}.json").exists()}
    architectures = {str(stored["machine"].get("architecture")) for stored in files.values()}
    architecture = architectures.pop() if len(architectures) == 1 else ""
    if not architecture.startswith("sm_"):
        parser.error(f"{options.results}: expected the op results of one GPU")
    found = {op: faster_in_cuda(stored["rows"]) for op, stored in files.items()}
    table = json.loads(MEASURED.read_text()) | {architecture: {op: passes for op, passes in found.items() if passes}}
    with atomic_write(MEASURED) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{architecture}: {table[architecture] or 'Triton throughout'}")


if __name__ == "__main__":
    main()
