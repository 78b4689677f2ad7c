// Operators that reach the runtime itself: next to none are known, and any other fails by its name.
//
// The kernels of torch's operators are in the .cpp files, at the level of the dispatcher. A few places inside torch_npu
// start an operator directly, past the dispatcher: ProcessGroupHCCL uses Fill and PadV3 for the collectives of objects.
// Those two are done here.
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

enum { MAX_DIMS = 8, ACL_INT32 = 3 };

struct description {
  int dtype, dims;
  int64_t sizes[MAX_DIMS];
};

struct buffer {
  char* start;
  size_t size;
};

Handle aclCreateTensorDesc(int dtype, int dims, const int64_t* sizes, int format) {
  struct description* description = calloc(1, sizeof *description);
  description->dtype = dtype;
  description->dims = dims < MAX_DIMS ? dims : MAX_DIMS;
  for (int i = 0; i < description->dims; i++) description->sizes[i] = sizes[i];
  return description;
}

void aclDestroyTensorDesc(Handle description) { free(description); }

Handle aclCreateDataBuffer(Handle start, size_t size) {
  struct buffer* buffer = malloc(sizeof *buffer);
  *buffer = (struct buffer){start, size};
  return buffer;
}

int aclDestroyDataBuffer(Handle buffer) {
  free(buffer);
  return ACL_OK;
}

Handle aclopCreateAttr(void) { return calloc(1, 8); }
void aclopDestroyAttr(Handle attributes) { free(attributes); }

static size_t element_size(int dtype) {  // aclDataType; 0 for what is not a plain number
  switch (dtype) {
    case 2:   // int8
    case 4:   // uint8
    case 12:  // bool
      return 1;
    case 1:   // float16
    case 6:   // int16
    case 7:   // uint16
    case 27:  // bfloat16
      return 2;
    case 0:  // float
    case 3:  // int32
    case 8:  // uint32
      return 4;
    case 9:   // int64
    case 10:  // uint64
    case 11:  // double
    case 16:  // complex64
      return 8;
    case 17:  // complex128
      return 16;
  }
  return 0;
}

static int64_t elements(const struct description* description) {
  int64_t count = 1;
  for (int i = 0; i < description->dims; i++) count *= description->sizes[i];
  return count;
}

// out = value everywhere
static int fill(const struct buffer* value, const struct description* shape, struct buffer* out) {
  size_t size = element_size(shape->dtype);
  int64_t count = elements(shape);
  for (int64_t i = 0; i < count && (i + 1) * size <= out->size; i++) memcpy(out->start + i * size, value->start, size);
  return ACL_OK;
}

// Constant padding; inputs are the tensor, the paddings as pairs (before, after) per dimension, and the value.
static int pad(struct description** in_shapes, struct buffer** in, const struct description* shape,
               struct buffer* out) {
  size_t size = element_size(shape->dtype);
  int64_t count = elements(shape), before[MAX_DIMS], index[MAX_DIMS] = {0};
  for (int i = 0; i < shape->dims; i++)
    before[i] = in_shapes[1]->dtype == ACL_INT32 ? ((int32_t*)in[1]->start)[2 * i] : ((int64_t*)in[1]->start)[2 * i];
  for (int64_t k = 0; k < count && (k + 1) * size <= out->size; k++) {
    int64_t offset = 0;
    int inside = 1;
    for (int i = 0; i < shape->dims; i++) {
      int64_t source = index[i] - before[i];
      if (source < 0 || source >= in_shapes[0]->sizes[i]) inside = 0;
      offset = offset * in_shapes[0]->sizes[i] + source;
    }
    memcpy(out->start + k * size, inside ? in[0]->start + offset * size : in[2]->start, size);
    for (int i = shape->dims - 1; i >= 0 && ++index[i] == shape->sizes[i]; i--) index[i] = 0;
  }
  return ACL_OK;
}

static int no_kernel(const char* operator) {
  if (getenv("SIM_TRACE")) {
    Handle frames[48];
    backtrace_symbols_fd(frames, backtrace(frames, 48), 2);
  }
  return sim_fail(ACL_ERROR_OP_NOT_FOUND, "the simulated CANN runtime has no device kernel for operator %s", operator);
}

int aclopCompileAndExecute(const char* operator, int inputs, struct description** in_shapes, struct buffer** in,
                           int outputs, struct description** out_shapes, struct buffer** out, Handle attributes,
                           int engine, int compile_flag, const char* path, Handle stream) {
  if (getenv("SIM_TRACE"))
    fprintf(stderr, "[simulated NPU] operator %s, %d inputs, %d outputs\n", operator, inputs, outputs);
  if (outputs != 1 || !element_size(out_shapes[0]->dtype)) return no_kernel(operator);
  if (!strcmp(operator, "Fill") && inputs == 2 && in_shapes[1]->dtype == out_shapes[0]->dtype)
    return fill(in[1], out_shapes[0], out[0]);
  int same = inputs == 3 && in_shapes[0]->dtype == out_shapes[0]->dtype && in_shapes[0]->dims == out_shapes[0]->dims;
  if (!strcmp(operator, "PadV3") && same) return pad(in_shapes, in, out_shapes[0], out[0]);
  return no_kernel(operator);
}

int aclopCompileAndExecuteV2(const char* operator, int inputs, struct description** in_shapes, struct buffer** in,
                             int outputs, struct description** out_shapes, struct buffer** out, Handle attributes,
                             int engine, int compile_flag, const char* path, Handle stream) {
  return aclopCompileAndExecute(operator, inputs, in_shapes, in, outputs, out_shapes, out, attributes, engine,
                                compile_flag, path, stream);
}

int aclrtLaunchKernelWithHostArgs(void) { return no_kernel("(a kernel given as a binary)"); }
int rtKernelLaunch(void) { return no_kernel("(a kernel given as a binary)"); }
