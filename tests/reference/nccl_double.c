// A stand-in for NCCL that moves memory of the host, for tests without a GPU.
//
// It has the functions that the crate loads, with the signatures and the manners
// of `nccl.h` 2.18 and later for communicators that do not block: what is begun
// goes on in a thread, and ncclCommGetAsyncError says ncclInProgress meanwhile;
// a send that no receive of its size meets stays stuck until an abort. It is
// stricter where NCCL lets pass what the crate should not do.
//
// Ranks are threads or processes of one host. The id is a folder; a message is
// a file in it, which its receiver removes.
//
//   NCCL_DOUBLE_FAIL=r:n     the n-th group of rank r ends in an error
//   NCCL_DOUBLE_FINALIZE=all an end waits until all ranks have come to theirs
//   NCCL_DOUBLE_LOG=file     gets the bytes of every send, a line for each
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 21800
#endif

typedef struct { char internal[128]; } ncclUniqueId;
enum { ncclSuccess = 0, ncclSystemError = 2, ncclInvalidArgument = 4,
       ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7 };
enum { ncclUint8 = 1 };
typedef struct {
  size_t size;
  unsigned magic, version;
  int blocking, cgaClusterSize, minCTAs, maxCTAs;
  const char* netName;
  int splitShare;
} ncclConfig_t;

typedef struct { int is_send, peer; char* memory; size_t count; long number; } Operation;

typedef struct ncclComm {
  char folder[128];
  int rank, size, groups, finalized;
  long *sent, *received;  // messages to and from each rank so far
  Operation* operations;  // of the group that goes on
  int count;
  atomic_int state, aborted;
  pthread_t worker;
  int is_working;
} *ncclComm_t;

// The crate lets no GPU loose on memory of the host: this says that there is none.
const int ulysses_nccl_takes_host_memory = 1;

static char last_error[512];

static int fail(int code, const char* words) {
  snprintf(last_error, sizeof last_error, "%s", words);
  return code;
}

static void nap(void) {
  const struct timespec pause = {0, 100000};
  nanosleep(&pause, NULL);
}

static void file_of(const ncclComm_t comm, char* path, const char* format, int a, int b, long n) {
  const int length = snprintf(path, PATH_MAX, "%s/", comm->folder);
  snprintf(path + length, PATH_MAX - length, format, a, b, n);
}

static int is_there(const char* path) {
  struct stat found;
  return stat(path, &found) == 0;
}

