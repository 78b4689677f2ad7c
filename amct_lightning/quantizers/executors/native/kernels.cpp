// The kernels of the compiled executor for CPUs, each formula in one pass over memory.
//
// They give the integers, values and gradients of inputs of the operators in functional.py and functions/ to the bit;
// so nothing here may be reordered or contracted by the compiler (-ffp-contract=off). Sums, of which the gradients of
// clips and scales are made, are in double precision and over blocks of a fixed length, so that they are the same for
// any number of threads. Pointers are to dense memory; those of single numbers are to float32.

#include "training.h"

#define AMCT_KERNELS(T, suffix)                                                                                        \
  void amct_train_##suffix(int form, const T* x, void* out, int64_t n, const float* clip_max, const float* clip_min,   \
                           const float* previous_max, const float* previous_min, float* numbers, int bits,             \
                           int threads) {                                                                              \
    const float* clips[] = {clip_max, clip_min, previous_max, previous_min};                                           \
    train(form, x, out, n, clips, numbers, bits, threads);                                                             \
  }                                                                                                                    \
  void amct_convert_##suffix(int form, const T* x, void* out, int64_t n, const float* scale, const float* offset,      \
                             int bits, int threads) {                                                                  \
    converted(form, x, out, n, *scale, *offset, bits, threads);                                                        \
  }                                                                                                                    \
  void amct_gradients_##suffix(const T* x, const T* grad, T* out, int64_t n, const float* upper, const float* lower,   \
                               const float* scale, const float* offset, float* of_clips, int bits, int threads) {      \
    const float factors[] = {*upper, *lower, *scale, *offset};                                                         \
    gradients(x, grad, out, n, factors, bits, of_clips, threads);                                                      \
  }                                                                                                                    \
  void amct_weight_##suffix(const T* w, int64_t rows, int64_t columns, float* scales, T* out, int bits, int threads) {  \
    weight_scales(w, rows, columns, bits, scales, threads);                                                            \
    weight_values<false>(w, rows, columns, bits, scales, out, threads);                                                \
  }                                                                                                                    \
  void amct_weight_grid_##suffix(const T* w, int64_t rows, int64_t columns, const float* input_scale, float* scales,     \
                                 float* products, float* kept, float* out, int bits, int threads) {                    \
    weight_scales(w, rows, columns, bits, scales, threads);                                                            \
    weight_values<true>(w, rows, columns, bits, scales, out, threads);                                                 \
    product_scales(scales, rows, *input_scale, products, kept);                                                        \
  }                                                                                                                    \
  void amct_weight_values_##suffix(const T* w, int64_t rows, int64_t columns, const float* scales, T* out, int bits,   \
                                   int threads) {                                                                      \
    weight_values<false>(w, rows, columns, bits, scales, out, threads);                                                \
  }                                                                                                                    \
  void amct_scale_gradients_##suffix(const T* w, const T* grad, int64_t rows, int64_t columns, const float* scales,    \
                                     const float* factor, float* out, int bits, int threads) {                        \
    scale_gradients(w, grad, rows, columns, scales, bits, *factor, out, threads);                                      \
  }

extern "C" {
AMCT_KERNELS(float, float32)
AMCT_KERNELS(Bf16, bfloat16)
}
