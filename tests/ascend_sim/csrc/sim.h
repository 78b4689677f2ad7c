// Shared by the files of the simulated CANN runtime.
//
// "Device" memory is host memory, every stream is synchronous, and HCCL moves its data through /dev/shm between the
// processes of one machine. The signatures are those that torch_npu 2.13.0 calls; parameters that do not matter here
// are still there, because the calling convention needs them.
//
// Environment:
//   SIM_NPU=<n>           number of devices (default 0)
//   SIM_NPU_MEM=<MiB>     memory of each device (default 65536)
//   SIM_NPU_SOC=<name>    default Ascend910B1
//   SIM_NPU_BUSY=<id>     a device that cannot be opened
//   SIM_HCCL_TIMEOUT=<s>  how long a collective waits for its peers (default 120)
//   SIM_TRACE=1           print the operators that arrive here and every stub that is reached
//   SIM_QUIET=1           do not print errors
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef void* Handle;

// Results of AscendCL, from acl_base.h.
enum {
  ACL_OK = 0,
  ACL_ERROR_INVALID_PARAM = 100000,
  ACL_ERROR_OP_NOT_FOUND = 100024,
  ACL_ERROR_RT_INVALID_DEVICE = 107001,
  ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000,
  ACL_ERROR_RT_MEMORY_ALLOCATION = 207001,
  ACL_ERROR_RT_DEV_SETUP_ERROR = 507033,
};

enum { SIM_MAX_DEVICES = 64 };

// Keeps the text for aclGetRecentErrMsg of this thread, prints it, and returns the code.
int sim_fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* sim_last_error(void);
// A stub was reached: it does nothing and succeeds.
int sim_stub(const char* name);
// Seconds of the monotonic clock.
double sim_now(void);

int sim_device_count(void);
// The device of the calling thread.
int sim_device(void);
size_t sim_device_memory(void);
size_t sim_device_memory_used(int device);
