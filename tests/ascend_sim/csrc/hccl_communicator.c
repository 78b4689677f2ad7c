// Communicators of the simulated HCCL: how ranks find each other, wait for each other, and notice that one is gone.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "hccl.h"

// Offsets and sizes of HCCL's own structs.
enum { ROOT_INFO_BYTES = 4108, CONFIG_NAME_OFFSET = 32, CAPABILITY = 12 };

double hccl_timeout(void) {
  const char* seconds = getenv("SIM_HCCL_TIMEOUT");
  return seconds ? atof(seconds) : 120;
}

// On a real machine nobody tells HCCL that a process has died.
static int hccl_is_blind(void) {
  const char* blind = getenv("SIM_HCCL_BLIND");
  return blind && blind[0] == '1';
}

int hccl_is_gone(const struct communicator* comm, int rank) {
  int pid = comm->control->ranks[rank].pid;
  if (!pid) return 0;
  if (kill(pid, 0) && errno == ESRCH) return 1;
  // A process that was killed stays as a zombie until its parent looks at it.
  char path[32], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* file = fopen(path, "r");
  if (!file) return 1;
  size_t size = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[size] = 0;
  const char* after_name = strrchr(text, ')');
  return after_name && (after_name[2] == 'Z' || after_name[2] == 'X');
}

static int check_peers(struct communicator* comm, const char* what, double waited) {
  if (comm->destroyed)
    return sim_fail(HCCL_E_REMOTE, "%s on %s: the communicator was destroyed while it waited", what, comm->name);
  for (int i = 0; i < comm->size && !hccl_is_blind(); i++)
    if (hccl_is_gone(comm, i))
      return sim_fail(HCCL_E_REMOTE, "%s on %s, rank %d of %d: rank %d is gone (pid %d)", what, comm->name, comm->rank,
                      comm->size, i, comm->control->ranks[i].pid);
  if (waited > hccl_timeout())
    return sim_fail(HCCL_E_TIMEOUT, "%s on %s, rank %d of %d: %d rank(s) arrived in %.0f s", what, comm->name,
                    comm->rank, comm->size, comm->control->arrived, waited);
  return HCCL_OK;
}

int hccl_wait_all(struct communicator* comm, const char* what) {
  struct control* control = comm->control;
  unsigned generation = control->generation;
  double start = sim_now(), checked = start;
  if (atomic_fetch_add(&control->arrived, 1) + 1 == comm->size) {
    control->arrived = 0;
    atomic_fetch_add(&control->generation, 1);
    syscall(SYS_futex, &control->generation, FUTEX_WAKE, 1 << 30, 0, 0, 0);
    return HCCL_OK;
  }
  while (control->generation == generation) {
    struct timespec pause = {0, 20000000};
    syscall(SYS_futex, &control->generation, FUTEX_WAIT, generation, &pause, 0, 0);
    double now = sim_now();
    if (control->generation != generation || now - checked < 0.5) continue;
    checked = now;
    int result = check_peers(comm, what, now - start);
    if (result) return result;
  }
  return HCCL_OK;
}

static void control_path(char path[160], const char* id) { snprintf(path, 160, "/dev/shm/%s.control", id); }
static void buffer_path(char path[160], const char* id, int rank) { snprintf(path, 160, "/dev/shm/%s.%d", id, rank); }

char* hccl_buffer(struct communicator* comm, int rank, size_t bytes) {
  if (comm->buffers[rank] && bytes <= comm->lengths[rank]) return comm->buffers[rank];
  size_t length = (bytes + (1 << 20) - 1) >> 20 << 20;  // whole MiB, so that growing is rare
  struct stat status;
  if (comm->buffers[rank]) munmap(comm->buffers[rank], comm->lengths[rank]);
  comm->buffers[rank] = NULL;
  if (fstat(comm->files[rank], &status)) return NULL;
  if (rank == comm->rank && (size_t)status.st_size < length && ftruncate(comm->files[rank], length)) return NULL;
  char* start = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, comm->files[rank], 0);
  if (start == MAP_FAILED) return NULL;
  comm->buffers[rank] = start;
  comm->lengths[rank] = length;
  return start;
}

