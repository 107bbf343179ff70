// NVML: all cards of the machine, whatever CUDA_VISIBLE_DEVICES says, answered from the shared state.
//
// NVIDIA's header is not installed with torch. The layouts are those of nvidia-ml-py, which documents them.
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define ENTRY __attribute__((visibility("default")))

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9 };

struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
struct process_v1 { unsigned pid; unsigned long long used; };
struct pci { char legacy_id[16]; unsigned domain, bus, device, pci_device_id, subsystem_id; char id[32]; };

static struct state *state;
static char handles[MAX_CARDS];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void open_state(void) { state = state_open(); }

// The card behind a handle; -1 for what is none.
static int card_of(const void *handle) {
  const char *place = handle;
  if (!state || place < handles || place >= handles + state->card_count) return -1;
  return (int)(place - handles);
}
#define CARD(handle)              \
  int card = card_of(handle);     \
  if (card < 0) return INVALID_ARGUMENT

static int text(char *to, unsigned room, const char *from) {
  return snprintf(to, room, "%s", from) < (int)room ? SUCCESS : INSUFFICIENT_SIZE;
}

ENTRY int nvmlInitWithFlags(unsigned flags) {
  pthread_once(&once, open_state);
  return state ? SUCCESS : DRIVER_NOT_LOADED;
}
ENTRY int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
ENTRY int nvmlInit(void) { return nvmlInitWithFlags(0); }
ENTRY int nvmlShutdown(void) { return SUCCESS; }

ENTRY const char *nvmlErrorString(int error) {
  switch (error) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
  }
}

ENTRY int nvmlSystemGetDriverVersion(char *to, unsigned room) { return text(to, room, "580.65.06"); }
ENTRY int nvmlSystemGetNVMLVersion(char *to, unsigned room) { return text(to, room, "13.580.65.06"); }
ENTRY int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDA_VERSION, SUCCESS; }
ENTRY int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

ENTRY int nvmlSystemGetProcessName(unsigned pid, char *to, unsigned room) {
  char path[32];
  snprintf(path, sizeof path, "/proc/%u/comm", pid);
  FILE *file = fopen(path, "re");
  if (!file) return NOT_FOUND;
  char line[64] = "";
  char *read = fgets(line, sizeof line, file);
  fclose(file);
  line[strcspn(line, "\n")] = 0;
  return read ? text(to, room, line) : NOT_FOUND;
}

// ---- finding a card

ENTRY int nvmlDeviceGetCount_v2(unsigned *count) {
  if (!state) return UNINITIALIZED;
  *count = state->card_count;
  return SUCCESS;
}
ENTRY int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

ENTRY int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  if (!state) return UNINITIALIZED;
  if (index >= state->card_count) return INVALID_ARGUMENT;
  *handle = &handles[index];
  return SUCCESS;
}
ENTRY int nvmlDeviceGetHandleByIndex(unsigned index, void **handle) {
  return nvmlDeviceGetHandleByIndex_v2(index, handle);
}

ENTRY int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  for (unsigned i = 0; state && i < state->card_count; i++) {
    if (strcmp(state->cards[i].uuid, uuid)) continue;
    *handle = &handles[i];
    return SUCCESS;
  }
  return NOT_FOUND;
}

// "0000:01:00.0" or with eight digits of domain: the bus is the card's number plus one.
ENTRY int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
  const char *colon = strchr(id, ':');
  unsigned long bus = colon ? strtoul(colon + 1, NULL, 16) : 0;
  if (!state || !bus || bus > state->card_count) return NOT_FOUND;
  *handle = &handles[bus - 1];
  return SUCCESS;
}
ENTRY int nvmlDeviceGetHandleByPciBusId(const char *id, void **handle) {
  return nvmlDeviceGetHandleByPciBusId_v2(id, handle);
}

// ---- what a card is

ENTRY int nvmlDeviceGetIndex(void *handle, unsigned *index) {
  CARD(handle);
  *index = (unsigned)card;
  return SUCCESS;
}
ENTRY int nvmlDeviceGetMinorNumber(void *handle, unsigned *number) { return nvmlDeviceGetIndex(handle, number); }

ENTRY int nvmlDeviceGetName(void *handle, char *to, unsigned room) {
  CARD(handle);
  return text(to, room, state->cards[card].title);
}

ENTRY int nvmlDeviceGetUUID(void *handle, char *to, unsigned room) {
  CARD(handle);
  return text(to, room, state->cards[card].uuid);
}

ENTRY int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  CARD(handle);
  *major = state->cards[card].capability_major;
  *minor = state->cards[card].capability_minor;
  return SUCCESS;
}

