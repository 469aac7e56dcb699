// Map packed positions to tokens; see PackedBatch in megarl/records.py for the layout.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace megarl {

// Position in its padded sequence of element `local` of the share of context-parallel rank `rank` of `size`, which has
// chunks `rank` and `2 * size - 1 - rank` of 2 * size equal ones. `chunk` is padded length / (2 * size).
MEGARL_HD int64_t zigzag_position(int64_t local, int64_t chunk, int64_t rank, int64_t size) {
  return local < chunk ? rank * chunk + local : (2 * size - 1 - rank) * chunk + (local - chunk);
}

// A position of a sequence of `length` real tokens: its own token, and the token it predicts.
struct PackedPosition {
  bool has_token;   // false: padding
  bool has_target;  // false: the last token, or padding
};

MEGARL_HD PackedPosition packed_position(int64_t position, int64_t length) {
  return {position < length, position + 1 < length};
}

}  // namespace megarl
