// Memory: every block is remembered, so that its kind can be asked for and each device's use is accounted.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "sim.h"

enum { ALIGNMENT = 512, PINNED = -1 };

struct block {
  char* start;
  size_t size;
  int device;  // PINNED for host memory
  struct block* next;
};

static struct block* blocks;
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_size_t used[SIM_MAX_DEVICES];

size_t sim_device_memory_used(int device) { return used[device]; }

static int account(int device, size_t size) {  // 0 where the device has no room left
  size_t before = atomic_fetch_add(&used[device], size);
  if (before + size <= sim_device_memory()) return 1;
  atomic_fetch_sub(&used[device], size);
  return 0;
}

static int allocate(Handle* result, size_t size, int device) {
  *result = NULL;
  if (device != PINNED && !account(device, size)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  // One granule more than asked for: kernels of a device may read past the end.
  char* start = aligned_alloc(ALIGNMENT, (size + 2 * ALIGNMENT) / ALIGNMENT * ALIGNMENT);
  if (!start) {
    if (device != PINNED) atomic_fetch_sub(&used[device], size);
    return ACL_ERROR_RT_MEMORY_ALLOCATION;
  }
  struct block* block = malloc(sizeof *block);
  *block = (struct block){start, size, device, NULL};
  pthread_mutex_lock(&blocks_lock);
  block->next = blocks;
  blocks = block;
  pthread_mutex_unlock(&blocks_lock);
  *result = start;
  return ACL_OK;
}

static struct block* take_out(Handle start) {
  struct block* found = NULL;
  pthread_mutex_lock(&blocks_lock);
  for (struct block** link = &blocks; *link; link = &(*link)->next)
    if ((*link)->start == start) {
      found = *link;
      *link = found->next;
      break;
    }
  pthread_mutex_unlock(&blocks_lock);
  return found;
}

static int release(Handle start) {
  if (!start) return ACL_OK;
  struct block* block = take_out(start);
  if (!block) return sim_fail(ACL_ERROR_INVALID_PARAM, "free of %p, which was not allocated here", start);
  if (block->device != PINNED) atomic_fetch_sub(&used[block->device], block->size);
  free(block->start);
  free(block);
  return ACL_OK;
}

int aclrtMalloc(Handle* result, size_t size, int policy) { return allocate(result, size, sim_device()); }
int aclrtMallocAlign32(Handle* result, size_t size, int policy) { return allocate(result, size, sim_device()); }
int aclrtMallocWithCfg(Handle* result, size_t size, int policy, Handle config) {
  return allocate(result, size, sim_device());
}
int aclrtFree(Handle start) { return release(start); }
int aclrtMallocHost(Handle* result, size_t size) { return allocate(result, size, PINNED); }
int aclrtMallocHostWithCfg(Handle* result, uint64_t size, Handle config) { return allocate(result, size, PINNED); }
int aclrtFreeHost(Handle start) { return release(start); }

// aclrtPtrAttributes: the device, the kind of memory (0 pinned host, 1 device, 2 unknown), page size, reserved.
int aclrtPointerGetAttributes(const void* pointer, uint32_t attributes[7]) {
  memset(attributes, 0, 7 * sizeof *attributes);
  attributes[1] = 2;
  pthread_mutex_lock(&blocks_lock);
  for (struct block* block = blocks; block; block = block->next)
    if ((char*)pointer >= block->start && (char*)pointer < block->start + block->size) {
      attributes[0] = block->device == PINNED ? 0 : block->device;
      attributes[1] = block->device != PINNED;
      break;
    }
  pthread_mutex_unlock(&blocks_lock);
  return ACL_OK;
}

int aclrtHostRegister(Handle pointer, uint64_t size, int kind, Handle* on_device) {
  *on_device = pointer;
  return ACL_OK;
}

int aclrtMemcpy(Handle to, size_t room, const void* from, size_t size, int kind) {
  if (size > room) return sim_fail(ACL_ERROR_INVALID_PARAM, "aclrtMemcpy of %zu bytes into %zu", size, room);
  memmove(to, from, size);
  return ACL_OK;
}

int aclrtMemcpyAsync(Handle to, size_t room, const void* from, size_t size, int kind, Handle stream) {
  return aclrtMemcpy(to, room, from, size, kind);
}

int aclrtMemcpyAsyncWithCondition(Handle to, size_t room, const void* from, size_t size, int kind, Handle stream) {
  return aclrtMemcpy(to, room, from, size, kind);
}

int aclrtMemset(Handle to, size_t room, int value, size_t size) {
  if (size > room) return sim_fail(ACL_ERROR_INVALID_PARAM, "aclrtMemset of %zu bytes in %zu", size, room);
  memset(to, value, size);
  return ACL_OK;
}

int aclrtMemsetAsync(Handle to, size_t room, int value, size_t size, Handle stream) {
  return aclrtMemset(to, room, value, size);
}

// Virtual memory, for expandable segments: reserved address space becomes usable when something is mapped there.
struct physical {
  size_t size;
  int device;
};

int aclrtReserveMemAddress(Handle* start, size_t size, size_t alignment, Handle wanted, uint64_t flags) {
  *start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *start == MAP_FAILED ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_OK;
}

int aclrtReleaseMemAddress(Handle start) { return ACL_OK; }

int aclrtMallocPhysical(Handle* result, size_t size, Handle properties, uint64_t flags) {
  int device = sim_device();
  if (!account(device, size)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  struct physical* physical = malloc(sizeof *physical);
  *physical = (struct physical){size, device};
  *result = physical;
  return ACL_OK;
}

int aclrtFreePhysical(Handle handle) {
  struct physical* physical = handle;
  atomic_fetch_sub(&used[physical->device], physical->size);
  free(physical);
  return ACL_OK;
}

int aclrtMapMem(Handle start, size_t size, size_t offset, Handle handle, uint64_t flags) {
  return mprotect(start, size, PROT_READ | PROT_WRITE) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_OK;
}

int aclrtUnmapMem(Handle start) { return ACL_OK; }

int aclrtIpcMemGetExportKey(void) {
  return sim_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "device memory IPC is not simulated");
}