static int create_control(const char* id, int flags) {
  char path[160];
  control_path(path, id);
  int file = open(path, O_RDWR | O_CREAT | flags, 0600);
  if (file < 0 || ftruncate(file, sizeof(struct control)))
    return sim_fail(HCCL_E_SYSCALL, "cannot make %s: %s", path, strerror(errno));
  close(file);
  return HCCL_OK;
}

// The root info is a name that no other communicator has; rank 0 sends it to the others.
int HcclGetRootInfo(char* info) {
  static atomic_int made;
  char id[96];
  struct timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  snprintf(id, sizeof id, "simhccl-%d-%d-%lx", getpid(), made++, (long)time.tv_nsec);
  memset(info, 0, ROOT_INFO_BYTES);
  strcpy(info, id);
  return create_control(id, O_EXCL);
}

int HcclGetRootInfoScalable(char* info) { return HcclGetRootInfo(info); }

static int map_control(struct communicator* comm) {
  char path[160];
  control_path(path, comm->id);
  double start = sim_now();
  int file = open(path, O_RDWR);
  struct stat status;
  while (file < 0 || fstat(file, &status) || status.st_size < (long)sizeof(struct control)) {
    if (sim_now() - start > hccl_timeout()) return sim_fail(HCCL_E_TIMEOUT, "HcclCommInit: there is no %s", path);
    usleep(2000);
    if (file < 0) file = open(path, O_RDWR);
  }
  comm->control = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return comm->control == MAP_FAILED ? sim_fail(HCCL_E_SYSCALL, "mmap of %s: %s", path, strerror(errno)) : HCCL_OK;
}

static int open_buffers(struct communicator* comm) {
  char path[160];
  buffer_path(path, comm->id, comm->rank);
  comm->files[comm->rank] = open(path, O_RDWR | O_CREAT, 0600);
  if (comm->files[comm->rank] < 0 || !hccl_buffer(comm, comm->rank, 1))
    return sim_fail(HCCL_E_SYSCALL, "cannot make %s: %s", path, strerror(errno));
  int result = hccl_wait_all(comm, "HcclCommInit");
  if (result) return result;
  for (int i = 0; i < comm->size; i++) {
    if (i == comm->rank) continue;
    buffer_path(path, comm->id, i);
    comm->files[i] = open(path, O_RDWR);
    if (comm->files[i] < 0) return sim_fail(HCCL_E_SYSCALL, "there is no %s", path);
  }
  return hccl_wait_all(comm, "HcclCommInit");
}

// Everybody holds the files: with their names gone, a crash leaves nothing behind.
static void unlink_files(const struct communicator* comm) {
  char path[160];
  buffer_path(path, comm->id, comm->rank);
  unlink(path);
  if (comm->rank) return;
  control_path(path, comm->id);
  unlink(path);
}

static int join(uint32_t size, const char* id, uint32_t rank, const char* config, Handle* result) {
  if (size > MAX_RANKS || rank >= size || !id[0])
    return sim_fail(HCCL_E_PARA, "HcclCommInit: rank %u of %u, root info '%.40s'", rank, size, id);
  struct communicator* comm = calloc(1, sizeof *comm);
  const char* name = config ? config + CONFIG_NAME_OFFSET : "";
  comm->rank = rank;
  comm->size = size;
  pthread_mutex_init(&comm->lock, NULL);
  snprintf(comm->id, sizeof comm->id, "%s", id);
  snprintf(comm->name, sizeof comm->name, "%s", name[0] ? name : id);
  int code = map_control(comm);
  if (code) return code;
  comm->control->ranks[rank].pid = getpid();
  code = open_buffers(comm);
  unlink_files(comm);
  *result = comm;
  return code;
}

