"""`python -m pytest -p tests.avx512_on_avx2`: the C++ kernels in a build that computes AVX-512 instructions with AVX2
(avx512.h).

Their instruction set is "avx512", chosen as on a processor that has it. Slow, and for its results alone.
"""

from tests.native_build import ROOT, build, load

load(build(ROOT / "build" / "avx512-on-avx2", "-DMVAR_AVX512_ON_AVX2=ON"))