ENTRY int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *about) {
  CARD(handle);
  memset(about, 0, sizeof *about);
  about->bus = (unsigned char)(card + 1);  // two digits
  snprintf(about->legacy_id, sizeof about->legacy_id, "0000:%02X:00.0", about->bus);
  snprintf(about->id, sizeof about->id, "00000000:%02X:00.0", about->bus);
  return SUCCESS;
}

// ---- its memory

ENTRY int nvmlDeviceGetMemoryInfo(void *handle, struct memory *about) {
  CARD(handle);
  about->total = state->cards[card].total_bytes;
  about->used = state_used(state, (uint32_t)card);
  about->free = about->used < about->total ? about->total - about->used : 0;
  return SUCCESS;
}

ENTRY int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *about) {
  struct memory plain;
  int result = nvmlDeviceGetMemoryInfo(handle, &plain);
  if (result != SUCCESS) return result;
  about->total = plain.total;
  about->free = plain.free;
  about->used = plain.used;
  about->reserved = 0;
  return SUCCESS;
}

// Called with too little room, the real one tells how much is needed.
static int processes(void *handle, unsigned *count, void *out, size_t size) {
  CARD(handle);
  struct state_entry *found = malloc(MAX_ENTRIES * sizeof *found);
  if (!found) return INSUFFICIENT_SIZE;
  unsigned there = state_processes(state, (uint32_t)card, found, MAX_ENTRIES);
  int result = there <= *count && (out || !there) ? SUCCESS : INSUFFICIENT_SIZE;
  for (unsigned i = 0; result == SUCCESS && i < there; i++) {
    struct process one = {(unsigned)found[i].pid, found[i].used_bytes, UINT32_MAX, UINT32_MAX};
    memcpy((char *)out + i * size, &one, size);
  }
  *count = there;
  free(found);
  return result;
}

ENTRY int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *out) {
  return processes(handle, count, out, sizeof *out);
}
ENTRY int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, struct process *out) {
  return processes(handle, count, out, sizeof *out);
}
ENTRY int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, struct process_v1 *out) {
  return processes(handle, count, out, sizeof *out);
}

static int none(void *handle, unsigned *count) {
  CARD(handle);
  *count = 0;
  return SUCCESS;
}
ENTRY int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, void *out) {
  return none(handle, count);
}
ENTRY int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, void *out) {
  return none(handle, count);
}
ENTRY int nvmlDeviceGetGraphicsRunningProcesses(void *handle, unsigned *count, void *out) {
  return none(handle, count);
}

// No fabric of several machines, said as "not supported" in the answer: PyTorch warns of an error. The caller has set
// the version, in the first four bytes; the state is the last of the next 25.
ENTRY int nvmlDeviceGetGpuFabricInfoV(void *handle, void *about) {
  CARD(handle);
  memset((char *)about + 4, 0, 25);
  return SUCCESS;
}

// ---- what a card without hardware has not: NVLink, MIG slices, power, temperature, clocks
#define NOT_THERE(name) \
  ENTRY int name(void *handle) { return NOT_SUPPORTED; }
NOT_THERE(nvmlDeviceGetGpuFabricInfo)
NOT_THERE(nvmlDeviceGetNvLinkState)
NOT_THERE(nvmlDeviceGetNvLinkCapability)
NOT_THERE(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_THERE(nvmlDeviceGetNvLinkRemoteDeviceType)
NOT_THERE(nvmlDeviceGetMigMode)
NOT_THERE(nvmlDeviceGetMaxMigDeviceCount)
NOT_THERE(nvmlDeviceIsMigDeviceHandle)
NOT_THERE(nvmlDeviceGetMigDeviceHandleByIndex)
NOT_THERE(nvmlDeviceGetPowerUsage)
NOT_THERE(nvmlDeviceGetEnforcedPowerLimit)
NOT_THERE(nvmlDeviceGetPowerManagementLimit)
NOT_THERE(nvmlDeviceGetTotalEnergyConsumption)
NOT_THERE(nvmlDeviceGetUtilizationRates)
NOT_THERE(nvmlDeviceGetTemperature)
NOT_THERE(nvmlDeviceGetFanSpeed)
NOT_THERE(nvmlDeviceGetClockInfo)
NOT_THERE(nvmlDeviceGetMaxClockInfo)
NOT_THERE(nvmlDeviceGetComputeMode)
NOT_THERE(nvmlDeviceGetPersistenceMode)
NOT_THERE(nvmlDeviceGetPlatformInfo)
NOT_THERE(nvmlDeviceGetCpuAffinity)
NOT_THERE(nvmlDeviceGetMemoryAffinity)
