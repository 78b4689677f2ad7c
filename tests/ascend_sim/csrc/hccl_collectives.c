// The collectives of the simulated HCCL.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hccl.h"

static const char* NAMES[] = {"?",       "AllReduce",  "Broadcast",      "AllGather", "ReduceScatter", "Reduce",
                              "Scatter", "AllGatherV", "ReduceScatterV", "AlltoAll",  "AlltoAllV",     "Barrier"};

static int mismatch(const struct communicator* comm, const struct call* mine, int other) {
  const struct call* theirs = &comm->control->ranks[other].call;
  return sim_fail(HCCL_E_PARA,
                  "collective mismatch on %s: rank %d calls %s(count %llu, dtype %d, op %d, root %d) and rank %d calls "
                  "%s(count %llu, dtype %d, op %d, root %d)",
                  comm->name, comm->rank, NAMES[mine->kind], (unsigned long long)mine->count, mine->dtype, mine->op,
                  mine->root, other, NAMES[theirs->kind], (unsigned long long)theirs->count, theirs->dtype, theirs->op,
                  theirs->root);
}

static int has_own_counts(int kind) { return kind == ALL_GATHER_V || kind == REDUCE_SCATTER_V; }

static int differ(const struct call* a, const struct call* b) {
  if (a->kind != b->kind || a->sequence != b->sequence || a->dtype != b->dtype || a->op != b->op || a->root != b->root)
    return 1;
  return !has_own_counts(a->kind) && a->count != b->count;
}

// Puts the input where the others read it, waits for theirs, and compares what the ranks call.
static int post(struct communicator* comm, struct call call, const void* in, size_t bytes) {
  const char* name = NAMES[call.kind];
  if (!hccl_element_size(call.dtype)) return sim_fail(HCCL_E_PARA, "%s: HcclDataType %d", name, call.dtype);
  call.sequence = comm->sequence++;
  char* buffer = hccl_buffer(comm, comm->rank, bytes + 1);
  if (!buffer) return sim_fail(HCCL_E_SYSCALL, "%s: no room in /dev/shm for %zu bytes", name, bytes);
  if (bytes) memcpy(buffer, in, bytes);
  comm->control->ranks[comm->rank].call = call;
  comm->control->ranks[comm->rank].bytes = bytes;
  int code = hccl_wait_all(comm, name);
  for (int i = 0; i < comm->size && !code; i++) {
    if (differ(&call, &comm->control->ranks[i].call))
      code = mismatch(comm, &call, i);
    else if (!hccl_buffer(comm, i, comm->control->ranks[i].bytes + 1))
      code = sim_fail(HCCL_E_SYSCALL, "%s: mmap of rank %d's buffer", name, i);
  }
  return code;
}

static int begin(struct communicator* comm, struct call call, const void* in, size_t bytes) {
  if (!comm) return sim_fail(HCCL_E_PTR, "%s: no communicator", NAMES[call.kind]);
  pthread_mutex_lock(&comm->lock);
  return post(comm, call, in, bytes);
}

// Nobody overwrites its buffer before everybody has read it.
static int finish(struct communicator* comm, struct call call, int code) {
  if (!comm) return code;
  int waited = code == HCCL_E_REMOTE || code == HCCL_E_TIMEOUT ? code : hccl_wait_all(comm, NAMES[call.kind]);
  pthread_mutex_unlock(&comm->lock);
  return code ? code : waited;
}

int HcclAllReduce(void* in, void* out, uint64_t count, int dtype, int op, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {ALL_REDUCE, dtype, op, 0, count};
  int code = begin(comm, call, in, count * hccl_element_size(dtype));
  if (!code) code = hccl_reduce(comm, out, count, dtype, op, 0);
  return finish(comm, call, code);
}

int HcclReduce(void* in, void* out, uint64_t count, int dtype, int op, uint32_t root, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {REDUCE, dtype, op, root, count};
  int code = begin(comm, call, in, count * hccl_element_size(dtype));
  if (!code && comm->rank == (int)root) code = hccl_reduce(comm, out, count, dtype, op, 0);
  return finish(comm, call, code);
}

int HcclBroadcast(void* data, uint64_t count, int dtype, uint32_t root, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {BROADCAST, dtype, 0, root, count};
  size_t bytes = count * hccl_element_size(dtype);
  int code = begin(comm, call, data, comm && comm->rank == (int)root ? bytes : 0);
  if (!code && comm->rank != (int)root) memcpy(data, comm->buffers[root], bytes);
  return finish(comm, call, code);
}