int HcclCommInitRootInfo(uint32_t size, const char* info, uint32_t rank, Handle* comm) {
  return join(size, info, rank, NULL, comm);
}

int HcclCommInitRootInfoConfig(uint32_t size, const char* info, uint32_t rank, const char* config, Handle* comm) {
  return join(size, info, rank, config, comm);
}

int HcclCommInitRootInfoScalable(uint32_t size, uint32_t roots, const char* info, uint32_t rank, uint32_t extent,
                                 const char* config, Handle* comm) {
  return join(size, info, rank, config, comm);
}

// The ranks derive the same name from the parent's, so none of them has to send one round.
int HcclCreateSubCommConfig(Handle* parent, uint32_t size, uint32_t* ranks, uint64_t sub_id, uint32_t rank,
                            const char* config, Handle* comm) {
  char id[96];
  snprintf(id, sizeof id, "%.60s-s%llx", ((struct communicator*)*parent)->id, (unsigned long long)sub_id);
  int code = create_control(id, 0);
  return code ? code : join(size, id, rank, config, comm);
}

// A job's ranks have the same table, and another job another file: its number and time make the name.
int HcclCommInitClusterInfoConfig(const char* file, uint32_t rank, const char* config, Handle* comm) {
  static char text[1 << 20];
  char id[96];
  struct stat status;
  FILE* table = fopen(file, "r");
  if (!table || fstat(fileno(table), &status)) return sim_fail(HCCL_E_PARA, "no rank table %s", file);
  text[fread(text, 1, sizeof text - 1, table)] = 0;
  fclose(table);
  uint32_t size = 0;
  for (const char* at = text; (at = strstr(at, "\"rank_id\"")); at++) size++;
  snprintf(id, sizeof id, "simhccl-table-%lx-%lx-%lx", (long)status.st_ino, (long)status.st_mtim.tv_sec,
           (long)status.st_mtim.tv_nsec);
  int code = create_control(id, 0);
  return code ? code : join(size, id, rank, config, comm);
}

int HcclCommInitClusterInfo(const char* file, uint32_t rank, Handle* comm) {
  return HcclCommInitClusterInfoConfig(file, rank, NULL, comm);
}

int HcclCommInitAll(uint32_t size, int* devices, Handle* comms) {
  return sim_fail(HCCL_E_NOT_SUPPORT, "HcclCommInitAll is not simulated");
}

// The struct stays: torch_npu's watchdog may still look at it.
int HcclCommDestroy(Handle comm) {
  if (comm) ((struct communicator*)comm)->destroyed = 1;
  return HCCL_OK;
}

int HcclGetCommName(Handle comm, char* name) {
  strcpy(name, ((struct communicator*)comm)->name);
  return HCCL_OK;
}

int HcclGetRankSize(Handle comm, uint32_t* size) {
  *size = ((struct communicator*)comm)->size;
  return HCCL_OK;
}

int HcclGetRankId(Handle comm, uint32_t* rank) {
  *rank = ((struct communicator*)comm)->rank;
  return HCCL_OK;
}

// Errors are returned by the collective itself, which runs in the calling thread.
int HcclGetCommAsyncError(Handle comm, int* error) {
  *error = HCCL_OK;
  return HCCL_OK;
}

const char* HcclGetErrorString(int error) {
  const char* text = sim_last_error();
  return text[0] ? text : "error of the simulated HCCL";
}

uint32_t HcclGetCommConfigCapability(void) { return CAPABILITY; }
int HcclSetConfig(int config, int value) { return HCCL_OK; }

int HcclGetConfig(int config, int* value) {
  *value = 0;
  return HCCL_OK;
}

int HcclGroupStart(void) { return HCCL_OK; }
int HcclGroupEnd(void) { return HCCL_OK; }
