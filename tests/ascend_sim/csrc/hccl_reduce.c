// Arithmetic of the simulated HCCL: rank 0 first, then rank 1 and so on, the same order on every rank.
#include <stdlib.h>
#include <string.h>

#include "hccl.h"

size_t hccl_element_size(int dtype) {  // HcclDataType; 0 for an unknown one
  switch (dtype) {
    case 0:   // int8
    case 7:   // uint8
    case 14:  // hif8
    case 15:  // fp8 e4m3
    case 16:  // fp8 e5m2
    case 17:  // fp8 e8m0
      return 1;
    case 1:  // int16
    case 8:  // uint16
    case HCCL_FP16:
    case HCCL_BF16: return 2;
    case 2:  // int32
    case 9:  // uint32
    case HCCL_FP32: return 4;
    case 5:   // int64
    case 6:   // uint64
    case 10:  // fp64
      return 8;
    case 12:  // int128
      return 16;
  }
  return 0;
}

// a = a op b. Comparing b with itself lets a NaN through, and is always false for integers.
#define ACCUMULATE(type)                                                       \
  do {                                                                         \
    type* a = to;                                                              \
    const type* b = from;                                                      \
    for (uint64_t i = 0; i < count; i++) switch (op) {                         \
        case SUM: a[i] = a[i] + b[i]; break;                                   \
        case PRODUCT: a[i] = a[i] * b[i]; break;                               \
        case MAXIMUM: a[i] = b[i] > a[i] || b[i] != b[i] ? b[i] : a[i]; break; \
        case MINIMUM: a[i] = b[i] < a[i] || b[i] != b[i] ? b[i] : a[i]; break; \
      }                                                                        \
    return 1;                                                                  \
  } while (0)

static int accumulate(void* to, const void* from, uint64_t count, int dtype,
                      int op) {  // 0 for a type without arithmetic
  switch (dtype) {
    case 0: ACCUMULATE(int8_t);
    case 1: ACCUMULATE(int16_t);
    case 2: ACCUMULATE(int32_t);
    case HCCL_FP32: ACCUMULATE(float);
    case 5: ACCUMULATE(int64_t);
    case 6: ACCUMULATE(uint64_t);
    case 7: ACCUMULATE(uint8_t);
    case 8: ACCUMULATE(uint16_t);
    case 9: ACCUMULATE(uint32_t);
    case 10: ACCUMULATE(double);
  }
  return 0;
}

static float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static uint16_t to_bfloat16(float value) {  // to the nearest, halves to even
  uint32_t wide;
  if (value != value) return 0x7fc0;
  memcpy(&wide, &value, sizeof wide);
  return (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
}

static void widen(float* to, const void* from, uint64_t count, int dtype) {
  if (dtype == HCCL_BF16)
    for (uint64_t i = 0; i < count; i++) to[i] = from_bfloat16(((const uint16_t*)from)[i]);
  else
    for (uint64_t i = 0; i < count; i++) to[i] = ((const _Float16*)from)[i];
}

static void narrow(void* to, const float* from, uint64_t count, int dtype) {
  if (dtype == HCCL_BF16)
    for (uint64_t i = 0; i < count; i++) ((uint16_t*)to)[i] = to_bfloat16(from[i]);
  else
    for (uint64_t i = 0; i < count; i++) ((_Float16*)to)[i] = (_Float16)from[i];
}

// 16 bit floats are added up in float and rounded once.
static int reduce_halves(struct communicator* comm, void* out, uint64_t count, int dtype, int op, uint64_t offset) {
  float *sum = malloc(count * sizeof(float) + 1), *next = malloc(count * sizeof(float) + 1);
  widen(sum, comm->buffers[0] + offset, count, dtype);
  for (int rank = 1; rank < comm->size; rank++) {
    widen(next, comm->buffers[rank] + offset, count, dtype);
    accumulate(sum, next, count, HCCL_FP32, op);
  }
  narrow(out, sum, count, dtype);
  free(sum);
  free(next);
  return HCCL_OK;
}

int hccl_reduce(struct communicator* comm, void* out, uint64_t count, int dtype, int op, uint64_t offset) {
  if (op < SUM || op > MINIMUM) return sim_fail(HCCL_E_PARA, "HcclReduceOp %d is not simulated", op);
  if (dtype == HCCL_FP16 || dtype == HCCL_BF16) return reduce_halves(comm, out, count, dtype, op, offset);
  memmove(out, comm->buffers[0] + offset, count * hccl_element_size(dtype));
  for (int rank = 1; rank < comm->size; rank++)
    if (!accumulate(out, comm->buffers[rank] + offset, count, dtype, op))
      return sim_fail(HCCL_E_PARA, "HcclDataType %d cannot be reduced", dtype);
  return HCCL_OK;
}
