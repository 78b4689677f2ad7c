// A training forward: from clips to factors, and the books that quantizers keep.

#pragma once

#include <cstring>

#include "activations.h"
#include "weights.h"

namespace {

template <class T>
void train(int form, const T* x, void* out, int64_t n, const float* const* clips, float* numbers, int bits, int threads) {
  const Factors f = factors_of(*clips[0], *clips[1], *clips[2], *clips[3], bits);
  const float largest = converted(form, x, out, n, f.scale, f.offset, bits, threads);
  numbers[0] = f.upper;
  numbers[1] = f.lower;
  numbers[2] = f.scale;
  numbers[3] = f.offset;
  numbers[4] = largest + std::fabs(f.upper) + std::fabs(f.lower);
}

// What ActivationQuantizer.keep() does; tells whether a clip is another one now.
bool keep(float* const* clips, const Factors& f, float watched, float* poison) {
  const float values[] = {f.upper, f.lower, f.upper, f.lower};
  bool changed = false;
  for (int i = 0; i < 4; ++i) {
    changed = changed || bits_of(*clips[i]) != bits_of(values[i]);
    *clips[i] = values[i];
  }
  *poison += 0 * watched;
  return changed;
}

template <class T>
bool train_and_keep(int form, const T* x, void* out, int64_t n, float* const* clips, bool fixed_min, float* poison,
                    float* numbers, int bits, int threads) {
  const Factors f = factors_of(*clips[0], fixed_min ? 0.f : *clips[1], *clips[2], *clips[3], bits);
  const float largest = converted(form, x, out, n, f.scale, f.offset, bits, threads);
  const float values[] = {f.upper, f.lower, f.scale, f.offset};
  std::memcpy(numbers, values, sizeof values);
  return keep(clips, f, largest + std::fabs(f.upper) + std::fabs(f.lower), poison);
}

}  // namespace
