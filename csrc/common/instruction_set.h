// The instruction sets that every csrc/<op>/cpu.cpp is compiled for. Each copy of an op exports one
// table of function pointers, in the namespace of its set:
//     MVAR_DECLARE_TABLE(AdalnKernels, adaln)              in the op's header
//     const AdalnKernels adaln = {...};                    in its cpu.cpp
//     const AdalnKernels* tables[] = MVAR_TABLES(adaln);   where it is called; index: InstructionSet
#pragma once

namespace mvar {

// In the module of CUDA kernels (csrc/cuda_bindings.cpp) a table has one entry, that of csrc/<op>/cuda.cu.
#if defined(MVAR_CUDA_MODULE)

#define MVAR_DECLARE_TABLE(Type, name) \
  namespace cuda { extern const Type name; }
#define MVAR_TABLES(name) {&mvar::cuda::name}
enum InstructionSet { kCuda };

// CMake defines MVAR_X86 where the compiler knows the x86 flags; elsewhere there is only generic.
#elif defined(MVAR_X86)

enum InstructionSet { kGeneric, kAvx2, kAvx512, kInstructionSets };
constexpr const char* kInstructionSetNames[] = {"generic", "avx2", "avx512"};

#define MVAR_DECLARE_TABLE(Type, name)         \
  namespace generic { extern const Type name; } \
  namespace avx2 { extern const Type name; }    \
  namespace avx512 { extern const Type name; }
#define MVAR_TABLES(name) {&mvar::generic::name, &mvar::avx2::name, &mvar::avx512::name}

inline bool supported(InstructionSet set) {
  switch (set) {
#if !defined(MVAR_AVX512_ON_AVX2)  // else it needs what AVX2 does
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bf16");
#else
    case kAvx512:
#endif
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
}

#else

enum InstructionSet { kGeneric, kInstructionSets };
constexpr const char* kInstructionSetNames[] = {"generic"};

#define MVAR_DECLARE_TABLE(Type, name) \
  namespace generic { extern const Type name; }
#define MVAR_TABLES(name) {&mvar::generic::name}

inline bool supported(InstructionSet) { return true; }

#endif

}  // namespace mvar
