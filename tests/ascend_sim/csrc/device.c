// Devices: how many there are, which one a thread uses, and what they say about themselves.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

// What an Ascend 910B1 has.
enum { AI_CORES = 24, VECTOR_CORES = 48, L2_CACHE = 192 << 20 };

static __thread int current = 0;

int sim_device(void) { return current; }

// ASCEND_RT_VISIBLE_DEVICES is a comma separated list; ids from the first bad one on do not exist.
static int count_visible(const char* list, int existing) {
  int count = 0;
  while (*list) {
    char* end;
    long id = strtol(list, &end, 10);
    if (end == list || id < 0 || id >= existing) break;
    count++;
    if (*end && *end != ',') break;
    list = *end ? end + 1 : end;
  }
  return count;
}

int sim_device_count(void) {
  const char *devices = getenv("SIM_NPU"), *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  int count = devices ? atoi(devices) : 0;
  if (count > SIM_MAX_DEVICES) count = SIM_MAX_DEVICES;
  return visible ? count_visible(visible, count) : count;
}

size_t sim_device_memory(void) {
  const char* mebibytes = getenv("SIM_NPU_MEM");
  return (size_t)(mebibytes ? atoll(mebibytes) : 65536) << 20;
}

int aclInit(const char* config) { return ACL_OK; }
int aclFinalize(void) { return ACL_OK; }

int aclrtGetDeviceCount(uint32_t* count) {
  *count = sim_device_count();
  return *count ? ACL_OK : ACL_ERROR_RT_INVALID_DEVICE;
}

int aclrtSetDevice(int device) {
  if (device < 0 || device >= sim_device_count())
    return sim_fail(ACL_ERROR_RT_INVALID_DEVICE, "aclrtSetDevice(%d): there are %d devices", device,
                    sim_device_count());
  const char* busy = getenv("SIM_NPU_BUSY");
  if (busy && *busy && device == atoi(busy))
    return sim_fail(ACL_ERROR_RT_DEV_SETUP_ERROR, "aclrtSetDevice(%d): another container uses the device", device);
  current = device;
  return ACL_OK;
}

int aclrtGetDevice(int* device) {
  *device = current;
  return ACL_OK;
}

int aclrtResetDevice(int device) { return ACL_OK; }
int aclrtResetDeviceForce(int device) { return ACL_OK; }

// A context is the number of its device, plus one so that it is never null.
int aclrtGetCurrentContext(Handle* context) {
  *context = (Handle)(intptr_t)(current + 1);
  return ACL_OK;
}

int aclrtSetCurrentContext(Handle context) {
  current = (int)(intptr_t)context - 1;
  return ACL_OK;
}

int aclrtGetPrimaryCtxState(int device, uint32_t* flags, int* active) {
  if (flags) *flags = 0;
  *active = device == current;
  return ACL_OK;
}

int aclrtGetMemInfo(int kind, size_t* free, size_t* total) {
  size_t used = sim_device_memory_used(current);
  *total = sim_device_memory();
  *free = used < *total ? *total - used : 0;
  return ACL_OK;
}

int aclrtDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer;
  return ACL_OK;
}

int aclrtDeviceEnablePeerAccess(int peer, uint32_t flags) { return ACL_OK; }

int aclrtDeviceGetBareTgid(int* id) {
  *id = getpid();
  return ACL_OK;
}

int aclrtDeviceGetUuid(int device, char* uuid) {
  memset(uuid, 0, 16);
  snprintf(uuid, 16, "SIMNPU-%d", device);
  return ACL_OK;
}

int aclrtGetLogicDevIdByUserDevId(int user, int* logic) {
  *logic = user;
  return ACL_OK;
}

int aclrtGetLogicDevIdByPhyDevId(int physical, int* logic) {
  *logic = physical;
  return ACL_OK;
}

int aclrtGetDeviceUtilizationRate(int device, int* rates) {  // cube, vector, AI CPU, memory
  memset(rates, 0, 4 * sizeof *rates);
  return ACL_OK;
}

const char* aclrtGetSocName(void) {
  const char* name = getenv("SIM_NPU_SOC");
  return name ? name : "Ascend910B1";
}

int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t* value) {
  switch (attribute) {
    case 1: *value = 6; break;  // AI CPUs
    case 0:
    case 101:
    case 102: *value = AI_CORES; break;
    case 201: *value = VECTOR_CORES; break;
    case 301: *value = sim_device_memory(); break;
    case 302: *value = L2_CACHE; break;
    default: *value = 0;
  }
  return ACL_OK;
}

int aclGetDeviceCapability(uint32_t device, int attribute, int64_t* value) {
  const int64_t known[] = {AI_CORES, VECTOR_CORES, L2_CACHE};
  *value = attribute >= 0 && attribute < 3 ? known[attribute] : 0;
  return ACL_OK;
}

static int resource_limit(int kind, uint32_t* value) {
  *value = kind == 0 ? AI_CORES : VECTOR_CORES;
  return ACL_OK;
}

int aclrtGetDeviceResLimit(int device, int kind, uint32_t* value) { return resource_limit(kind, value); }
int aclrtGetStreamResLimit(Handle stream, int kind, uint32_t* value) { return resource_limit(kind, value); }
int aclrtGetResInCurrentThread(int kind, uint32_t* value) { return resource_limit(kind, value); }

// Attribute 1 is the INF_NAN mode: an overflow gives inf, as on a 910B.
int aclGetCannAttribute(int attribute, int* value) {
  *value = attribute == 1;
  return ACL_OK;
}

int aclGetCannAttributeList(const int** list, size_t* count) {
  static const int attributes[] = {1};
  *list = attributes;
  *count = 1;
  return ACL_OK;
}

// Option 10 is ACL_OP_JIT_COMPILE, off as on a 910B.
static const char* compile_option(int option) { return option == 10 ? "disable" : "0"; }
size_t aclGetCompileoptSize(int option) { return strlen(compile_option(option)) + 1; }
int aclGetCompileopt(int option, char* value, size_t size) {
  snprintf(value, size, "%s", compile_option(option));
  return ACL_OK;
}

// The version is unknown, so that torch_npu switches nothing on by it. The struct is 128 characters and 4 texts of 64.
int aclsysGetCANNVersion(int package, char* version) {
  memset(version, 0, 128 + 4 * 64);
  return ACL_OK;
}

int aclsysGetVersionStr(char* package, char* version) {
  strcpy(version, "8.5.0");
  return ACL_OK;
}

int aclrtGetSysParamOpt(int option, int64_t* value) {
  *value = 0;
  return ACL_OK;
}

void aclAppLog(int level, const char* function, const char* file, uint32_t line, const char* format, ...) {}
