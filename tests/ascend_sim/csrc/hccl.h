// Shared by the files of the simulated HCCL.
//
// A communicator is a control block in /dev/shm that all ranks map, and one data buffer per rank. A collective puts its
// input into the rank's own buffer, waits for everybody, reads from the others' buffers, and waits again.
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "sim.h"

enum {
  HCCL_OK = 0,
  HCCL_E_PARA = 1,
  HCCL_E_PTR = 2,
  HCCL_E_NOT_SUPPORT = 5,
  HCCL_E_SYSCALL = 8,
  HCCL_E_TIMEOUT = 9,
  HCCL_E_REMOTE = 21
};
enum { HCCL_FP16 = 3, HCCL_FP32 = 4, HCCL_BF16 = 11 };  // HcclDataType, as far as it is named here
enum { SUM, PRODUCT, MAXIMUM, MINIMUM };                // HcclReduceOp
enum { MAX_RANKS = 256 };

enum collective {
  ALL_REDUCE = 1,
  BROADCAST,
  ALL_GATHER,
  REDUCE_SCATTER,
  REDUCE,
  SCATTER,
  ALL_GATHER_V,
  REDUCE_SCATTER_V,
  ALL_TO_ALL,
  ALL_TO_ALL_V,
  BARRIER,
};

// What a rank calls; it must be the same on all ranks.
struct call {
  int kind, dtype, op, root;
  uint64_t count, sequence;
};

// In shared memory.
struct control {
  atomic_int arrived;
  atomic_uint generation;
  struct {
    struct call call;
    int pid;
    uint64_t bytes;
    uint64_t displacements[MAX_RANKS];
  } ranks[MAX_RANKS];
};

struct communicator {
  int rank, size;
  uint64_t sequence;
  char id[96], name[128];
  struct control* control;
  int files[MAX_RANKS];
  char* buffers[MAX_RANKS];
  size_t lengths[MAX_RANKS];
  uint64_t sent[MAX_RANKS], received[MAX_RANKS];
  pthread_mutex_t lock;
  atomic_int destroyed;
};

double hccl_timeout(void);
size_t hccl_element_size(int dtype);
// Whether the rank's process has ended.
int hccl_is_gone(const struct communicator* comm, int rank);
// A barrier; `what` is the name for errors.
int hccl_wait_all(struct communicator* comm, const char* what);
// The rank's buffer, with at least `bytes` bytes mapped; null on failure.
char* hccl_buffer(struct communicator* comm, int rank, size_t bytes);
// out = the reduction over the ranks of `count` elements at byte `offset` of every rank's buffer.
int hccl_reduce(struct communicator* comm, void* out, uint64_t count, int dtype, int op, uint64_t offset);
