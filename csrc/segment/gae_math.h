// Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438) over the masked positions of a sequence.
#pragma once

namespace megarl {

// What a position passes to the previous one: the value of its state and its advantage. Zeros after the end.
template <typename T>
struct GaeCarry {
  T value;
  T advantage;
};

// A = r + gamma * V' - V + gamma * lambda * A', with ' from the next masked position.
template <typename T>
inline GaeCarry<T> gae_step(T reward, T value, GaeCarry<T> next, T gamma, T lambda) {
  const T delta = reward + gamma * next.value - value;
  return {value, delta + gamma * lambda * next.advantage};
}

}  // namespace megarl
