// Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438) over the masked positions of a sequence.
#pragma once

#include "common/host_device.h"

namespace megarl {

// What a position hands to the one before it: the value of its state and its advantage. Beyond the end: zeros.
template <typename T>
struct GaeCarry {
  T value;
  T advantage;
};

// A = r + gamma * V' - V + gamma * lambda * A', with ' from the next masked position.
template <typename T>
MEGARL_HD GaeCarry<T> gae_step(T reward, T value, GaeCarry<T> next, T gamma, T lambda) {
  const T delta = reward + gamma * next.value - value;
  return {value, delta + gamma * lambda * next.advantage};
}

// The same as an affine map of the next advantage, A = offset + factor * A': maps compose in any grouping, which is
// what a parallel scan needs. `compose(f, g)` is f after g, g being the map of the later positions.
template <typename T>
struct GaeMap {
  T offset;
  T factor;
};

template <typename T>
MEGARL_HD GaeMap<T> gae_compose(GaeMap<T> f, GaeMap<T> g) {
  return {f.offset + f.factor * g.offset, f.factor * g.factor};
}

}  // namespace megarl
