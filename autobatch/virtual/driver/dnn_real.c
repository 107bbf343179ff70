// The real cuDNN: finding it, and describing cards to it.
#define _GNU_SOURCE
#include "dnn_real.h"

#include <dlfcn.h>
#include <link.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "card.h"
#include "driver.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct dnn_real library;
static int usable;

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define MAJOR TEXT(CUDNN_MAJOR)

// What torch is linked to finds its parts beside itself, and so do we. They are opened one by one, because the symbols
// of the whole are those that this driver takes over.
static void *open_part(const char *name) {
  void *whole = dlopen("libcudnn.so." MAJOR, RTLD_LAZY | RTLD_NOLOAD);
  struct link_map *about;
  char path[PATH_MAX];
  if (!whole || dlinfo(whole, RTLD_DI_LINKMAP, &about)) return NULL;
  const char *slash = strrchr(about->l_name, '/');
  if (!slash) return NULL;
  int length = snprintf(path, sizeof path, "%.*s/lib%s.so." MAJOR, (int)(slash - about->l_name), about->l_name, name);
  return length < (int)sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND) : NULL;
}

// ---- cuBLASLt
//
// An engine of convolutions of 1 x 1, often the first of its list, asks cuBLASLt what it would run. It opens the real
// one by itself, past this driver, and that starts on a real card only. So what it looks up there is led to ours, whose
// algorithm wants no workspace; on an H200 it is 384 bytes, and some MiB in a few backward passes.

static void *look_up(void *part, const char *name) {
  void *ours = strncmp(name, "cublasLt", 8) ? NULL : entry_point(name);
  return ours ? ours : dlsym(part, name);
}

// Where `part` keeps the address of a function it imports, in the table that lazy binding fills; NULL without one.
static void **import_of(void *part, const char *name) {
  struct link_map *about;
  const ElfW(Rela) *table = NULL;
  const ElfW(Sym) *symbols = NULL;
  const char *names = NULL;
  size_t bytes = 0;
  if (dlinfo(part, RTLD_DI_LINKMAP, &about)) return NULL;
  for (const ElfW(Dyn) *entry = about->l_ld; entry->d_tag != DT_NULL; entry++) {
    if (entry->d_tag == DT_JMPREL) table = (const void *)entry->d_un.d_ptr;
    if (entry->d_tag == DT_PLTRELSZ) bytes = entry->d_un.d_val;
    if (entry->d_tag == DT_SYMTAB) symbols = (const void *)entry->d_un.d_ptr;
    if (entry->d_tag == DT_STRTAB) names = (const void *)entry->d_un.d_ptr;
    if (entry->d_tag == DT_FLAGS && entry->d_un.d_val & DF_BIND_NOW) return NULL;  // then it cannot be written to
  }
  for (size_t i = 0; table && symbols && names && i < bytes / sizeof *table; i++)
    if (!strcmp(names + symbols[ELF64_R_SYM(table[i].r_info)].st_name, name))
      return (void **)(about->l_addr + table[i].r_offset);
  return NULL;
}

static void lead_to_our_cublas(void) {
  void *part = open_part("cudnn_engines_precompiled");
  void **import = part ? import_of(part, "dlsym") : NULL;
  if (import) *import = (void *)look_up;
}

static void prepare(void) {
  void *part = open_part("cudnn_graph");
  if (!part) return;
  lead_to_our_cublas();
  library.create = dlsym(part, "cudnnBackendCreateDescriptor");
  library.destroy = dlsym(part, "cudnnBackendDestroyDescriptor");
  library.set = dlsym(part, "cudnnBackendSetAttribute");
  library.get = dlsym(part, "cudnnBackendGetAttribute");
  library.finalize = dlsym(part, "cudnnBackendFinalize");
  usable = library.create && library.destroy && library.set && library.get && library.finalize;
}

const struct dnn_real *dnn_real(void) {
  pthread_once(&once, prepare);
  return usable ? &library : NULL;
}

// In the words that cuDNN 9.19 has for a real card.
static int describe(int device, char *text, size_t room) {
  struct cudaDeviceProp p;
  properties_of(device, &p);
  struct chip chip = chip_of(card_of(device));
  int length = snprintf(
      text, room,
      "{\"maxGridSize\":[%d,%d,%d],\"maxBlockSize\":[%d,%d,%d],\"regsPerBlock\":%d,\"multiProcessorCount\":%d,"
      "\"warpSize\":%d,\"maxSharedMemoryPerBlock\":%zu,\"maxSharedMemoryPerBlockOptin\":%zu,"
      "\"reservedSharedMemoryPerBlock\":%zu,\"maxRegistersPerSM\":%d,\"maxCtasPerSM\":%d,\"maxThreadsPerBlock\":%d,"
      "\"maxThreadsPerSM\":%d,\"pciDeviceId\":%d,\"isTccDriver\":0,\"supportCoopLaunch\":%d,\"totalGlobalMem\":%zu,"
      "\"smClockRateKHz\":%d,\"memClockRateKHz\":%d,\"l2CacheSize\":%d,\"cudaDeviceId\":%d,\"deviceVer\":%d,"
      "\"driverVer\":%d,\"deviceName\":\"%s\"}",
      p.maxGridSize[0], p.maxGridSize[1], p.maxGridSize[2], p.maxThreadsDim[0], p.maxThreadsDim[1], p.maxThreadsDim[2],
      p.regsPerBlock, p.multiProcessorCount, p.warpSize, p.sharedMemPerBlock, p.sharedMemPerBlockOptin,
      p.reservedSharedMemPerBlock, p.regsPerMultiprocessor, p.maxBlocksPerMultiProcessor, p.maxThreadsPerBlock,
      p.maxThreadsPerMultiProcessor, p.pciDeviceID, p.cooperativeLaunch, p.totalGlobalMem, chip.clock_khz,
      chip.memory_clock_khz, p.l2CacheSize, device, 100 * p.major + 10 * p.minor, CUDA_VERSION, p.name);
  return length < (int)room ? length : 0;
}

static cudnnBackendDescriptor_t make_card(int device) {
  char text[2048];
  cudnnBackendDescriptor_t card;
  int length = describe(device, text, sizeof text);
  if (!length || library.create(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &card)) return NULL;
  if (!library.set(card, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, length + 1, text) &&
      !library.finalize(card))
    return card;
  library.destroy(card);
  return NULL;
}

// Without a lock, because the library opens further parts in here, and what these register takes one: of two threads
// that come at once, the second throws its own away.
cudnnBackendDescriptor_t dnn_real_card(int device) {
  static cudnnBackendDescriptor_t described[MAX_CARDS];
  static char unknown;  // its address stands for a card that the library does not take
  if (!dnn_real() || !card_of(device)) return NULL;
  cudnnBackendDescriptor_t card = __atomic_load_n(&described[device], __ATOMIC_ACQUIRE);
  if (!card) {
    cudnnBackendDescriptor_t made = make_card(device);
    if (!made) made = &unknown;
    if (__atomic_compare_exchange_n(&described[device], &card, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      card = made;
    else if (made != &unknown) library.destroy(made);
  }
  return card == &unknown ? NULL : card;
}
