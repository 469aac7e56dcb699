// Sum and mean per segment with a 0/1 mask.
#pragma once

#include "common/host_device.h"

namespace megarl {

// Factor of a segment's sum (and of each of its gradients). A mean over nothing is 0.
MEGARL_HD double segment_scale(double count, bool mean) {
  return !mean ? 1.0 : count > 0.0 ? 1.0 / count : 0.0;
}

}  // namespace megarl
