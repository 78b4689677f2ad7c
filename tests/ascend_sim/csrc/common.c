// Errors, the clock, and the functions of CANN that need no behaviour.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "sim.h"

static __thread char last_error[1024] = "";

int sim_fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  if (!getenv("SIM_QUIET")) fprintf(stderr, "[simulated NPU] error %d: %s\n", code, last_error);
  return code;
}

const char* sim_last_error(void) { return last_error; }
const char* aclGetRecentErrMsg(void) { return last_error; }

double sim_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

int sim_stub(const char* name) {
  if (getenv("SIM_TRACE")) fprintf(stderr, "[simulated NPU] stub %s\n", name);
  return ACL_OK;
}

// stubs.inc is written by build.py: whatever else the libraries of the wheel ask for.
#define STUB(name) \
  int name(void) { return sim_stub(#name); }
#include "stubs.inc"