int HcclScatter(void* in, void* out, uint64_t count, int dtype, uint32_t root, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {SCATTER, dtype, 0, root, count};
  size_t bytes = count * hccl_element_size(dtype);
  int code = begin(comm, call, in, comm && comm->rank == (int)root ? bytes * comm->size : 0);
  if (!code) memcpy(out, comm->buffers[root] + comm->rank * bytes, bytes);
  return finish(comm, call, code);
}

int HcclAllGather(void* in, void* out, uint64_t count, int dtype, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {ALL_GATHER, dtype, 0, 0, count};
  size_t bytes = count * hccl_element_size(dtype);
  int code = begin(comm, call, in, bytes);
  for (int i = 0; !code && i < comm->size; i++) memcpy((char*)out + i * bytes, comm->buffers[i], bytes);
  return finish(comm, call, code);
}

int HcclAllGatherV(void* in, uint64_t count, void* out, const uint64_t* counts, const uint64_t* displacements,
                   int dtype, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {ALL_GATHER_V, dtype, 0, 0, count};
  size_t size = hccl_element_size(dtype);
  int code = begin(comm, call, in, count * size);
  for (int i = 0; !code && i < comm->size; i++)
    memcpy((char*)out + displacements[i] * size, comm->buffers[i], counts[i] * size);
  return finish(comm, call, code);
}

int HcclReduceScatter(void* in, void* out, uint64_t count, int dtype, int op, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {REDUCE_SCATTER, dtype, op, 0, count};
  size_t bytes = count * hccl_element_size(dtype);
  int code = begin(comm, call, in, comm ? bytes * comm->size : 0);
  if (!code) code = hccl_reduce(comm, out, count, dtype, op, comm->rank * bytes);
  return finish(comm, call, code);
}

// The number of elements up to the end of the last part.
static uint64_t extent(int parts, const uint64_t* counts, const uint64_t* displacements) {
  uint64_t end = 0;
  for (int i = 0; i < parts; i++)
    if (displacements[i] + counts[i] > end) end = displacements[i] + counts[i];
  return end;
}

int HcclReduceScatterV(void* in, const uint64_t* counts, const uint64_t* displacements, void* out, uint64_t count,
                       int dtype, int op, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {REDUCE_SCATTER_V, dtype, op, 0, count};
  size_t size = hccl_element_size(dtype);
  int code = begin(comm, call, in, comm ? extent(comm->size, counts, displacements) * size : 0);
  if (!code) code = hccl_reduce(comm, out, count, dtype, op, displacements[comm->rank] * size);
  return finish(comm, call, code);
}

int HcclAlltoAll(const void* in, uint64_t count, int dtype, void* out, uint64_t out_count, int out_dtype, Handle handle,
                 Handle stream) {
  struct communicator* comm = handle;
  struct call call = {ALL_TO_ALL, dtype, 0, 0, count};
  size_t bytes = count * hccl_element_size(dtype);
  int code = begin(comm, call, in, comm ? bytes * comm->size : 0);
  for (int i = 0; !code && i < comm->size; i++)
    memcpy((char*)out + i * bytes, comm->buffers[i] + comm->rank * bytes, bytes);
  return finish(comm, call, code);
}

int HcclAlltoAllV(const void* in, const uint64_t* send_counts, const uint64_t* send_displacements, int dtype, void* out,
                  const uint64_t* counts, const uint64_t* displacements, int out_dtype, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  struct call call = {ALL_TO_ALL_V, dtype};
  size_t size = hccl_element_size(dtype);
  for (int i = 0; comm && i < comm->size; i++)
    comm->control->ranks[comm->rank].displacements[i] = send_displacements[i];
  int code = begin(comm, call, in, comm ? extent(comm->size, send_counts, send_displacements) * size : 0);
  for (int i = 0; !code && i < comm->size; i++) {
    uint64_t from = comm->control->ranks[i].displacements[comm->rank];
    memcpy((char*)out + displacements[i] * size, comm->buffers[i] + from * size, counts[i] * size);
  }
  return finish(comm, call, code);
}

int HcclAlltoAllVC(void) { return sim_fail(HCCL_E_NOT_SUPPORT, "HcclAlltoAllVC is not simulated"); }

int HcclBarrier(Handle handle, Handle stream) {
  struct call call = {BARRIER};
  return finish(handle, call, begin(handle, call, NULL, 0));
}
