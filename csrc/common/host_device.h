// MEGARL_HD marks an op's math: the same function runs in its CPU kernel, its CUDA kernel and the SIMT executor.
#pragma once

#if defined(MEGARL_SIMT)
#include "simt.h"
#endif

#if defined(__CUDACC__) || defined(MEGARL_SIMT)
#define MEGARL_HD __host__ __device__ __forceinline__
#else
#define MEGARL_HD inline
#endif
