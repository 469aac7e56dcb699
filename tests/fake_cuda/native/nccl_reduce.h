// Reductions over the buffers of all ranks, in the order of the ranks, so that every rank has the same bits.
#pragma once

#include <nccl.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fakenccl {

inline size_t element_size(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float value) {  // to nearest, ties to even
    uint32_t u;
    memcpy(&u, &value, 4);
    bits = value != value ? 0x7fc0 : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
  }
};

struct Part {  // one rank's buffer
  const char* data;
  double scale;  // of a pre-multiplied sum
};

// Sums in A, narrower types thus with one rounding at the end.
template <class T, class A>
void reduce_as(void* out, const std::vector<Part>& parts, size_t count, int op) {
  const bool scaled = op >= ncclNumOps;
  for (size_t i = 0; i < count; i++) {
    A result{};
    for (size_t r = 0; r < parts.size(); r++) {
      T element;
      memcpy(&element, parts[r].data + i * sizeof(T), sizeof(T));
      A value = A(element);
      if (scaled) value = A(value * A(parts[r].scale));
      if (r == 0) result = value;
      else if (op == ncclProd) result = A(result * value);
      else if (op == ncclMax) result = value > result ? value : result;
      else if (op == ncclMin) result = value < result ? value : result;
      else result = A(result + value);
    }
    if (op == ncclAvg) result = A(result / A(parts.size()));
    const T narrow = T(result);
    memcpy(static_cast<char*>(out) + i * sizeof(T), &narrow, sizeof(T));
  }
}

inline void reduce(void* out, const std::vector<Part>& parts, size_t count, ncclDataType_t type, int op) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t, int>(out, parts, count, op);
    case ncclUint8: return reduce_as<uint8_t, unsigned>(out, parts, count, op);
    case ncclInt32: return reduce_as<int32_t, int32_t>(out, parts, count, op);
    case ncclUint32: return reduce_as<uint32_t, uint32_t>(out, parts, count, op);
    case ncclInt64: return reduce_as<int64_t, int64_t>(out, parts, count, op);
    case ncclUint64: return reduce_as<uint64_t, uint64_t>(out, parts, count, op);
    case ncclFloat16: return reduce_as<_Float16, float>(out, parts, count, op);
    case ncclBfloat16: return reduce_as<BFloat16, float>(out, parts, count, op);
    case ncclFloat32: return reduce_as<float, float>(out, parts, count, op);
    case ncclFloat64: return reduce_as<double, double>(out, parts, count, op);
    default: fprintf(stderr, "fakenccl: reductions of type %d are not implemented\n", int(type)); abort();
  }
}

}  // namespace fakenccl
