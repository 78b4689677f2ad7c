// Send and receive of the simulated HCCL. The sender leaves a file and goes on, so that two ranks may both send first.
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "hccl.h"

enum { PATH = 200 };

static void message_path(char path[PATH], const struct communicator* comm, int from, int to, uint64_t number) {
  snprintf(path, PATH, "/dev/shm/%s.message.%d.%d.%llu", comm->id, from, to, (unsigned long long)number);
}

int HcclSend(void* data, uint64_t count, int dtype, uint32_t to, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  char path[PATH], part[PATH + 8];
  message_path(path, comm, comm->rank, to, comm->sent[to]++);
  snprintf(part, sizeof part, "%s.part", path);
  FILE* file = fopen(part, "wb");
  int written = file && fwrite(data, hccl_element_size(dtype), count, file) == count;
  if (!file || fclose(file) || !written || rename(part, path))
    return sim_fail(HCCL_E_SYSCALL, "HcclSend to rank %u: %s", to, strerror(errno));
  return HCCL_OK;
}

static int receive_file(struct communicator* comm, const char* path, uint32_t from, FILE** file) {
  double start = sim_now();
  while (!(*file = fopen(path, "rb"))) {
    int gone = hccl_is_gone(comm, from);  // asked first: a message sent before the end still counts
    if (gone && access(path, R_OK)) return sim_fail(HCCL_E_REMOTE, "HcclRecv on %s: rank %u is gone", comm->name, from);
    if (sim_now() - start > hccl_timeout())
      return sim_fail(HCCL_E_TIMEOUT, "HcclRecv on %s: nothing from rank %u", comm->name, from);
    usleep(500);
  }
  return HCCL_OK;
}

int HcclRecv(void* data, uint64_t count, int dtype, uint32_t from, Handle handle, Handle stream) {
  struct communicator* comm = handle;
  char path[PATH];
  FILE* file;
  message_path(path, comm, from, comm->rank, comm->received[from]++);
  int code = receive_file(comm, path, from, &file);
  if (code) return code;
  size_t wanted = count * hccl_element_size(dtype);
  fseek(file, 0, SEEK_END);
  size_t size = ftell(file);
  rewind(file);
  int complete = size == wanted && fread(data, 1, size, file) == size;
  fclose(file);
  unlink(path);
  if (!complete) return sim_fail(HCCL_E_PARA, "HcclRecv: %zu bytes from rank %u, not %zu", size, from, wanted);
  return HCCL_OK;
}

struct item {  // HcclSendRecvItem
  int is_receive;
  void* data;
  uint64_t count;
  int dtype;
  uint32_t peer;
};

int HcclBatchSendRecv(struct item* items, uint32_t count, Handle comm, Handle stream) {
  for (uint32_t i = 0; i < count; i++) {
    if (items[i].is_receive) continue;
    int code = HcclSend(items[i].data, items[i].count, items[i].dtype, items[i].peer, comm, stream);
    if (code) return code;
  }
  for (uint32_t i = 0; i < count; i++) {
    if (!items[i].is_receive) continue;
    int code = HcclRecv(items[i].data, items[i].count, items[i].dtype, items[i].peer, comm, stream);
    if (code) return code;
  }
  return HCCL_OK;
}
