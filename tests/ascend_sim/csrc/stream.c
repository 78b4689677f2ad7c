// Streams and events: all work is done when the call that starts it returns, so there is never anything to wait for.
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "sim.h"

struct stream {
  int id;
};

struct event {
  double recorded;  // seconds
};

static atomic_int streams;

int aclrtCreateStream(Handle* result) {
  struct stream* stream = malloc(sizeof *stream);
  stream->id = streams++;
  *result = stream;
  return ACL_OK;
}

int aclrtCreateStreamWithConfig(Handle* result, uint32_t priority, uint32_t flags) { return aclrtCreateStream(result); }

int aclrtDestroyStream(Handle stream) {
  free(stream);
  return ACL_OK;
}

int aclrtDestroyStreamForce(Handle stream) { return aclrtDestroyStream(stream); }

int aclrtStreamGetId(Handle stream, int* id) {
  *id = stream ? ((struct stream*)stream)->id : 0;
  return ACL_OK;
}

int aclrtStreamQuery(Handle stream, int* status) {  // 0: complete
  *status = 0;
  return ACL_OK;
}

int aclrtSynchronizeStream(Handle stream) { return ACL_OK; }
int aclrtSynchronizeStreamWithTimeout(Handle stream, int timeout) { return ACL_OK; }
int aclrtSynchronizeDevice(void) { return ACL_OK; }
int aclrtSynchronizeDeviceWithTimeout(int timeout) { return ACL_OK; }
int aclrtStreamWaitEvent(Handle stream, Handle event) { return ACL_OK; }

int aclrtCreateEvent(Handle* result) {
  *result = calloc(1, sizeof(struct event));
  return ACL_OK;
}

int aclrtCreateEventWithFlag(Handle* result, uint32_t flags) { return aclrtCreateEvent(result); }
int aclrtCreateEventExWithFlag(Handle* result, uint32_t flags) { return aclrtCreateEvent(result); }

int aclrtDestroyEvent(Handle event) {
  free(event);
  return ACL_OK;
}

int aclrtRecordEvent(Handle event, Handle stream) {
  ((struct event*)event)->recorded = sim_now();
  return ACL_OK;
}

int aclrtResetEvent(Handle event, Handle stream) { return ACL_OK; }
int aclrtSynchronizeEvent(Handle event) { return ACL_OK; }
int aclrtSynchronizeEventWithTimeout(Handle event, int timeout) { return ACL_OK; }

static int set(int* status, int value) {
  *status = value;
  return ACL_OK;
}

// The enumerations differ: 1 is complete where an event was recorded, 0 is complete where a stream waited for it.
int aclrtQueryEventStatus(Handle event, int* status) { return set(status, 1); }
int aclQueryEventRecordedStatus(Handle event, int* status) { return set(status, 1); }
int aclrtQueryEventWaitStatus(Handle event, int* status) { return set(status, 0); }
int aclQueryEventWaitStatus(Handle event, int* status) { return set(status, 0); }

int aclrtEventElapsedTime(float* milliseconds, Handle start, Handle end) {
  *milliseconds = 1e3 * (((struct event*)end)->recorded - ((struct event*)start)->recorded);
  return ACL_OK;
}

int aclrtEventGetTimestamp(Handle event, uint64_t* microseconds) {
  *microseconds = 1e6 * ((struct event*)event)->recorded;
  return ACL_OK;
}

int aclrtLaunchCallback(void (*function)(Handle), Handle argument, int block, Handle stream) {
  function(argument);
  return ACL_OK;
}

int aclrtLaunchHostFunc(Handle stream, void (*function)(Handle), Handle argument) {
  function(argument);
  return ACL_OK;
}

// Called in a loop by a thread of torch_npu; callbacks have run already, so it only must not spin.
int aclrtProcessReport(int milliseconds) {
  usleep(1000 * (milliseconds > 0 && milliseconds < 100 ? milliseconds : 100));
  return ACL_OK;
}

int aclmdlRICaptureBegin(Handle stream, int mode) {
  return sim_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "NPU graph capture is not simulated");
}

int aclmdlRICaptureGetInfo(Handle stream, int* status, Handle* model) {  // no capture under way
  *status = 0;
  if (model) *model = NULL;
  return ACL_OK;
}
