"""`python -m pytest -p tests.helpers.avx512_on_avx2`: C++ kernels, AVX-512 emulated by AVX2 (avx512.h).

Their instruction set is "avx512", chosen as on a processor that has it. Slow, and for its results alone.
"""

from tests.helpers.native_build import ROOT, build, load

load(build(ROOT / "build" / "avx512-on-avx2", "-DMVAR_AVX512_ON_AVX2=ON"))