static int write_file(const char* path, const char* bytes, size_t count) {
  char beside[PATH_MAX + 8];
  snprintf(beside, sizeof beside, "%s.tmp", path);
  const int file = open(beside, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (file < 0) return 0;
  while (count > 0) {
    const ssize_t done = write(file, bytes, count);
    if (done <= 0) return close(file), 0;
    bytes += done, count -= done;
  }
  return close(file), rename(beside, path) == 0;
}

static int read_file(const char* path, char* bytes, size_t count) {
  const int file = open(path, O_RDONLY);
  if (file < 0) return 0;
  while (count > 0) {
    const ssize_t done = read(file, bytes, count);
    if (done <= 0) return close(file), 0;
    bytes += done, count -= done;
  }
  return close(file), 1;
}

// Waits until every rank has said `word`; gives whether they have.
static int all_say(ncclComm_t comm, const char* word) {
  char format[64], path[PATH_MAX];
  snprintf(format, sizeof format, "%s-%%d", word);
  file_of(comm, path, format, comm->rank, 0, 0);
  if (!write_file(path, "", 0)) return 0;
  for (int rank = 0; rank < comm->size; rank++) {
    file_of(comm, path, format, rank, 0, 0);
    while (!is_there(path)) {
      if (comm->aborted) return 0;
      nap();
    }
  }
  return 1;
}

// Threads for what goes on while the caller does something else.
static void join(ncclComm_t comm) {
  if (comm->is_working) pthread_join(comm->worker, NULL);
  comm->is_working = 0;
}

static int start(ncclComm_t comm, void* (*work)(void*)) {
  join(comm);
  comm->state = ncclInProgress;
  comm->is_working = pthread_create(&comm->worker, NULL, work, comm) == 0;
  return comm->is_working ? ncclInProgress : fail(ncclSystemError, "no thread");
}

static void* initialize(void* argument) {
  ncclComm_t comm = argument;
  if (all_say(comm, "here")) comm->state = ncclSuccess;
  return NULL;
}

static void* finalize(void* argument) {
  ncclComm_t comm = argument;
  const char* how = getenv("NCCL_DOUBLE_FINALIZE");
  if (how == NULL || strcmp(how, "all") != 0 || all_say(comm, "ended")) comm->state = ncclSuccess;
  return NULL;
}

static int is_to_fail(ncclComm_t comm) {
  const char* told = getenv("NCCL_DOUBLE_FAIL");
  int rank, group;
  return told && sscanf(told, "%d:%d", &rank, &group) == 2 && rank == comm->rank &&
         group == comm->groups;
}

static void* move(void* argument) {
  ncclComm_t comm = argument;
  char path[PATH_MAX];
  if (is_to_fail(comm)) {
    fail(ncclRemoteError, "the double was told to fail here");
    comm->state = ncclRemoteError;
    return NULL;
  }
  for (int i = 0; i < comm->count; i++) {
    const Operation* send = &comm->operations[i];
    if (!send->is_send) continue;
    file_of(comm, path, "%d-%d-%ld", comm->rank, send->peer, send->number);
    if (!write_file(path, send->memory, send->count)) {
      fail(ncclSystemError, "a message cannot be written");
      comm->state = ncclSystemError;
      return NULL;
    }
  }
  for (int i = 0; i < comm->count; i++) {
    const Operation* one = &comm->operations[i];
    const int from = one->is_send ? comm->rank : one->peer;
    const int to = one->is_send ? one->peer : comm->rank;
    file_of(comm, path, "%d-%d-%ld", from, to, one->number);
    for (struct stat found;; nap()) {
      if (comm->aborted) return NULL;
      const int there = stat(path, &found) == 0;
      if (one->is_send) {
        if (!there) break;  // It was received.
      } else if (there && (size_t)found.st_size == one->count) {
        if (!read_file(path, one->memory, one->count)) continue;
        unlink(path);
        break;
      }
    }
  }
  comm->state = ncclSuccess;
  return NULL;
}

// The group of this thread: operations of one communicator.
static __thread int depth;
static __thread ncclComm_t grouped;
static __thread Operation operations[4096];
static __thread int grouped_count;

int ncclGroupStart(void) {
  depth++;
  return ncclSuccess;
}

int ncclGroupEnd(void) {
  if (depth == 0) return fail(ncclInvalidUsage, "ncclGroupEnd: not in a group");
  if (--depth > 0 || grouped == NULL) return ncclSuccess;
  ncclComm_t comm = grouped;
  join(comm);
  free(comm->operations);
  comm->operations = malloc(sizeof(Operation) * grouped_count);
  memcpy(comm->operations, operations, sizeof(Operation) * grouped_count);
  comm->count = grouped_count;
  comm->groups++;
  grouped = NULL, grouped_count = 0;
  return start(comm, move);
}

static int add(int is_send, void* memory, size_t count, int type, int peer, ncclComm_t comm,
               void* stream) {
  if (comm == NULL || memory == NULL || count == 0 || type != ncclUint8 || stream != NULL)
    return fail(ncclInvalidArgument, "an argument is not what the double takes");
  if (peer < 0 || peer >= comm->size || peer == comm->rank)
    return fail(ncclInvalidArgument, "no such peer");
  if (depth == 0 || (grouped != NULL && grouped != comm) || grouped_count == 4096)
    return fail(ncclInvalidUsage, "outside a group, or in that of another communicator");
  if (comm->state != ncclSuccess || comm->finalized)
    return fail(ncclInvalidUsage, "the communicator was not ready");
  grouped = comm;
  long* numbers = is_send ? comm->sent : comm->received;
  operations[grouped_count++] = (Operation){is_send, peer, memory, count, numbers[peer]++};
  return ncclSuccess;
}

int ncclSend(const void* memory, size_t count, int type, int peer, ncclComm_t comm, void* stream) {
  const char* log = getenv("NCCL_DOUBLE_LOG");
  FILE* file = log ? fopen(log, "a") : NULL;
  if (file) fprintf(file, "%zu\n", count), fclose(file);
  return add(1, (void*)memory, count, type, peer, comm, stream);
}

int ncclRecv(void* memory, size_t count, int type, int peer, ncclComm_t comm, void* stream) {
  return add(0, memory, count, type, peer, comm, stream);
}

int ncclGetVersion(int* version) {
  *version = VERSION;
  return ncclSuccess;
}

int ncclGetUniqueId(ncclUniqueId* id) {
  const char* folder = getenv("TMPDIR");
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%s/nccl-double-XXXXXX", folder ? folder : "/tmp");
  return mkdtemp(id->internal) ? ncclSuccess : fail(ncclSystemError, "no folder for the id");
}

int ncclCommInitRankConfig(ncclComm_t* made, int size, ncclUniqueId id, int rank,
                           ncclConfig_t* config) {
  if (config->size < sizeof *config || config->magic != 0xcafebeef || config->version < 21800 ||
      config->blocking != 0 || config->minCTAs != INT_MIN || config->netName != NULL)
    return fail(ncclInvalidArgument, "the config is not what the double takes");
  if (rank < 0 || rank >= size || !is_there(id.internal))
    return fail(ncclInvalidArgument, "no such rank, or no such id");
  ncclComm_t comm = calloc(1, sizeof *comm);
  memcpy(comm->folder, id.internal, sizeof comm->folder);
  comm->rank = rank, comm->size = size;
  comm->sent = calloc(size, sizeof(long)), comm->received = calloc(size, sizeof(long));
  *made = comm;
  return start(comm, initialize);
}

int ncclCommGetAsyncError(ncclComm_t comm, int* state) {
  *state = comm->state;
  return ncclSuccess;
}

int ncclCommFinalize(ncclComm_t comm) {
  if (comm->state != ncclSuccess || comm->finalized)
    return fail(ncclInvalidUsage, "the communicator was not ready");
  comm->finalized = 1;
  return start(comm, finalize);
}

static int reclaim(ncclComm_t comm) {
  char path[PATH_MAX];
  join(comm);
  for (int i = 0; i < comm->count; i++) {
    if (!comm->operations[i].is_send) continue;
    file_of(comm, path, "%d-%d-%ld", comm->rank, comm->operations[i].peer,
            comm->operations[i].number);
    unlink(path);
  }
  // Who comes later must still find who was here: the last one clears up.
  file_of(comm, path, "gone-%d", comm->rank, 0, 0);
  write_file(path, "", 0);
  int gone = 0;
  for (int rank = 0; rank < comm->size; rank++) {
    file_of(comm, path, "gone-%d", rank, 0, 0);
    gone += is_there(path);
  }
  for (int rank = 0; gone == comm->size && rank < comm->size; rank++) {
    file_of(comm, path, "here-%d", rank, 0, 0), unlink(path);
    file_of(comm, path, "ended-%d", rank, 0, 0), unlink(path);
    file_of(comm, path, "gone-%d", rank, 0, 0), unlink(path);
  }
  rmdir(comm->folder);
  free(comm->operations), free(comm->sent), free(comm->received), free(comm);
  return ncclSuccess;
}

int ncclCommDestroy(ncclComm_t comm) {
  if (comm->state == ncclInProgress)
    return fail(ncclInvalidUsage, "a communicator was destroyed that was not ready");
  return reclaim(comm);
}

int ncclCommAbort(ncclComm_t comm) {
  if (comm == NULL) return ncclSuccess;
  comm->aborted = 1;
  return reclaim(comm);
}

const char* ncclGetErrorString(int code) {
  switch (code) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    default: return "internal error";
  }
}

const char* ncclGetLastError(ncclComm_t comm) {
  (void)comm;
  return last_error;
}
